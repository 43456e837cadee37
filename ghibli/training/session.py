"""One training session: what a run trains with, and how its folder tells what became of it."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ghibli.adapters.apply import load_base
from ghibli.config.files import to_yaml
from ghibli.config.schema import Config, base_name, describe, images_name
from ghibli.data.datamodule import GhibliDataModule
from ghibli.models.base import configs_hash
from ghibli.runs import distributed, identity, lock
from ghibli.runs.folder import RunDir, check_unchanged, step_of
from ghibli.runtime.commands import command_here, command_line, resume_command
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text
from ghibli.runtime.provenance import now, provenance
from ghibli.runtime.resources import device_name, reset_peak_memory
from ghibli.training.callbacks.checkpoints import CleanStop, StopRequested, requeue
from ghibli.training.callbacks.race import Judge, Outrun
from ghibli.training.loggers import choice
from ghibli.training.module import GhibliModule
from ghibli.training.trainer import Callbacks, make_callbacks, make_trainer

logger = logging.getLogger(__name__)

TOO_SHORT = (
    "training ended before its first epoch did, so nothing was validated and there is no result: "
    "give it more trainer.max_steps or trainer.max_time"
)


@dataclass(frozen=True)
class Training:
    """All that a run trains with."""

    config: Config
    run: RunDir
    module: GhibliModule
    data: GhibliDataModule
    callbacks: Callbacks
    trainer: L.Trainer

    def fit(self, checkpoint: Path | None, script: Path) -> None:
        """Train, from a checkpoint if there is one; with finetune=none only score the base.

        Args:
            script: what further processes of the run start, one for each further device.

        Raises:
            UserError: training ended within its first epoch, or another process failed.
        """
        with distributed.together(self.trainer, self.run, script):
            if self.config.finetune == "none":
                self.trainer.validate(self.module, self.data, verbose=False)
            else:
                self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=True)
        finished = self.config.finetune == "none" or len(self.module.probe.history) > 1
        if self.trainer.is_global_zero and not finished:
            raise UserError(TOO_SHORT)


def build(config: Config, run: RunDir, stop: CleanStop, judge: Judge | None = None) -> Training:
    """Load the base, attach what is trained, and make data, callbacks and trainer; nothing is written.

    Args:
        judge: as for make_callbacks.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(config.model)
    module = GhibliModule(config, base)
    data = GhibliDataModule(config, base, run, module.num_train_timesteps)
    callbacks = make_callbacks(config, run, stop, judge)
    return Training(config, run, module, data, callbacks, make_trainer(config, run, callbacks))


@dataclass(frozen=True)
class Session:
    """A run folder that this process trains in."""

    config: Config
    run: RunDir
    stop: CleanStop
    checkpoint: Path | None  # to go on from; None at the start of a run

    def check_inputs(self, module: GhibliModule) -> None:
        """Note the hashes of base and lora.init, or refuse when a resumed run finds others.

        Raises:
            UserError: the base or lora.init is not what the run was started with.
        """
        path = self.config.model.path
        check_unchanged(self.run, "base_hash", module.base_hash, f"the base model.path={path}")
        configs = f"the tokenizer or a config of the base model.path={path}"
        check_unchanged(self.run, "configs_hash", configs_hash(module.base), configs)
        if module.start is not None:
            check_unchanged(self.run, "init_hash", module.start.hash, "lora.init")

    def note_start(self, trainer: L.Trainer) -> None:
        """Note in status.json from which step, by which code and on which device this process trains."""
        if self.checkpoint is not None:
            self.run.status.update(step=step_of(self.checkpoint))
        self.run.status.note_start(
            code=identity.code_hash(), device=device_name(trainer.strategy.root_device),
            devices=trainer.world_size, precision=str(trainer.precision),
        )  # fmt: skip


@contextmanager
def training_session(config: Config, run: RunDir, resumes: bool) -> Iterator[Session]:
    """Mark a locked run folder as running, and note how the session ended, whatever ended it.

    A resume that is refused or stopped before its first step leaves the folder as it was.

    Raises:
        Outrun: the run lost a sweep's race.
        SystemExit: Ctrl-C, SIGTERM or, under Slurm, SIGUSR1; with the exit code that is due.
        UserError: the settings, the files or the machine do not allow it.
    """
    reset_peak_memory()
    checkpoint = run.checkpoint_to_resume() if resumes else None
    restore, stop = run.as_it_was(), CleanStop(run)
    write_text(run.config, to_yaml(config))
    run.status.update(
        state="running", reason=None, started=run.status.read().get("started", now()),
        settings=describe(config), base=base_name(config.model), images=images_name(config.data),
        command=command_line(*sys.argv), seed=config.seed,
        process=os.getpid(), threads=config.threads or torch.get_num_threads(), **provenance(),
        **identity.identity_fields(config, run),
    )  # fmt: skip
    try:
        with stop:
            yield Session(config, run, stop, checkpoint)
            stop.obey()  # a signal in the last step or after it: no further trial may begin
    except StopRequested as request:
        if resumes and not stop.began:
            restore()
        raise SystemExit(note_interruption(run, request)) from None
    except Outrun as lost:
        if stop.received:  # in the last step before: no further trial may begin
            raise SystemExit(note_interruption(run, StopRequested(stop.received))) from None
        run.status.update(state="interrupted", reason=str(lost), ended=now())
        raise
    except BaseException as error:
        explained = as_user_error(error)
        refused = resumes and not stop.began  # nothing was trained
        with suppress(OSError):  # a full disk, which `error` already tells
            if refused:
                restore()
            if not (refused and run.status.state == "finished"):
                reason = str(explained) or type(error).__name__
                run.status.update(state="failed", reason=reason, ended=now())
        if run.last_checkpoint.exists() and not isinstance(explained, UserError):
            logger.info(f"what was trained is kept; go on with: {resume_command(run.path)}")
        if explained is error:
            raise
        raise explained from error
    finally:
        choice.close_all()


def as_user_error(error: BaseException) -> BaseException:
    """Return the error as a UserError where other settings help, else itself."""
    if isinstance(error, MisconfigurationException):
        return UserError(f"trainer: Lightning refuses these settings: {error}")
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return UserError(TOO_SHORT)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "the GPU has too little memory: lower data.batch_size and raise data.accumulate instead, "
            "or lower model.resolution"
        )
    return error


def note_interruption(run: RunDir, request: StopRequested) -> int:
    """Note the interruption, say how to resume, and return the exit code (130 or 143; 138 in Slurm)."""
    if request.signal_number == getattr(signal, "SIGUSR1", None):  # Windows has none
        ask_to_requeue()
    if run.status.state == "finished":
        logger.info(f"stopped; this run is finished{study_advice(run)}")
        return 128 + request.signal_number
    run.status.update(state="interrupted", reason=str(request), ended=now())
    if is_trial_at_work(run):
        logger.info(f"stopped{study_advice(run)}")
    elif run.last_checkpoint.exists():
        logger.info(f"stopped; go on with: {resume_command(run.path)}")
    else:
        logger.info(f"stopped before the first checkpoint; start it again with: {this_command()}")
    return 128 + request.signal_number


def ask_to_requeue() -> None:
    """Ask Slurm to start this job again, whose command then resumes in the same folder."""
    try:
        requeue()
        logger.info("Slurm was asked to start this job again: the same command goes on")
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(f"scontrol requeue failed ({error}): submit the job again")


def is_trial_at_work(run: RunDir) -> bool:
    """Return whether a run is a trial of a sweep that is under way, which holds the folder above."""
    return lock.is_held(run.path.parent / ".lock") is True


def study_advice(run: RunDir) -> str:
    """Say how the sweep of a trial goes on; empty for a run of its own."""
    if not is_trial_at_work(run):
        return ""
    again = f": {this_command()}" if lock.is_ours(run.path.parent / ".lock") else ""  # else a launcher's
    return f"; the same command goes on with the sweep{again}"


def this_command() -> str:
    """Return the command of this process, for the shell at hand."""
    return command_here("python", *sys.argv)


def follow(config: Config, run: RunDir, script: Path) -> None:
    """Train along as a further process of a run, which the first one stops; write nothing."""
    try:
        with CleanStop(run) as stop:
            build(config, run, stop).fit(run.usable_checkpoint(), script)  # a new run has no checkpoint
    except StopRequested:
        pass  # all processes stop at the same step; the first one reports it
    except Exception as error:
        explained = as_user_error(error)
        if explained is error:
            raise
        raise explained from error
