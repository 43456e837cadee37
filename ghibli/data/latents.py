"""Images -> pixel_values -> VAE posterior moments, made once before training and kept in memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ghibli.images.read import open_image
from ghibli.images.resize import preprocess
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

CHUNK = 8  # images encoded at once; always the same, so an image's code never depends on others


@dataclass(frozen=True)
class Moments:
    """The VAE posterior q(z | image) = N(mean, exp(logvar)) of N images, unscaled.

    Kept instead of one sample of it, so that training draws a new one for every example.
    """

    mean: Sequence[torch.Tensor]  # N of (4, H/8, W/8) float32; one tensor where all have one shape
    logvar: Sequence[torch.Tensor]  # like mean

    def of(self, images: Iterable[int]) -> "Moments":
        """Those of some of the images, in this order."""
        rows = list(images)
        return Moments([self.mean[row] for row in rows], [self.logvar[row] for row in rows])

    def sample(self, index: int, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
        """Scaled latents (4, H/8, W/8) of one image, drawn with `noise` of that shape."""
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
    """Encodes image files, in order, in fp32 on the device the VAE is on.

    Args:
        resolution: side of the square, px; a multiple of 8.
        mirrored: encode the images flipped left to right.
        on_progress: called with (images done, images in all) after each chunk.
    """
    device = next(base.vae.parameters()).device
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        found += encode_chunk(base, chunk, resolution, resize, mirrored, device)
        on_progress(len(found), len(paths))
    means, logvars = zip(*found, strict=True)
    if len({mean.shape for mean in means}) > 1:
        return Moments(means, logvars)
    return Moments(torch.stack(means), torch.stack(logvars))


def encode_chunk(
    base: BaseModel, paths: list[Path], resolution: int, resize: str, mirrored: bool, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean, logvar) of each of up to CHUNK images; those of one shape go through the VAE together."""
    values = [preprocess(open_image(path), resolution, resize) for path in paths]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for shape in dict.fromkeys(value.shape for value in values):
        rows = [row for row, value in enumerate(values) if value.shape == shape]
        padding = [torch.zeros(shape)] * (CHUNK - len(rows))
        pixel_values = torch.stack([values[row] for row in rows] + padding)
        if mirrored:
            pixel_values = pixel_values.flip(-1)
        posterior = base.vae.encode(pixel_values.to(device)).latent_dist
        for place, row in enumerate(rows):
            mean = posterior.mean[place].cpu().clone()
            if not mean.isfinite().all():
                raise UserError(f"{paths[row]}: the VAE makes no finite latents of it; take this image out")
            found[row] = mean, posterior.logvar[place].cpu().clone()
    return [found[row] for row in range(len(paths))]
