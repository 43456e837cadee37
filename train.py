"""Trains one run: `python train.py KEY=VALUE ...`; with -m a sweep. See conf/train.yaml."""

import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ghibli.config.files import from_yaml, to_yaml
from ghibli.config.schema import Config
from ghibli.runs import distributed, identity
from ghibli.runs.folder import RunDir, check_unchanged, step_of
from ghibli.runs.launch import hydra_entry, job_config, this_run
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, stop_at_once
from ghibli.runtime.files import write_text
from ghibli.runtime.provenance import now, provenance
from ghibli.runtime.rank import is_first

SCRIPT = Path(__file__).resolve()  # what further processes of a run start
TOO_SHORT = (
    "training ended before its first epoch did, so nothing was validated and there is no result: "
    "give it more trainer.max_steps or trainer.max_time"
)


def run(config: Config, run_dir: RunDir, resumes: bool = False) -> float:
    """Trains as the configuration says and writes everything into the run folder.

    A folder that holds this very trial already is gone on with, or has the answer if it is finished.

    Args:
        resumes: go on from checkpoints/last.ckpt of the folder, whatever code it was started by.

    Returns:
        The objective of sweeps: the best share by which the held-out loss is below the base's.
    """
    lock = run_dir.lock()
    try:
        if resumes and not run_dir.read_status():
            console.print(
                "status.json is damaged or gone: earlier starts are forgotten, the dashboard has a new run",
                style="yellow",
            )
        elif resumes:
            identity.say_what_changed(run_dir)
        else:
            objective, resumes = identity.take_up(config, run_dir)
            if objective is not None:
                return objective
        return lead(config, run_dir, resumes)
    finally:
        lock.close()


def lead(config: Config, run_dir: RunDir, resumes: bool) -> float:
    """Trains in a folder that nobody else writes: loads, fits, finishes, and notes how it ended."""
    with stop_at_once():
        import torch
        import wandb  # noqa: F401  (dashboard would import it later)

        from ghibli.adapters import apply
        from ghibli.config.schema import describe
        from ghibli.data.datamodule import GhibliDataModule
        from ghibli.prepare import preflight
        from ghibli.runtime.console import relative_path
        from ghibli.runtime.resources import device_name, peak_memory, reset_peak_memory
        from ghibli.training import finalize, wandb_logger
        from ghibli.training.callbacks.checkpoints import CleanStop, StopRequested
        from ghibli.training.module import GhibliModule
        from ghibli.training.trainer import make_trainer

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    reset_peak_memory()
    checkpoint = run_dir.checkpoint_to_resume() if resumes else None
    put_back, stop = run_dir.as_it_was(), CleanStop(run_dir)
    write_text(run_dir.config, to_yaml(config))
    run_dir.update_status(
        state="running", reason=None, started=run_dir.read_status().get("started", now()),
        settings=describe(config), command=" ".join(sys.argv), seed=config.seed,
        process=os.getpid(), threads=torch.get_num_threads(), **provenance(),
        **identity.marks(config, run_dir),
    )  # fmt: skip
    try:
        with stop:
            base = apply.load_base(config.model)
            module = GhibliModule(config, base)
            what = f"the base model.path={config.model.path}"
            check_unchanged(run_dir, "base_hash", module.base_hash, what)
            if module.start is not None:
                check_unchanged(run_dir, "init_hash", module.start.hash, "lora.init")
            data = GhibliDataModule(config, base, run_dir, module.num_train_timesteps)
            logger = wandb_logger.make_logger(config, run_dir, describe(config))
            if checkpoint == run_dir.previous_checkpoint:
                console.print("last.ckpt is damaged: going on from the checkpoint before it", style="yellow")
                checkpoint = checkpoint.replace(run_dir.last_checkpoint)  # so no save can lose it
            trainer = make_trainer(config, run_dir, stop, logger)
            if checkpoint is not None:
                run_dir.update_status(step=step_of(checkpoint))
            run_dir.note_start(
                code=identity.code_hash(), device=device_name(trainer.strategy.root_device),
                devices=trainer.world_size, precision=str(trainer.precision),
            )  # fmt: skip
            if not resumes:
                preflight.before_training(module, data, trainer, run_dir)
            with distributed.together(trainer, run_dir, SCRIPT):
                train(config, trainer, module, data, checkpoint)
            run_dir.update_status(peak_memory=peak_memory())
            if config.finetune != "none" and len(module.history) < 2:
                raise UserError(TOO_SHORT)
            objective = finalize.finish(config, run_dir, trainer, module, logger)
            stop.obey()  # a signal in the last step or after it: no further trial may begin
            return objective
    except StopRequested as request:
        if resumes and not stop.began:
            put_back()
        raise SystemExit(finalize.interrupted(run_dir, request)) from None
    except BaseException as error:
        mistake = as_mistake(error)
        refused = resumes and not stop.began  # nothing was trained
        with suppress(OSError):  # a full disk, which `error` already tells
            if refused:
                put_back()
            if not (refused and run_dir.state == "finished"):
                reason = str(mistake) or type(error).__name__
                run_dir.update_status(state="failed", reason=reason, ended=now())
        if run_dir.last_checkpoint.exists() and not isinstance(mistake, UserError):
            folder = relative_path(run_dir.path)
            console.print(f"what was trained is kept; go on with: python train.py resume={folder}")
        if mistake is error:
            raise
        raise mistake from error
    finally:
        wandb_logger.close()


def train(config: Config, trainer: Any, module: Any, data: Any, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if there is one, or only measures with finetune=none."""
    if config.finetune == "none":
        trainer.validate(module, data, verbose=False)
    else:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


def follow(config: Config, run_dir: RunDir) -> None:
    """What every process of a run but the first does: trains along, writes nothing, says nothing."""
    with distributed.following(run_dir):
        import torch

        from ghibli.adapters import apply
        from ghibli.data.datamodule import GhibliDataModule
        from ghibli.training.callbacks.checkpoints import CleanStop, StopRequested
        from ghibli.training.module import GhibliModule
        from ghibli.training.trainer import make_trainer

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            with CleanStop(run_dir) as stop:
                base = apply.load_base(config.model)
                module = GhibliModule(config, base)
                data = GhibliDataModule(config, base, run_dir, module.num_train_timesteps)
                checkpoint = run_dir.usable_checkpoint()  # at the start of a new run there is none
                trainer = make_trainer(config, run_dir, stop, None)
                with distributed.together(trainer, run_dir, SCRIPT):
                    train(config, trainer, module, data, checkpoint)
        except StopRequested:
            pass  # all stop at the same step; the first process says so
        except Exception as error:
            mistake = as_mistake(error)
            if mistake is error:
                raise
            raise mistake from error


def as_mistake(error: BaseException) -> BaseException:
    """The error as a UserError where other settings help, else itself."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

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


def main(cfg: Any) -> float:
    """One Hydra job: trains with the composed settings, or resumes with the run's; returns the objective."""
    if is_first():
        return run(job_config(cfg), this_run(), resumes=cfg.resume is not None)
    if cfg.resume is not None or identity.finished_objective(this_run()) is None:  # else the first has left
        follow(job_config(cfg), this_run())
    return math.nan


def start() -> None:
    """The command: a run of the user's, or a further process of one that is under way."""
    joined = distributed.run_to_join()
    if joined is None:
        hydra_entry(Path(__file__).parent / "conf", "train", main)
    else:
        follow(from_yaml(joined.config), joined)


if __name__ == "__main__":
    start()
