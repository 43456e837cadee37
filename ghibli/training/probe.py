"""The paired probe in training: fixed items, scored by the base once and by the model every epoch.

What a score means is in `ghibli.evaluation.gain`; which items there are, in `ghibli.data.validation_items`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch

from ghibli.config.schema import Config
from ghibli.data.validation_items import in_passes
from ghibli.evaluation.gain import Diverged, Probe, expected_losses, significant_best
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.resources import device_name
from ghibli.training.base_scores import cached_scores


class Scorer(Protocol):
    """What the probe asks of a module."""

    trainer: L.Trainer
    device: torch.device
    transfer_batch_to_device: Callable[..., dict[str, Any]]
    base_alphas_cumprod: torch.Tensor
    alphas_cumprod: torch.Tensor

    def scores(self, batch: dict[str, Any], guidance: float, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Return the losses of a probe batch, (2, K)."""


class PairedProbe:
    """The scores of one run: the untouched base's, then the model's after every epoch.

    Args:
        config: the run's configuration.
        base_hash: results_key of the untouched base, under which its scores are cached.

    P held-out and Q training images and R groups of what the base was made for have K items each; scores
    are (P + Q + R, 2, K): at the training guidance, and of the conditional branch alone.
    """

    def __init__(self, config: Config, base_hash: str):
        self.config, self.base_hash = config, base_hash
        self.history: list[Probe] = []  # of the untouched model, then after every epoch
        self.base_losses = torch.empty(0)  # (P + Q + R, K) of the base at guidance 1
        self.expected = torch.empty(0)  # (T,): what the base is expected to score at each timestep
        self._scores: dict[int, torch.Tensor] = {}  # place among this device's images -> (2, K)

    def score_untouched(self, module: Scorer, stage: str) -> None:
        """Score the still untouched base, or read that from the cache: the reference of every gain.

        Raises:
            UserError: the base's own loss is not finite.
        """
        guidance, own = self.config.loss.own_guidance, module.base_alphas_cumprod
        self.base_losses = self._score_base(module, 1, own)[:, 0]
        start_scores = self._score_base(module, guidance, own)
        on_training_schedule = self._score_base(module, guidance, module.alphas_cumprod)[:, 0]
        of_style = module.trainer.datamodule.probe_batches
        timesteps = torch.cat([batch["timesteps"] for batch in of_style])
        losses = on_training_schedule[: len(of_style)].flatten()
        expected = expected_losses(timesteps, losses, len(module.alphas_cumprod))
        self.expected = expected.to(module.device)
        start = self.probe_of(start_scores, module.trainer.datamodule)
        if start.broken:
            name, _ = named_items(start.broken, module.trainer.datamodule)[0]
            raise UserError(
                f"the untouched base itself has a loss that is not finite, on {name} for one: use "
                "trainer.precision=32-true, and look at the base's weights (ghibli check)"
            )
        if stage == "fit":
            self.history = [start]

    def begin_epoch(self) -> None:
        """Forget the scores of the epoch before."""
        self._scores = {}

    def add(self, scores: torch.Tensor, places: list[int]) -> None:
        """Add the scores of a pass, (2, images x K), whose images have these places among this device's."""
        self._scores.update(self.by_image(scores, places))

    def by_image(self, scores: torch.Tensor, places: list[int]) -> dict[int, torch.Tensor]:
        """Return the scores of a pass, (2, images x K), as place -> (2, K), without what filled it up."""
        by_image = scores.unflatten(1, (-1, self.config.validation.items_per_image)).transpose(0, 1)
        return dict(zip(places, by_image, strict=False))

    def collected(self) -> torch.Tensor:
        """Return the scores of all of this device's images in their order, (images, 2, K)."""
        return torch.stack([self._scores[place] for place in sorted(self._scores)])

    def end_epoch(self, module: L.LightningModule) -> dict[str, float]:
        """Add a Probe to the history; return what early stopping and the best checkpoint go by.

        Raises:
            Diverged: a score is not finite.
        """
        data = module.trainer.datamodule
        probe = self.probe_of(gather(module, self.collected()).cpu(), data)
        if probe.broken:
            items = named_items(probe.broken, data)
            raise Diverged(items, len(self.history), self.config.optimizer.lr)
        self.history.append(probe)
        least = self.config.early_stopping.min_improvement
        return {
            "probe/val_gain": probe.val_gain.value,
            "probe/significant_best": significant_best(self.history, least).value,
        }

    def probe_of(self, scores: torch.Tensor, data: Any) -> Probe:
        """Pair the scores of the whole probe, (P + Q + R, 2, K), with the base's."""
        held_out, of_style = len(data.val_images), len(data.probe_images)
        return Probe(
            val=scores[:held_out, 0], val_g1=scores[:held_out, 1], train=scores[held_out:of_style, 0],
            base_val=self.base_losses[:held_out], base_train=self.base_losses[held_out:of_style],
            price=scores[of_style:, 0], base_price=self.base_losses[of_style:],
        )  # fmt: skip

    def state(self) -> list[dict[str, Any]]:
        """Return the history as a checkpoint stores it."""
        return [vars(probe) for probe in self.history]

    def restore(self, stored: list[dict[str, Any]]) -> None:
        """Take the history from a checkpoint."""
        self.history = [Probe(**probe) for probe in stored]

    def _score_base(self, module: Scorer, guidance: float, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Return the base's scores on the whole probe, (P + Q + R, 2, K), from the cache where known.

        With several devices the first one scores and tells the others.
        """
        trainer = module.trainer
        data: Any = trainer.datamodule
        if not trainer.is_global_zero:
            return trainer.strategy.broadcast(None)
        settings = {
            "version": 1,  # to be raised when the probe's items or the scoring change
            "base": self.base_hash, "guidance": float(guidance), "resolution": self.config.model.resolution,
            "resize": self.config.data.resize, "items": self.config.validation.items_per_image,
            "schedule": hashlib.sha256(alphas_cumprod.cpu().numpy().tobytes()).hexdigest()[:16],
            "precision": str(trainer.precision), "device": device_name(module.device),
            "torch": torch.__version__,
        }  # fmt: skip
        if data.images_in_a_pass != 1:  # rounding may depend on it
            settings["images_in_a_pass"] = data.images_in_a_pass
        if self.config.model.frozen_bits is not None:
            settings["frozen_bits"] = self.config.model.frozen_bits
        folder, batches = Path(self.config.cache_dir) / "base_scores", data.scored_batches
        with counted("scoring the base") as on_progress, trainer.precision_plugin.forward_context():

            def score(rows: list[int]) -> torch.Tensor:
                found: dict[int, torch.Tensor] = {}
                for places, items in in_passes(batches, rows, data.images_in_a_pass):
                    batch = module.transfer_batch_to_device(items, module.device, 0)
                    found |= self.by_image(module.scores(batch, guidance, alphas_cumprod).cpu(), places)
                    on_progress(len(found), len(rows))
                return torch.stack([found[place] for place in range(len(rows))])

            return trainer.strategy.broadcast(cached_scores(folder, settings, data.scored_images, score))


def named_items(images: list[int], data: Any) -> list[tuple[str, list[int]]]:
    """Return (file name, timesteps) of images of the probe, by index."""
    return [(data.scored_images[i].path.name, data.scored_batches[i]["timesteps"].tolist()) for i in images]


def gather(module: L.LightningModule, scores: torch.Tensor) -> torch.Tensor:
    """Put together (P + Q + R, 2, K) of the probe from each device's share; see dataset.share_of_probe."""
    if module.trainer.world_size == 1:
        return scores
    shares = module.all_gather(scores)  # (devices, images each, 2, K)
    return shares.transpose(0, 1).flatten(0, 1)[: len(module.trainer.datamodule.scored_batches)]
