"""A run's base with layers of its adapter merged into it, and the probe's items to score it on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ghibli.adapters.apply import change_of
from ghibli.adapters.files import Adapter
from ghibli.adapters.layers import Layer
from ghibli.adapters.names import named_layers
from ghibli.config.schema import Config, at_full_precision
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.sources import require_same_images
from ghibli.evaluation.slimming import LEAST, halves
from ghibli.models.base import BaseModel
from ghibli.models.performance import PromptEmbeds
from ghibli.runs.folder import RunDir
from ghibli.runs.status import read_json
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

AT_ONCE = 2**14  # latent pixels in one batch of the UNet: 64 of the demo's items, 4 of Stable Diffusion 1.5's


@dataclass
class LayerScorer:
    """Scores any choice of an adapter's layers as the run's probe does, on its held-out images."""

    module: GhibliModule  # without an adapter of its own
    guidance: float  # of the run's training
    batches: list[dict[str, torch.Tensor]]  # one of each held-out image, on the device
    halves: tuple[list[int], list[int]]  # of the images: those that choose, those that check
    weights: dict[str, torch.nn.Parameter]  # of the adapter's layers, by name
    untouched: dict[str, torch.Tensor]  # copies of them
    present: dict[str, Layer] = field(default_factory=dict)  # what is merged into them

    @property
    def items(self) -> int:
        """Items of each image."""
        return len(self.batches[0]["timesteps"])

    @torch.no_grad()
    def put(self, layers: dict[str, Layer]) -> None:
        """Merge these layers into the base's weights; all others are as in the base, bit for bit."""
        for name, weight in self.weights.items():
            layer, before = layers.get(name), self.present.get(name)
            if layer is before:
                continue
            weight.copy_(self.untouched[name])
            if layer is None:
                del self.present[name]
            else:
                weight.add_(change_of(layer, self.untouched[name], 1.0, name))
                self.present[name] = layer
            if name.startswith("text_encoder."):
                self.module.known_prompts = None  # the captions are encoded again

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
        if self.module.known_prompts is None:
            captions = torch.cat([self.module.empty_ids, *(batch["input_ids"] for batch in self.batches)])
            self.module.known_prompts = PromptEmbeds(self.module.base, captions, lambda done, total: None)
        found: list[torch.Tensor] = []
        for chunk in self.chunks(images, branches=1 if scale == 1 else 2):
            batches = [self.batches[image] for image in chunk]
            together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            scores = self.module.scores(together, scale, self.module.base_alphas_cumprod)
            found += scores[0].float().cpu().reshape(len(chunk), -1)
            on_progress(len(found), len(images))
        losses = torch.stack(found)
        if not losses.isfinite().all():
            raise UserError("a loss on the held-out images is not finite: look at the weights (ghibli check)")
        return losses

    def chunks(self, images: Sequence[int], branches: int) -> Iterator[Sequence[int]]:
        """Split images in groups that the UNet takes at once.

        Args:
            branches: predictions for each item, 2 with guidance.
        """
        area = self.batches[0]["latents"][0, 0].numel()
        size = max(1, AT_ONCE // (area * self.items * branches))
        for start in range(0, len(images), size):
            yield images[start : start + size]


def make_scorer(run: RunDir, config: Config, base: BaseModel, adapter: Adapter) -> LayerScorer:
    """Read the held-out images of a run, with nothing merged into its base yet.

    Args:
        base: the untouched base; it is changed in place.

    Raises:
        UserError: other images than in training, or fewer than 5 for each half.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = GhibliModule(replace(at_full_precision(config), finetune="none", seeds=1), base).eval()
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
    module.to(device)
    known = named_layers(base)
    weights = {name: known[name].weight for name in adapter.layers}
    untouched = {name: weight.detach().clone() for name, weight in weights.items()}
    on_device = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
    return LayerScorer(module, config.loss.own_guidance, on_device, parts, weights, untouched)


def check_images(run: RunDir, data: GhibliDataModule) -> None:
    """Check by content that the images are those of the run, and that it held out what is held out now.

    Raises:
        UserError: they are others.
    """
    require_same_images(data.read().images, run.status.read().get("data_hash"), data.config.data)
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
