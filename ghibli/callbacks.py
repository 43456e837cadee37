"""What Lightning lacks to look at a run: sample grids, the doctor, plain words, status."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from ghibli import dashboard, doctor
from ghibli.checkpoints import between_steps
from ghibli.mistakes import UserMistake
from ghibli.module import GhibliModule, device_name
from ghibli.progress import console, counted, make_bar
from ghibli.provenance import now
from ghibli.records import Records
from ghibli.run_dir import RunDir
from ghibli.sampling import cells_of, compose_grid, draw_cells
from ghibli.schema import Config
from ghibli.tensor_cache import cached
from ghibli.validation import Diverged
from ghibli.whole_files import write_atomically


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
        sample, model = self.config.sample, self.config.model
        key = {
            "base": pl_module.base_hash, "device": device_name(trainer.strategy.root_device),
            "precision": str(trainer.precision),
            "cells": [asdict(cell) for cell in self.cells], "prompts": list(sample.prompts),
            "steps": sample.num_inference_steps, "seed": sample.seed, "resolution": model.resolution,
        }  # fmt: skip
        label = "drawing what the base makes of the prompts"
        folder = Path(self.config.cache_dir) / "base_grids"
        drawn = cached(folder, key, lambda: {"pictures": self.draw(trainer, pl_module, label)})
        self.base_pictures = drawn["pictures"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        epoch, every = trainer.current_epoch + 1, self.config.sample.every_n_epochs
        if self.base_pictures is not None and epoch % every == 0 and epoch < trainer.max_epochs:
            self.save(trainer, pl_module, f"epoch_{epoch:03d}", f"epoch {epoch}")

    def save(self, trainer: L.Trainer, pl_module: GhibliModule, name: str, label: str) -> Path:
        """Draws the model as it is now, writes samples/NAME.png and logs it; returns the file."""
        rows = [("base", self.base_pictures)]
        if self.config.finetune != "none":
            rows.append((label, self.draw(trainer, pl_module, f"drawing the grid of {label}")))
        columns = [cell.label for cell in self.cells]
        grid = compose_grid(rows, self.config.sample.prompts, columns, self.title())
        path = self.run.samples / f"{name}.png"
        write_atomically(path, lambda file: grid.save(file, format="PNG"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                dashboard.log_grid(logger, grid, label, trainer.global_step)
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


def describe(config: Config) -> str:
    """A run's settings in a few words: `lora rank 32, guidance 1, lr 0.0005`."""
    what = {"lora": f"LoRA rank {config.lora.rank}", "full": "full fine-tuning", "none": "base"}
    words = [what[config.finetune]]
    if config.finetune != "none":
        words += [f"training guidance {config.loss.guidance:g}", f"lr {config.optimizer.lr:g}"]
    return ", ".join(words)


class Doctor(Callback):
    """Looks at a run before it starts, before every optimiser step and after every epoch, and speaks up.

    Each finding is said once: in the terminal, in status.json, as an alert of the dashboard.
    """

    def __init__(self, config: Config, run: RunDir):
        self.config, self.run = config, run
        self.findings: list[doctor.Finding] = []

    def state_dict(self) -> dict[str, Any]:
        return {"findings": [vars(finding) for finding in self.findings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = [doctor.Finding(**stored) for stored in state_dict["findings"]]

    def on_fit_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        found = doctor.at_the_start(
            self.config, pl_module.alphas_cumprod, pl_module.base_alphas_cumprod, pl_module.trainable.values()
        )
        self.report(trainer, found)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: GhibliModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Stops before an update that would destroy the weights.

        In fp16 a gradient may overflow, and the scaler skips that step by itself; a loss may not.
        """
        if str(trainer.precision) == "16-mixed":
            losses = torch.cat([seen.losses for seen in pl_module.seen]).double().sum()
            found = trainer.strategy.reduce(losses, reduce_op="sum")
        else:
            gradients = [p.grad for p in pl_module.trainable.values() if p.grad is not None]
            found = torch.nn.utils.get_total_norm(gradients)
        if not found.isfinite():
            raise UserMistake(self.not_finite(trainer, pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: GhibliModule, exception: BaseException) -> None:
        if isinstance(exception, Diverged):
            self.report(trainer, [doctor.Finding("not finite", str(exception))], say=False)

    def not_finite(self, trainer: L.Trainer, pl_module: GhibliModule) -> str:
        names, timesteps, losses = map(list, zip(*seen_everywhere(pl_module), strict=True))
        text = doctor.not_finite(names, timesteps, losses, trainer.global_step, self.config.optimizer.lr)
        self.report(trainer, [doctor.Finding("not finite", text)], say=False)
        return text

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if between_steps(trainer, batch_idx):
            pl_module.seen.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.report(trainer, doctor.after_epoch(pl_module.history, self.config))

    def report(self, trainer: L.Trainer, found: list[doctor.Finding], say: bool = True) -> None:
        """Tells what has not been told before."""
        known = {finding.name for finding in self.findings}
        new = [finding for finding in found if finding.name not in known]
        self.findings += new
        if not trainer.is_global_zero:
            return
        self.run.update_status(findings=[vars(finding) for finding in self.findings])
        for finding in new:
            if say:
                console.print(f"doctor: {finding.name}: {finding.text}", style="yellow")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    dashboard.alert(logger, finding.name, finding.text)


def seen_everywhere(pl_module: GhibliModule) -> list[tuple[str, int, float]]:
    """(name, timestep, loss) of each example since the last optimiser step, of all devices."""
    here = [
        example
        for seen in pl_module.seen
        for example in zip(seen.names, seen.timesteps.tolist(), seen.losses.tolist(), strict=True)
    ]
    if pl_module.trainer.world_size == 1:
        return here
    everywhere: list = [None] * pl_module.trainer.world_size
    torch.distributed.all_gather_object(everywhere, here)
    return [example for examples in everywhere for example in examples]


class Narrator(Callback):
    """The terminal: one bar over the whole run with loss and time left, one line an epoch."""

    def __init__(self, records: Records):
        self.records, self.bar = records, None

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:
            self.say_start(pl_module)
        self.bar = make_bar()
        self.bar.start()
        total = int(trainer.estimated_stepping_batches)
        self.task = self.bar.add_task("training", total=total, completed=trainer.global_step, note="")

    def say_start(self, pl_module: GhibliModule) -> None:
        """Where a guided training starts; at guidance 1 that is the base itself, and zero."""
        guidance = pl_module.config.loss.guidance
        if guidance == 1:
            return
        start = pl_module.history[0]
        console.print(
            f"start    at guidance {guidance:g} the untouched base scores {start.val.mean():.2f}, at 1 "
            f"{start.base_val.mean():.2f}: guided, it is no predictor of the noise, so the gain starts at "
            f"{100 * start.val_gain.value:.0f} %"
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        note = f"epoch {trainer.current_epoch + 1}"
        if self.records.rows:
            note += f"  loss {float(self.records.rows[-1]['train/loss']):.4f}"
        self.bar.update(self.task, completed=trainer.global_step, note=note)

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if not trainer.is_global_zero or len(pl_module.history) < 2:
            return
        probe = pl_module.history[-1]
        train = f"(train {100 * probe.train_gain.value:.1f} %)"
        console.print(f"epoch {len(pl_module.history) - 1}  {probe.val_gain} {train}")

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
            gain = pl_module.history[-1].val_gain if len(pl_module.history) > 1 else None
            self.run.update_status(
                step=trainer.global_step, epoch=trainer.current_epoch, updated=now(),
                gain=gain.value if gain else None, gain_se=gain.standard_error if gain else None,
            )  # fmt: skip
