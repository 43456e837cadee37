"""Check, before a resumed run makes its first step, that its weights are right and score as before."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from ghibli.adapters import lora
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here, path_setting
from ghibli.runtime.console import relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.provenance import processor_name
from ghibli.runtime.resources import device_name
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)

HASHES = {"base_hash": "the base", "data_hash": "the image set"}  # also in status.json
STOPPED_BY = {"probe/significant_best": "the held-out gain", "train/epoch_loss": "the training loss"}
IMAGES = 2  # held-out images that are scored again
ROUNDING = {32: 1e-3, 16: 0.1}  # bits -> relative difference of an image's loss on another machine


class ResumeCheck(Callback):
    """Store the hash and the scores of the weights in every checkpoint; compare both on resume.

    This catches every silent way for a resume to go wrong: an adapter that was not loaded, another
    base, other images, other settings.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self.written: dict[str, Any] = {"weights": None}
        self.restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict[str, Any]
    ) -> None:
        weights = trained_weights_hash(pl_module)
        if self.written["weights"] != weights:  # the end of an epoch writes two files of the same weights
            self.written = {
                "weights": weights, "scores": rescore(trainer, pl_module),
                "place": place(pl_module), "precision": str(trainer.precision),
            }  # fmt: skip
        status = self.run.status.read()
        checkpoint["identity"] = self.written | {"hashes": {key: status.get(key) for key in HASHES}}
        checkpoint["max_epochs"] = trainer.max_epochs

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict[str, Any]
    ) -> None:
        self.restored = {key: checkpoint.get(key) for key in ("identity", "max_epochs")}

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        """Compare weights and scores with the checkpoint, once Lightning has restored everything.

        Raises:
            UserError: the weights or their scores are not those of the checkpoint.
        """
        if self.restored is None:
            return
        if self.restored["identity"] is None:
            logger.warning(
                "this checkpoint was written before hashes and scores were stored in it: resuming unchecked"
            )
        else:
            self.compare(trainer, pl_module, self.restored["identity"])
        if self.restored["max_epochs"] not in (None, trainer.max_epochs):
            self.replan(trainer, self.restored["max_epochs"])
        elif any(stopping.stopped_epoch for stopping in stoppings(trainer)):
            trainer.should_stop = True  # it stopped early; another epoch would make it a different run

    def on_train_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        """Say that early stopping ended the run, why, and how to go on."""
        ended = early_stop(trainer)
        if ended is None or not trainer.is_global_zero:
            return
        more = 2 * trainer.max_epochs
        go_on = command_here(
            "python", "train.py", path_setting("resume", relative_path(self.run.path)),
            f"trainer.max_epochs={more}",
        )  # fmt: skip
        logger.info(
            f"early stopping ended the run {ended}; more epochs, counted anew: {go_on}; "
            "a new run with early_stopping.patience=null never stops early"
        )

    def compare(self, trainer: L.Trainer, pl_module: GhibliModule, stored: dict[str, Any]) -> None:
        self.compare_hashes(stored.get("hashes", {}))
        found = trained_weights_hash(pl_module)
        if found != stored["weights"]:
            raise UserError(
                f"resume={self.run.path}: the weights in the networks are not those of the checkpoint "
                f"(sha256 {found[:12]}, stored {stored['weights'][:12]}): it was edited, or its adapter was "
                "not loaded; start a new run"
            )
        scores, before = rescore(trainer, pl_module), stored["scores"]
        if torch.equal(scores, before):
            return
        is_same_place = stored["place"] == place(pl_module) and pl_module.device.type == "cpu"
        now, then = scores.mean(-1), before.mean(-1)  # (images, 2)
        bits = 16 if "16" in f"{trainer.precision} {stored['precision']}" else 32
        if (
            scores.shape == before.shape
            and not is_same_place
            and torch.allclose(now, then, rtol=ROUNDING[bits])
        ):
            return
        raise UserError(
            f"resume={self.run.path}: the checkpoint's weights now score {numbers(now)} on held-out "
            f"images, {numbers(then)} when it was written: another base, edited images or captions, "
            "or an edited config.yaml; put them back, or start a new run"
        )

    def compare_hashes(self, stored: dict[str, str]) -> None:
        """Compare base and images with those of the checkpoint, even where status.json was lost.

        Raises:
            UserError: either differs.
        """
        status = self.run.status.read()
        for key, before in stored.items():
            if before != status.get(key):
                raise UserError(
                    f"resume={self.run.path}: {HASHES[key]} is not the same as when the checkpoint was "
                    f"written ({key} {str(status.get(key))[:12]}, was {str(before)[:12]}); put it back, or "
                    "start a new run"
                )

    def replan(self, trainer: L.Trainer, before: int) -> None:
        """Report what more epochs mean, and set the learning rate of the longer plan."""
        done, planned = trainer.fit_loop.epoch_progress.current.processed, trainer.max_epochs
        old, new = put_learning_rate(trainer)
        ended = early_stop(trainer)
        for stopping in stoppings(trainer):
            stopping.wait_count = stopping.stopped_epoch = 0  # who asks for more epochs gets them
        rate = f"stays at {old:g}" if old == new else f"jumps from {old:g} to {new:g} at the next step"
        stretched = "" if old == new else ", as its schedule is stretched over all epochs"
        logger.info(
            f"{done} of {before} epochs done; now {planned} planned, so {planned - done} to do"
            f"{at_most(ended, stoppings(trainer))}"
        )
        logger.info(f"the learning rate {rate}{stretched}")
        if trainer.is_global_zero:
            grown = [*self.run.status.read().get("grown", []), [trainer.global_step, before, planned]]
            self.run.status.update(grown=grown)  # [step, epochs before, epochs planned now]


def stoppings(trainer: L.Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]


def early_stop(trainer: L.Trainer) -> str | None:
    """Say after which epoch early stopping ended the training, and why; None if it did not."""
    for stopping in stoppings(trainer):
        if stopping.stopped_epoch:
            epochs = "epoch" if stopping.patience == 1 else f"{stopping.patience} epochs"
            what = STOPPED_BY.get(str(stopping.monitor), stopping.monitor)
            return (
                f"after epoch {stopping.stopped_epoch + 1}: {what} did not improve in the last {epochs} "
                "(early_stopping.patience)"
            )
    return None


def at_most(ended: str | None, rules: list[EarlyStopping]) -> str:
    """Say that a stopping rule may end a resumed run before its last epoch, and that it did so before."""
    if not rules:
        return ""
    before = f"; it ended this run {ended}" if ended else ""
    return (
        f", unless early stopping ends it after {rules[0].patience} without an improvement{before}; "
        "its count starts anew"
    )


def numbers(means: torch.Tensor) -> str:
    return " and ".join(f"{value:.6f}" for value in means[:, 0].tolist())


def trained_weights_hash(module: GhibliModule) -> str:
    """Return sha256 over all that is trainable in the networks themselves, not over the module's list."""
    total = hashlib.sha256()
    for name, tensor in lora.trainable(module.base).items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


@torch.no_grad()
def rescore(trainer: L.Trainer, module: GhibliModule) -> torch.Tensor:
    """Score the current weights on the first held-out images; return (images, 2, K) on the CPU."""
    data, guidance = trainer.datamodule, module.config.loss.own_guidance
    count = min(IMAGES, len(data.val_images))
    with undisturbed(module), trainer.precision_plugin.forward_context():
        batches = [
            module.transfer_batch_to_device(batch, module.device, 0) for batch in data.probe_batches[:count]
        ]
        scores = [module.scores(batch, guidance, module.base_alphas_cumprod) for batch in batches]
    return torch.stack(scores).float().cpu()


@contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; restore the mode of every part afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def place(module: GhibliModule) -> str:
    """Return everything besides the settings that rounding depends on."""
    return f"{device_name(module.device)}, {processor_name()}, torch {torch.__version__}"


def put_learning_rate(trainer: L.Trainer) -> tuple[float, float]:
    """Set the next step's rate to what the schedule says now; return (before, now) of the first group.

    Lightning restores the rates of the old schedule. `_last_lr` is private in torch: it is what
    get_last_lr() returns, and LRScheduler has no public way to set it (tested with torch 2.14).
    """
    (config,) = trainer.lr_scheduler_configs
    schedule = config.scheduler
    before = schedule.optimizer.param_groups[0]["lr"]
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return before, rates[0]
