"""What Lightning lacks to look at a run: exact metric rows, sample grids, plain words, status."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from ghibli.checkpoints import between_steps
from ghibli.module import GhibliModule
from ghibli.progress import console, counted, make_bar
from ghibli.run_dir import RunDir, now, write_atomically, write_text
from ghibli.sampling import cells_of, compose_grid, draw_cells
from ghibli.schema import Config

COLUMNS = (
    "step", "epoch", "train/loss", "lr", "probe/val_loss", "probe/val_gain", "probe/val_gain_se",
    "time/images_per_second",
)  # fmt: skip


class MetricsWriter(Callback):
    """metrics.csv and the dashboard: one row every n optimiser steps, one after every validation.

    A row's train/loss is the mean over all examples since the row before. The file is written
    before every checkpoint, and a resumed run drops the rows after its checkpoint, so the rows
    are those of a run that was never stopped.
    """

    def __init__(self, run: RunDir, resume_step: int = 0):
        self.run = run
        self.rows = [row for row in read_rows(run.metrics) if int(row["step"]) <= resume_step]
        self.losses: torch.Tensor | float = 0.0
        self.batches = 0
        self.examples, self.since = 0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": float(self.losses), "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.batches = state_dict["losses"], state_dict["batches"]

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.examples, self.since = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses = self.losses + outputs["loss"].detach().double() * trainer.accumulate_grad_batches
        self.batches += 1
        self.examples += len(batch["example"]) * trainer.world_size
        if between_steps(trainer, batch_idx) and trainer.global_step % trainer.log_every_n_steps == 0:
            self.write_train_row(trainer)

    def write_train_row(self, trainer: L.Trainer) -> None:
        loss = torch.as_tensor(self.losses / self.batches, device=trainer.strategy.root_device)
        loss = trainer.strategy.reduce(loss, reduce_op="mean")
        speed = self.examples / (time.monotonic() - self.since)
        row = {"train/loss": float(loss), "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        self.add(trainer, row | {"time/images_per_second": round(speed, 2)})
        self.losses, self.batches = 0.0, 0
        self.examples, self.since = 0, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        names = [name for name in COLUMNS if name.startswith("probe/")]
        self.add(trainer, {name: float(trainer.callback_metrics[name]) for name in names})
        self.flush(trainer)
        self.since = time.monotonic()

    def add(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        self.rows.append({"step": trainer.global_step, "epoch": trainer.current_epoch} | values)
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict) -> None:
        self.flush(trainer)

    def flush(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.run.metrics, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, every value as its text; empty when there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class SampleGrid(Callback):
    """Draws prompts x {DDPM, DDIM} x guidance every n epochs, the base above, from the same noise."""

    def __init__(self, config: Config, run: RunDir):
        self.config, self.run = config, run
        self.cells = cells_of(config.sample, config.loss.guidance)
        self.base_pictures: torch.Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: GhibliModule, stage: str) -> None:
        """Draws the untouched base; Lightning restores a checkpoint only after this."""
        if self.config.sample.every_n_epochs == 0 or not trainer.is_global_zero:
            return
        pl_module.to(trainer.strategy.root_device)
        self.base_pictures = self.draw(trainer, pl_module, "drawing what the base makes of the prompts")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        epoch, every = trainer.current_epoch + 1, self.config.sample.every_n_epochs
        if self.base_pictures is not None and epoch % every == 0 and epoch < trainer.max_epochs:
            self.save(trainer, pl_module, f"epoch_{epoch:03d}", f"epoch {epoch}")

    def save(self, trainer: L.Trainer, pl_module: GhibliModule, name: str, label: str) -> Path:
        """Draws the model as it is now, writes samples/NAME.png and logs it; returns the file."""
        rows = [("base", self.base_pictures)]
        if self.config.finetune != "none":
            rows.append((label, self.draw(trainer, pl_module, f"drawing the grid of {label}")))
        grid = compose_grid(rows, self.config.sample.prompts, self.cells, self.title())
        path = self.run.samples / f"{name}.png"
        write_atomically(path, lambda file: grid.save(file, format="PNG"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_grid(logger, grid, label, trainer.global_step)
        return path

    def draw(self, trainer: L.Trainer, pl_module: GhibliModule, label: str) -> torch.Tensor:
        steps = len(self.cells) * self.config.sample.num_inference_steps
        done = 0
        with counted(label) as on_progress, trainer.precision_plugin.forward_context():

            def on_step() -> None:
                nonlocal done
                done += 1
                on_progress(done, steps)

            return draw_cells(
                pl_module.base,
                self.config.sample,
                self.cells,
                self.config.model.resolution,
                on_step,
            )

    def title(self) -> str:
        sample = self.config.sample
        return (
            f"{describe(self.config)}\n{sample.num_inference_steps} steps, "
            f"seeds {sample.seed} to {sample.seed + len(sample.prompts) - 1}, same start noise in a block"
        )


def log_grid(logger: WandbLogger, grid: Image.Image, caption: str, step: int) -> None:
    """Sends a grid to the dashboard."""
    logger.log_image("samples", [grid], step=step, caption=[caption])


def describe(config: Config) -> str:
    """A run's settings in a few words: `lora rank 32, guidance 1, lr 0.0005`."""
    what = {"lora": f"LoRA rank {config.lora.rank}", "full": "full fine-tuning", "none": "base"}
    words = [what[config.finetune]]
    if config.finetune != "none":
        words += [f"training guidance {config.loss.guidance:g}", f"lr {config.optimizer.lr:g}"]
    return ", ".join(words)


class Narrator(Callback):
    """The terminal: one bar over the whole run with loss and time left, one line an epoch."""

    def __init__(self, metrics: MetricsWriter):
        self.metrics, self.bar = metrics, None

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.bar = make_bar()
        self.bar.start()
        total = int(trainer.estimated_stepping_batches)
        self.task = self.bar.add_task("training", total=total, completed=trainer.global_step, note="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = next((row for row in reversed(self.metrics.rows) if row.get("train/loss")), None)
        note = f"epoch {trainer.current_epoch + 1}"
        if last:
            note += f"  loss {float(last['train/loss']):.4f}"
        self.bar.update(self.task, completed=trainer.global_step, note=note)

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if not trainer.is_global_zero:
            return
        console.print(f"epoch {trainer.current_epoch + 1}  {pl_module.gain}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.bar.refresh()

    def teardown(self, trainer: L.Trainer, pl_module: GhibliModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: GhibliModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


class StatusWriter(Callback):
    """Keeps status.json up to date while training."""

    def __init__(self, run: RunDir):
        self.run = run

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict) -> None:
        if trainer.is_global_zero:
            gain = pl_module.gain
            self.run.update_status(
                step=trainer.global_step, epoch=trainer.current_epoch, updated=now(),
                gain=gain.value if gain else None, gain_se=gain.standard_error if gain else None,
            )  # fmt: skip
