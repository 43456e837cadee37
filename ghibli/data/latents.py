"""Image files -> pixel_values -> VAE posterior moments, encoded once before training and kept in memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ghibli.images.read import open_image
from ghibli.images.resize import preprocess
from ghibli.models.base import BaseModel
from ghibli.runtime.cache import Rows
from ghibli.runtime.errors import UserError

CHUNK = 8  # images encoded at once; always as many, so an image's moments never depend on the others
CHUNK_PIXELS = CHUNK * 256 * 256  # of larger images there are fewer


def chunk_size(resolution: int) -> int:
    """Return how many images of this resolution, px, are encoded at once: CHUNK up to 256 px."""
    return max(1, min(CHUNK, CHUNK_PIXELS // resolution**2))


@dataclass(frozen=True)
class Moments:
    """The VAE posterior q(z | image) = N(mean, exp(logvar)) of N images, unscaled.

    Kept instead of one sample of it, so that every training example is a fresh sample.
    """

    mean: Rows  # N of (4, H/8, W/8) float32; one tensor where all have one shape
    logvar: Rows  # like mean

    def of(self, images: Iterable[int]) -> "Moments":
        """Return the moments of some of the images, in this order."""
        rows = list(images)
        return Moments([self.mean[row] for row in rows], [self.logvar[row] for row in rows])

    def sample(self, index: int, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
        """Return scaled latents of one image, (4, H/8, W/8) float32: (mean + std noise) scaling_factor.

        Args:
            noise: standard normal, like mean[index].
        """
        deviation = torch.exp(0.5 * self.logvar[index])
        return (self.mean[index] + deviation * noise) * scaling_factor


@torch.no_grad()
def encode(
    base: BaseModel,
    paths: list[Path],
    *,
    resolution: int,
    resize: str,
    mirrored: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Moments:
    """Encode image files, in order, in fp32 on the VAE's device; the moments are on the CPU.

    Args:
        resolution: side of the square, px; a multiple of 8.
        resize: data.resize: squash, center_crop or bucket.
        mirrored: encode the images flipped left to right.
        on_progress: called with (images done, images in all) after each chunk.

    Raises:
        UserError: moments of an image that are not finite.
    """
    device = next(base.vae.parameters()).device
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    size = chunk_size(resolution)
    for start in range(0, len(paths), size):
        chunk = paths[start : start + size]
        found += encode_chunk(base, chunk, resolution, resize, mirrored, device)
        on_progress(len(found), len(paths))
    means, logvars = zip(*found, strict=True)
    if len({mean.shape for mean in means}) > 1:
        return Moments(means, logvars)
    return Moments(torch.stack(means), torch.stack(logvars))


def encode_chunk(
    base: BaseModel, paths: list[Path], resolution: int, resize: str, mirrored: bool, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encode a chunk of images as (mean, logvar), each (4, H/8, W/8); images of one shape run together."""
    values = [preprocess(open_image(path), resolution, resize) for path in paths]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for shape in dict.fromkeys(value.shape for value in values):
        rows = [row for row, value in enumerate(values) if value.shape == shape]
        padding = [torch.zeros(shape)] * (chunk_size(resolution) - len(rows))
        pixel_values = torch.stack([values[row] for row in rows] + padding)
        if mirrored:
            pixel_values = pixel_values.flip(-1)
        posterior = base.vae.encode(pixel_values.to(device)).latent_dist
        for position, row in enumerate(rows):
            mean = posterior.mean[position].cpu().clone()
            if not mean.isfinite().all():
                raise UserError(f"{paths[row]}: its latents are not finite: remove this image")
            found[row] = mean, posterior.logvar[position].cpu().clone()
    return [found[row] for row in range(len(paths))]
