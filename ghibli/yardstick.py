"""What sampled pictures are measured with: picture features, caption fit, and the reference set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import CLIPImageProcessor, CLIPModel

from ghibli import features
from ghibli.base_model import BaseModel, first_line, part_hash, place_of, quiet, weights_hash
from ghibli.metrics import frechet_distance, kernel_difference, kernel_distance
from ghibli.mistakes import UserMistake
from ghibli.schema import Config
from ghibli.validation import Estimate


class Yardstick:
    """The configured feature network and CLIP, loaded once.

    Args:
        base: an untouched base; its VAE gives the style features.

    Raises:
        UserMistake: weights that are not at hand.
    """

    def __init__(self, config: Config, base: BaseModel):
        self.base, self.kind = base, config.evaluate.features
        self.clip = load_clip(config.model.clip)
        self.hashes = {"features": self.kind, "vae": weights_hash(base)}  # of all that measures
        self.hashes["clip"] = None if self.clip is None else part_hash(self.clip[0])
        if self.kind == "inception":
            network = features.load_inception(config.evaluate.inception).to(base.vae.device)
            self.hashes["inception"] = part_hash(network)
            self._extract: Callable = lambda batch: features.inception_features(network, batch)
        else:
            self._extract = lambda batch: features.style_features(base.vae, batch)

    def measure(self, pictures: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        """Features (N, D) and, with a CLIP, caption_fit (N,), of pictures (N, 3, H, W) in 0 .. 1."""
        measured = {"features": features.in_batches(self._extract, pictures)}
        if self.clip is not None:
            measured["caption_fit"] = self._caption_fit(pictures, captions)
        return measured

    @torch.no_grad()
    def _caption_fit(self, pictures: torch.Tensor, captions: list[str]) -> torch.Tensor:
        clip, processor = self.clip
        scores = []
        for start in range(0, len(pictures), features.BATCH):
            part = slice(start, start + features.BATCH)
            levels = (pictures[part] * 255).round().to(torch.uint8)
            pixel_values = processor(images=list(levels), return_tensors="pt")["pixel_values"]
            scores.append(features.clip_similarity(clip, pixel_values, self.base.tokenize(captions[part])))
        return torch.cat(scores)


def load_clip(place: str | None) -> tuple[CLIPModel, CLIPImageProcessor] | None:
    """The CLIP model of `model.clip` and its picture preparation; None without one.

    Raises:
        UserMistake: it is not there.
    """
    if place is None:
        return None
    folder = place_of(place)
    name = folder if folder.is_dir() else place
    try:
        with quiet("transformers"):
            return CLIPModel.from_pretrained(name).eval(), CLIPImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserMistake(
            f"model.clip={place} cannot be loaded ({first_line(error)}): give a folder, or model.clip=null"
        ) from error


@dataclass(frozen=True)
class Reference:
    """Real pictures to compare with, and the units of the distances to them."""

    own: torch.Tensor  # (M, D) features as they came
    standardise: bool  # style features: in units of the reference's spread; FID and KID want them raw

    def units(self, rows: torch.Tensor) -> torch.Tensor:
        """Features (N, D) in the units in which distances are taken."""
        return features.standardised(rows, self.own) if self.standardise else rows

    def kernel(self, rows: torch.Tensor) -> Estimate:
        """Kernel distance of features (N, D) to the reference."""
        return kernel_distance(self.units(rows), self.units(self.own))

    def difference(self, rows: torch.Tensor, others: torch.Tensor) -> Estimate:
        """Kernel distance of one model's features (N, D) minus that of another's, paired."""
        return kernel_difference(self.units(rows), self.units(others), self.units(self.own))

    def frechet(self, rows: torch.Tensor) -> float:
        """Frechet distance of features (N, D) to the reference."""
        return frechet_distance(self.units(rows), self.units(self.own))
