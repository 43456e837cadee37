"""When and how a run is saved: atomically, between optimiser steps, and when a signal stops it."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ghibli.runs.folder import CHECKPOINTS, RunDir, read_checkpoint
from ghibli.runtime.console import relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole, temporary_beside, write_with_checksum
from ghibli.runtime.rank import is_first
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)

SIGHUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none


class StopRequested(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP arrived and what could be saved is saved. No error handler catches it."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def in_slurm() -> bool:
    """Return whether this process is a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def requeue() -> None:
    """Requeue this Slurm job; a task of a job array has an id of two parts.

    Raises:
        subprocess.SubprocessError, OSError: Slurm refuses, or scontrol is missing.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=60)


LAYOUT = {  # what Lightning and we read from a checkpoint
    "epoch": int, "global_step": int, "pytorch-lightning_version": str, "state_dict": dict, "loops": dict,
    "callbacks": dict, "optimizer_states": list, "lr_schedulers": list, "probe": list,
}  # fmt: skip


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints atomically, with a checksum as the last bytes; never delete one.

    The last.ckpt that a new one replaces stays as previous.ckpt.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Read a checkpoint as data, whatever Lightning asks for.

        Raises:
            UserError: as read_checkpoint.
        """
        content = read_checkpoint(Path(path))
        for key, kind in LAYOUT.items():
            if not isinstance(content.get(key), kind):
                raise UserError(f"{path} is not a checkpoint of this program: {key} is missing in it")
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete nothing: every callback writes one name only, so there is never a file too many.

        Lightning's own deletes the path, with all below it, that the state in a checkpoint names.
        """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        if path.name == "last.ckpt" and path.exists():
            keep_previous(path)

        def write(file: BinaryIO) -> None:
            torch.save(checkpoint, file)

        write_with_checksum(path, write)


def keep_previous(last: Path) -> None:
    """Give last.ckpt a second name, previous.ckpt; last.ckpt itself stays until it is replaced."""
    second = temporary_beside(last)
    try:
        os.link(last, second)
    except OSError:  # a file system without hard links
        shutil.copyfile(last, second)
    os.replace(second, RunDir(last.parents[1]).previous_checkpoint)


class FolderCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that takes no path from a checkpoint: it knows the folder that it writes to.

    So it keeps its best score when the run folder was moved (Lightning's own forgets it then, and would
    take the next epoch for the best), and a checkpoint from elsewhere cannot point it at other files.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            name = Path(path).name
            return str(Path(str(self.dirpath), name)) if name in CHECKPOINTS else ""

        try:
            names = ("best_model_path", "last_model_path", "kth_best_model_path")
            paths = {name: here(state_dict[name]) for name in names}
            scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
            numbers = {name: state_dict[name] for name in ("best_model_score", "kth_value")}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's state of {self.filename}.ckpt is damaged: {error!r}"
            ) from error
        best = {path: score for path, score in scores.items() if path and isinstance(score, torch.Tensor)}
        if paths["kth_best_model_path"] not in best:
            paths["kth_best_model_path"] = next(iter(best), "")
        super().load_state_dict({"dirpath": self.dirpath, "best_k_models": best} | paths | numbers)


class StepCheckpoint(FolderCheckpoint):
    """Save last.ckpt every n optimiser steps, only between two steps and not at the end of an epoch.

    Within an accumulation the gradients would be lost; the end of an epoch has its own checkpoint,
    after validation and grid.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        """Put the previous.ckpt that the run goes on from in the place of the damaged last.ckpt.

        Else the first save would replace the only good one. This is after all checks: a refused resume
        renames nothing.
        """
        super().on_train_start(trainer, pl_module)
        start = trainer.ckpt_path
        if trainer.is_global_zero and start is not None and Path(start).name == "previous.ckpt":
            logger.warning("last.ckpt is damaged: going on from the checkpoint before it")
            os.replace(start, Path(start).with_name("last.ckpt"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if between_steps(trainer, batch_idx) and not is_last:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def between_steps(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether an optimiser step has just been made."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class CleanStop(Callback):
    """Stop a run cleanly on Ctrl-C, SIGTERM, SIGHUP and, under Slurm, SIGUSR1: by a StopRequested.

    During training the first signal lets the optimiser step finish, saves and stops; in the last step
    or in validation it lets the run finish. A second signal, or any outside training, stops at once. A
    terminal that closes sends SIGHUP, often twice, which counts once; under `nohup` it is ignored.
    """

    def __init__(self, run: RunDir):
        self.run, self.received, self.in_training, self.began = run, 0, False, False
        self.previous: dict[int, Any] = {}
        self.obeyed: set[int] = set()  # signals that count once

    def __enter__(self) -> "CleanStop":
        if threading.current_thread() is threading.main_thread():  # signals reach only that one
            numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if in_slurm() else [])]
            if SIGHUP is not None and signal.getsignal(SIGHUP) != signal.SIG_IGN:
                numbers.append(SIGHUP)
            self.previous = {n: signal.getsignal(n) for n in numbers}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        for number in self.previous:
            signal.signal(number, signal.SIG_IGN if number in self.obeyed else self.note)

    def note(self, number: int, frame: Any) -> None:
        if not is_first():  # the first process tells the others when to stop
            return
        if number == SIGHUP:  # the shell and the kernel both send it
            self.obeyed.add(number)
            signal.signal(number, signal.SIG_IGN)
        if self.received or not self.in_training:
            raise StopRequested(number)
        self.received = number
        logger.warning("stopping after this step; once more to stop at once")

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.in_training = self.began = True
        self.install()  # over Lightning's handlers, which under Slurm save within an accumulation

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if between_steps(trainer, batch_idx) and not is_last and self.agree(trainer):
            trainer.save_checkpoint(self.run.last_checkpoint)
            raise StopRequested(self.received)

    def obey(self) -> None:
        """Raise StopRequested if a signal arrived too late in training to stop it."""
        if self.received:
            raise StopRequested(self.received)

    def agree(self, trainer: L.Trainer) -> int:
        """Return the signal that arrived, 0 for none: on every process the one the first got."""
        if trainer.world_size > 1:
            received = torch.tensor(self.received, device=trainer.strategy.root_device)
            self.received = int(trainer.strategy.reduce(received, reduce_op="max"))
        return self.received

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if self.agree(trainer):  # at the end of the epoch before, which has its own checkpoint
            raise StopRequested(self.received)

    def on_train_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.in_training = False


def load_weights(module: GhibliModule, checkpoint: Path, epoch: int | None = None) -> None:
    """Load a checkpoint's trainable weights into the module; warn if they are not of this epoch.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not is_whole(checkpoint):
        raise UserError(f"{checkpoint} is missing or damaged: the weights of that epoch are lost")
    content = read_checkpoint(checkpoint)
    weights, found = content["state_dict"], len(content["probe"]) - 1
    if epoch not in (None, found):
        logger.warning(
            f"{relative_path(checkpoint)} is of epoch {found}, not of the best one, {epoch}: "
            "the exported weights are of that epoch too"
        )
    with torch.no_grad():
        for name, parameter in module.trainable.items():
            parameter.copy_(weights[name])
