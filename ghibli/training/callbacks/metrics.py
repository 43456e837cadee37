"""The rows of metrics.csv (within epochs) and probe.csv (after each epoch), also sent to the dashboards."""

import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ghibli.evaluation.gain import Gain, Probe
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_rows
from ghibli.training.callbacks.checkpoints import between_steps
from ghibli.training.loggers import tables
from ghibli.training.module import GhibliModule

METRICS = ("step", "epoch", "train/loss", "train/loss_normalised", "lr", "time/images_per_second")


class Records(Callback):
    """Write a row to metrics.csv every n optimiser steps, and to probe.csv before training and every epoch.

    A row's train/loss is the mean over all examples since the previous row. Checkpoints carry the rows
    so far, and a resumed run rewrites the files from them, so they equal those of an uninterrupted run
    whatever happened to the files.

    The sums are not torchmetrics' MeanMetric: a checkpoint must hold them exactly, in float64, and their
    layout is part of the checkpoint of runs that are still to be resumed.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self.rows: list[dict[str, Any]] = []
        self.probe_rows: list[dict[str, Any]] = []
        self.row, self.epoch = Sums(), Sums()
        self.examples, self.since = 0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        sums = {"row": vars(self.row), "epoch": vars(self.epoch)}
        return sums | {"rows": self.rows, "probe_rows": self.probe_rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.row, self.epoch = Sums(**state_dict["row"]), Sums(**state_dict["epoch"])
        self.rows, self.probe_rows = list(state_dict["rows"]), list(state_dict["probe_rows"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        """Rewrite the files from the restored rows; Lightning has restored a checkpoint by now.

        What follows from the scores is computed again: an older version had fewer columns.
        """
        if self.probe_rows:
            steps = trainer.datamodule.num_train_timesteps
            self.probe_rows = [
                probe_row(row, probe, steps)
                for row, probe in zip(self.probe_rows, pl_module.probe.history, strict=True)
            ]
            self.flush(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.examples, self.since = 0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if not self.probe_rows:
            self.add_probe(trainer, pl_module.probe.history)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        terms = [outputs[name] for name in term_columns(trainer)]
        here = torch.stack([outputs["loss"].detach(), outputs["plain"], outputs["expected"], *terms]).double()
        here[0] *= trainer.accumulate_grad_batches
        everywhere = trainer.strategy.reduce(
            here, reduce_op="mean"
        )  # what one device with all examples would have
        for sums in (self.row, self.epoch):
            sums.add(*everywhere)
        self.examples += len(batch["example"]) * trainer.world_size
        if between_steps(trainer, batch_idx) and trainer.global_step % trainer.log_every_n_steps == 0:
            self.write_train_row(trainer)

    def write_train_row(self, trainer: L.Trainer) -> None:
        speed = self.examples / (time.monotonic() - self.since)
        values = self.row.means()
        row = {
            "train/loss": values["loss"], "train/loss_normalised": values["normalised"],
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **dict(zip(term_columns(trainer), self.row.term_means(), strict=True)),
        }  # fmt: skip
        self.rows.append(numbered(trainer, row | {"time/images_per_second": round(speed, 2)}))
        log(trainer, self.rows[-1])
        self.row = Sums()
        self.examples, self.since = 0, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.add_probe(trainer, pl_module.probe.history)
        self.flush(trainer)
        self.epoch = Sums()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        """Log what early stopping on the training loss watches, as in the reference study."""
        loss = self.probe_rows[-1]["train/epoch_loss"]
        if loss != "":  # empty when training ended within its first epoch
            pl_module.log("train/epoch_loss", float(loss), logger=False)

    def add_probe(self, trainer: L.Trainer, history: list[Probe]) -> None:
        """Add the newest probe to probe.csv and the dashboards."""
        losses: dict[str, Any] = self.epoch.means() if self.epoch.batches else {}
        known = {
            "step": trainer.global_step, "epoch": len(history) - 1,
            "train/epoch_loss": losses.get("loss", ""), "train/epoch_loss_se": losses.get("error", ""),
        }  # fmt: skip
        row = probe_row(known, history[-1], trainer.datamodule.num_train_timesteps)
        self.probe_rows.append(row)
        log(trainer, {key: value for key, value in row.items() if value != ""})
        bars = gain_by_timestep(history[-1], trainer.datamodule.num_train_timesteps)
        for dashboard in trainer.loggers:
            dashboard.log_table(tables.gain_by_timestep(bars), trainer.global_step)
            for table in (tables.gain_curve(self.probe_rows), *tables.gain_and_price(self.probe_rows)):
                dashboard.log_table(table, trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict) -> None:
        self.flush(trainer)

    def flush(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            write_rows(self.run.metrics, (*METRICS, *term_columns(trainer)), self.rows)
            if self.probe_rows:
                columns = max(self.probe_rows, key=len)  # a price may begin or end with a resume
                write_rows(self.run.probe, tuple(columns), self.probe_rows)


@dataclass
class Sums:
    """Running sums over forward passes, each averaged over devices, float64."""

    batches: int = 0
    loss: torch.Tensor | float = 0.0  # what is minimised
    square: torch.Tensor | float = 0.0
    plain: torch.Tensor | float = 0.0  # before any weighting
    expected: torch.Tensor | float = 0.0  # what the base scores at these timesteps
    terms: list[torch.Tensor] = field(default_factory=list)  # of config.term_names, in their order

    def add(
        self, loss: torch.Tensor, plain: torch.Tensor, expected: torch.Tensor, *terms: torch.Tensor
    ) -> None:
        self.batches += 1
        sums = self.terms or [torch.zeros_like(term) for term in terms]
        self.terms = [total + term for total, term in zip(sums, terms, strict=True)]
        self.loss, self.square = self.loss + loss, self.square + loss.square()
        self.plain, self.expected = self.plain + plain, self.expected + expected

    def term_means(self) -> list[float]:
        """Return the mean of each term, before its weight."""
        return [float(term) / self.batches for term in self.terms]

    def means(self) -> dict[str, float]:
        """Return the mean loss, its standard error over passes, and the loss over the base's expected one."""
        loss, square, plain, expected = map(float, (self.loss, self.square, self.plain, self.expected))
        mean = loss / self.batches
        variance = max(0.0, square / self.batches - mean**2)
        error = (variance / max(1, self.batches - 1)) ** 0.5
        return {"loss": mean, "error": error, "normalised": plain / expected}


def term_columns(trainer: L.Trainer) -> list[str]:
    """Return the columns of metrics.csv for the terms of the loss: `train/NAME`."""
    return [f"train/{name}" for name in trainer.lightning_module.config.term_names]


def probe_row(known: dict[str, Any], probe: Probe, num_train_timesteps: int) -> dict[str, Any]:
    """Return a row of probe.csv: `known`, which are step, epoch and training loss, and the probe's."""
    first, last = ("step", "epoch"), ("train/epoch_loss", "train/epoch_loss_se")
    values = probe_values(probe, num_train_timesteps)
    return {key: known[key] for key in first} | values | {key: known[key] for key in last}


def probe_values(probe: Probe, num_train_timesteps: int) -> dict[str, float]:
    """Return a probe as the columns of probe.csv."""
    val, train, balanced = probe.val_gain, probe.train_gain, probe.balanced_gain
    values = {
        "probe/val_loss": probe.val.double().mean().item(),
        "probe/val_loss_g1": probe.val_g1.double().mean().item(),
        "probe/val_gain": val.value, "probe/val_gain_se": val.standard_error,
        "probe/val_gain_low": val.low, "probe/val_gain_high": val.high,
        "probe/train_loss": probe.train.double().mean().item(),
        "probe/train_gain": train.value, "probe/train_gain_se": train.standard_error,
        "probe/val_images": len(probe.val), "probe/train_images": len(probe.train),
        "probe/val_gain_balanced": balanced.value, "probe/val_gain_balanced_se": balanced.standard_error,
    }  # fmt: skip
    if (price := probe.forgotten) is not None:
        values |= {
            "probe/price": price.value, "probe/price_se": price.standard_error,
            "probe/price_low": price.low, "probe/price_high": price.high,
            "probe/price_loss": probe.price.double().mean().item(), "probe/price_groups": len(probe.price),
        }  # fmt: skip
    for part, gain in gain_by_timestep(probe, num_train_timesteps).items():
        values[f"probe/val_gain_t{part}"] = gain.value
        values[f"probe/val_gain_t{part}_se"] = gain.standard_error
    return values


def gain_by_timestep(probe: Probe, num_train_timesteps: int) -> dict[str, Gain]:
    """Return the held-out gain by range of timesteps, such as `0-249`."""
    gains = probe.gain_by_timestep
    edges = [k * num_train_timesteps // len(gains) for k in range(len(gains) + 1)]
    return {f"{edges[k]}-{edges[k + 1] - 1}": gain for k, gain in enumerate(gains)}


def numbered(trainer: L.Trainer, values: dict[str, float]) -> dict[str, float]:
    return {"step": trainer.global_step, "epoch": trainer.current_epoch} | values


def log(trainer: L.Trainer, row: dict[str, float]) -> None:
    """Send a row to every dashboard."""
    for dashboard in trainer.loggers:
        dashboard.log_metrics({key: value for key, value in row.items() if key != "step"}, step=row["step"])
