"""The Lightning Trainer of a run: precision, callbacks, checkpoints."""

import logging
import warnings
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from ghibli.config.schema import Config, EarlyStoppingConfig
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.training.callbacks.average import WeightAverage
from ghibli.training.callbacks.checkpoints import (
    CleanStop,
    FolderCheckpoint,
    StepCheckpoint,
    WholeCheckpoints,
)
from ghibli.training.callbacks.diagnosis import Doctor
from ghibli.training.callbacks.image_distance import DistanceCurve
from ghibli.training.callbacks.metrics import Records
from ghibli.training.callbacks.progress import ProgressLine, StatusWriter
from ghibli.training.callbacks.race import Judge, RaceStop
from ghibli.training.callbacks.resume_check import ResumeCheck
from ghibli.training.callbacks.samples import SampleGrid

WATCHED = {  # early_stopping.watch -> (logged metric, mode)
    "probe": ("probe/significant_best", "max"),
    "train_loss": ("train/epoch_loss", "min"),
}


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run; those with a name are asked for their results at its end."""

    records: Records
    samples: SampleGrid
    doctor: Doctor
    ordered: list[Callback]  # these and all others, as Lightning gets them


def make_trainer(config: Config, run: RunDir, callbacks: Callbacks) -> L.Trainer:
    """Build the Trainer with our callbacks around the flags of `config.trainer`; loggers come later.

    Raises:
        UserError: flags that Lightning refuses.
    """
    hush()
    flags = dict(config.trainer)
    if flags["accelerator"] == "auto":  # Lightning's own choice might be one that was never tried
        flags["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
    flags["precision"] = choose_precision(str(flags["precision"]), str(flags["accelerator"]))
    try:
        return L.Trainer(
            **flags,
            callbacks=callbacks.ordered,
            logger=False,
            plugins=[WholeCheckpoints()],
            default_root_dir=run.path,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer: Lightning refuses these flags: {error}") from error


def make_callbacks(config: Config, run: RunDir, stop: CleanStop, judge: Judge | None = None) -> Callbacks:
    """Build all callbacks; Lightning runs the checkpoints last, so they see what the others did.

    Args:
        judge: of a sweep's race, which may stop the run after an epoch; None = nothing does.
    """
    records, samples, doctor = Records(run), SampleGrid(config, run), Doctor(config, run)
    ordered = [ResumeCheck(run), records, samples, StatusWriter(run), ProgressLine(records), doctor, stop]
    if config.finetune != "none":
        if config.optimizer.ema_decay is not None:
            ordered.insert(0, WeightAverage(config.optimizer.ema_decay))
        if config.evaluate.every_n_epochs > 0:
            ordered.insert(-1, DistanceCurve(config, run))
        if judge is not None:
            ordered.insert(-1, RaceStop(judge))
        ordered += [
            *early_stopping(config.early_stopping),
            *checkpoints(run, config.checkpoint.every_n_steps),
        ]
    return Callbacks(records, samples, doctor, ordered)


def early_stopping(options: EarlyStoppingConfig) -> list[Callback]:
    """Build the stock EarlyStopping, if the settings ask for it."""
    if options.patience is None:
        return []
    monitor, mode = WATCHED[options.watch]
    return [EarlyStopping(monitor, mode=mode, patience=options.patience, check_on_train_epoch_end=True)]


def checkpoints(run: RunDir, every_n_steps: int) -> list[Callback]:
    """Build the three checkpoints: the best epoch's, every epoch's, and every n optimiser steps'."""
    common = {"dirpath": run.checkpoints, "enable_version_counter": False}
    return [
        FolderCheckpoint(
            monitor="probe/val_gain", mode="max", filename="best", save_on_train_epoch_end=True, **common
        ),
        FolderCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        StepCheckpoint(filename="last", every_n_train_steps=every_n_steps, **common),
    ]


def choose_precision(wanted: str, accelerator: str) -> str:
    """Return Lightning's precision; `auto` is the fastest safe one on this device, `auto-16` fp16 on a GPU.

    Raises:
        UserError: 16-mixed on a CPU, which Lightning would silently turn into bf16.
    """
    has_gpu = torch.cuda.is_available() and accelerator not in ("cpu",)
    if wanted == "16-mixed" and not has_gpu:
        raise UserError("trainer.precision=16-mixed needs a GPU: use 32-true (or bf16-mixed) on this machine")
    if wanted not in ("auto", "auto-16"):
        return wanted
    if not has_gpu:
        return "32-true"
    if wanted == "auto-16":
        return "16-mixed"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def hush() -> None:
    """Silence what Lightning says about choices made on purpose here; none of it is about lost input."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*ended before the epoch ended and your dataloader is not resumable.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*have modified the .* flags.*",
        ".*GPU available but not used.*",
        ".*module.s. in eval mode at the start of training.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*It is recommended to use .*sync_dist=True.*",  # what is logged is the same on all devices
        ".*functional.all_gather is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
