"""The distance of sampled images to real ones, epoch by epoch."""

import logging
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ghibli.config.schema import Config
from ghibli.data.sources import real_images
from ghibli.diffusion.samplers import in_eval_mode, own_cell
from ghibli.evaluation.features import UNIT_IMAGES, FeatureExtractor, ReferenceSet, distance_names
from ghibli.evaluation.samples import SampleCache
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_rows
from ghibli.training.callbacks.metrics import log
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)

COLUMNS = ("step", "epoch", "evaluate/kernel_distance", "evaluate/kernel_distance_se")


class DistanceCurve(Callback):
    """Sample the untouched base, then the model every n epochs; write distance.csv and log it.

    Prompts and start noise are the same every time, so the points compare. The cell is at a guided
    run's own scale, and for all others and the base at the last of sample.guidance. Training is not
    affected: no global random state is used.
    """

    def __init__(self, config: Config, run: RunDir):
        self.config, self.run, self.options = config, run, config.evaluate
        self.cell = own_cell(config.sample, config.loss.own_guidance)
        self.base_cell = own_cell(config.sample, 1)  # the base is not guided by its training
        self.rows: list[dict[str, float]] = []
        self.sample_cache: SampleCache | None = None
        self.reference: ReferenceSet | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if trainer.is_global_zero and not self.rows:
            self.measure(trainer, pl_module, epoch=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero and epoch % self.options.every_n_epochs == 0:
            self.measure(trainer, pl_module, epoch)

    def measure(self, trainer: L.Trainer, module: GhibliModule, epoch: int) -> None:
        """Add a point to the curve."""
        if self.sample_cache is None or self.reference is None:
            self.sample_cache, self.reference = self.measure_real(module)
        cell = self.base_cell if epoch == 0 else self.cell
        with in_eval_mode(module.base):
            sampled = self.sample_cache.measure_model(module.base, cell, self.options.epoch_samples)
        distance = self.reference.kernel(sampled["features"])
        values = (trainer.global_step, epoch, distance.value, distance.standard_error)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        write_rows(self.run.distances, COLUMNS, self.rows)
        log(trainer, self.rows[-1])
        beside = "" if self.cell == self.base_cell else f" in {self.base_cell.label}"
        base = "" if epoch == 0 else f", base {self.rows[0][COLUMNS[2]]:.2f}{beside}"
        who = "base   " if epoch == 0 else f"epoch {epoch}"
        name, _ = distance_names(self.options.features)
        logger.info(
            f"{who}  {name} {distance.value:.2f} +- {distance.standard_error:.2f} to real images "
            f"({self.options.epoch_samples} drawn, {cell.label}{base})"
        )

    def measure_real(self, module: GhibliModule) -> tuple[SampleCache, ReferenceSet]:
        """Measure the real images; return the cache that holds them and the reference set they make."""
        images, training = real_images(self.config, self.run)
        plain = replace(self.config, model=replace(self.config.model, clip=None))
        extractor = FeatureExtractor(plain, module.base)
        cache = SampleCache(plain, extractor, [image.caption for image in images])
        own = cache.measure_real("measuring the reference", images)["features"]
        if self.options.features != "style":
            return cache, ReferenceSet(own, None)
        units = cache.measure_real("measuring training images", training[:UNIT_IMAGES])
        return cache, ReferenceSet(own, units["features"])
