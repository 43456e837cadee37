"""A run's base with its adapter beside it, layer by layer, and the probe's items to score it on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ghibli.adapters.apply import adapter_name, load_adapters, put_factors
from ghibli.adapters.files import Adapter
from ghibli.adapters.layers import Layer
from ghibli.adapters.names import layer_paths
from ghibli.config.schema import Config, at_full_precision
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.sources import require_same_images
from ghibli.evaluation.slimming import LEAST, halves
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runs.status import read_json
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

NAME = adapter_name(0)


@dataclass
class LayerScorer:
    """Scores any choice of an adapter's layers as the run's probe does, on its held-out images."""

    module: GhibliModule  # without an adapter of its own
    guidance: float  # of the run's training
    batches: list[dict[str, torch.Tensor]]  # one of each held-out image, on the device
    halves: tuple[list[int], list[int]]  # of the images: those that choose, those that check
    targets: dict[str, Any]  # PEFT's layers, by the names of the adapter's
    present: dict[str, Layer] = field(default_factory=dict)  # what each of them holds

    @property
    def items(self) -> int:
        """Items of each image."""
        return len(self.batches[0]["timesteps"])

    def put(self, layers: dict[str, Layer]) -> None:
        """Change the adapter to these layers; those that are missing are as in the base, bit for bit."""
        for name, target in self.targets.items():
            layer = layers.get(name)
            if layer is not None and layer is not self.present[name]:
                put_factors(target, NAME, layer, name)
                self.present[name] = layer
            target.set_scale(NAME, 0.0 if layer is None else 1.0)

    @torch.no_grad()
    def losses(
        self,
        images: Sequence[int],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Return the scores (P, K) of some images: the MSE at a guidance, on the base's own schedule.

        Args:
            guidance: None = that of the training.

        Raises:
            UserError: a score is not finite.
        """
        scale = self.guidance if guidance is None else guidance
        found = []
        for done, image in enumerate(images, start=1):
            scores = self.module.scores(self.batches[image], scale, self.module.base_alphas_cumprod)
            found.append(scores[0].float().cpu())
            on_progress(done, len(images))
        losses = torch.stack(found)
        if not losses.isfinite().all():
            raise UserError("a loss on the held-out images is not finite: look at the weights (ghibli check)")
        return losses


def make_scorer(run: RunDir, config: Config, base: BaseModel, adapter: Adapter) -> LayerScorer:
    """Read the held-out images of a run, and put its adapter beside its base.

    Args:
        base: the untouched base; it is changed in place.

    Raises:
        UserError: other images than in training, or fewer than 5 for each half.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = GhibliModule(replace(at_full_precision(config), finetune="none"), base).eval()
    data = GhibliDataModule(config, base, run, module.num_train_timesteps)
    data.prepare_data()
    check_images(run, data)
    parts = halves([image.content_hash for image in data.val_images])
    if min(map(len, parts)) < LEAST:
        raise UserError(
            f"{run.path}: {len(data.val_images)} held-out images are too few, as {LEAST} have to choose and "
            f"{LEAST} others to check; train with more (data.val_fraction={config.data.val_fraction:g}, "
            f"validation.max_images={config.validation.max_images})"
        )
    batches = data.held_out_items(device)
    load_adapters(base, [(adapter, 1.0)])
    module.to(device)
    paths = layer_paths(base)
    targets = {
        name: base.adaptable[part].get_submodule(path)
        for name, (part, path) in paths.items()
        if name in adapter.layers
    }
    on_device = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
    return LayerScorer(module, config.loss.guidance, on_device, parts, targets, dict(adapter.layers))


def check_images(run: RunDir, data: GhibliDataModule) -> None:
    """Check by content that the images are those of the run, and that it held out what is held out now.

    Raises:
        UserError: they are others.
    """
    require_same_images(data.read().images, run.status.read().get("data_hash"), data.config.data.root)
    try:
        trained = set(read_json(run.split)["train"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{run.path}: its split.json is missing or damaged, and it alone tells which images were held out"
        ) from None
    for image in data.val_images:
        if image.content_hash in trained:
            raise UserError(
                f"{run.path}: {image.path} would be held out today, but it was trained with: train anew"
            )
