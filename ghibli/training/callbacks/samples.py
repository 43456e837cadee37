"""Sample grids while training: prompts x samplers x guidance, the base above, the adapter below."""

import logging
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ghibli.adapters.lora import without_adapters
from ghibli.config.schema import Config, describe
from ghibli.diffusion.samplers import NotFinite, cells_of, draw_cells, steps_key
from ghibli.images.grid import compose_grid
from ghibli.runs.folder import RunDir
from ghibli.runtime.cache import cached
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_atomically
from ghibli.runtime.resources import device_name
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)


class SampleGrid(Callback):
    """Draw prompts x samplers x guidance, below the untouched base, from the same noise.

    After the first epoch, for a look at what is learned, and then every n epochs.
    """

    def __init__(self, config: Config, run: RunDir):
        self.config, self.run = config, run
        self.cells = cells_of(config.sample, config.loss.own_guidance)
        self.base_images: torch.Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: GhibliModule, stage: str) -> None:
        """Draw the untouched base; Lightning restores a checkpoint only after this."""
        if self.config.sample.every_n_epochs == 0 or not trainer.is_global_zero:
            return
        pl_module.to(trainer.strategy.root_device)
        sample, model = self.config.sample, self.config.model
        key = {
            "base": pl_module.results_key, "device": device_name(trainer.strategy.root_device),
            "precision": str(trainer.precision),
            "cells": [asdict(cell) for cell in self.cells], "prompts": list(sample.prompts),
            "steps": steps_key(pl_module.base, sample.num_inference_steps),
            "seed": sample.seed, "resolution": model.resolution,
            "kept": "images",  # what the file holds; older versions kept another name
        }  # fmt: skip
        label = "sampling the base"
        folder = Path(self.config.cache_dir) / "base_grids"
        try:
            with without_adapters(pl_module.base):
                drawn = cached(folder, key, lambda: {"images": self.draw(trainer, pl_module, label)})
            self.base_images = drawn["images"]
        except NotFinite as error:  # in 16 bits, say: training goes on without grids
            logger.warning(f"no sample grids: {error}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if self.base_images is None:  # no grids are wanted
            return
        epoch = trainer.current_epoch + 1
        is_due = epoch == 1 or epoch % self.config.sample.every_n_epochs == 0
        if is_due and epoch < trainer.max_epochs:
            try:
                self.save(trainer, pl_module, f"epoch_{epoch:03d}", f"epoch {epoch}")
            except NotFinite as error:
                logger.warning(f"no sample grid of epoch {epoch}: {error}")

    def save(self, trainer: L.Trainer, pl_module: GhibliModule, name: str, label: str) -> Path:
        """Draw the model as it is now, write samples/NAME.png and log it; return the file."""
        assert self.base_images is not None, "setup has drawn the base"
        rows = [("base", self.base_images)]
        if self.config.finetune != "none":
            rows.append((label, self.draw(trainer, pl_module, f"sampling the grid of {label}")))
        columns = [cell.label for cell in self.cells]
        grid = compose_grid(rows, self.config.sample.prompts, columns, self.title())
        path = self.run.samples / f"{name}.png"
        write_atomically(path, lambda file: grid.save(file, format="PNG"))
        for dashboard in trainer.loggers:
            dashboard.log_image("samples", grid, label, trainer.global_step)
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
