"""Pictures -> pixel_values -> VAE posterior moments, made once before training and kept in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ghibli.base_model import BaseModel
from ghibli.captions import open_picture
from ghibli.mistakes import UserMistake

CHUNK = 8  # pictures encoded at once; always the same, so a picture's code never depends on others


@dataclass(frozen=True)
class Moments:
    """The VAE posterior q(z | picture) = N(mean, exp(logvar)) of N pictures, unscaled.

    Kept instead of one sample of it, so that training draws a new one for every example.
    """

    mean: torch.Tensor  # (N, 4, H/8, W/8) float32
    logvar: torch.Tensor  # like mean

    def sample(self, index: int, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
        """Scaled latents (4, H/8, W/8) of one picture, drawn with `noise` of that shape."""
        deviation = torch.exp(0.5 * self.logvar[index])
        return (self.mean[index] + deviation * noise) * scaling_factor


def preprocess(picture: Image.Image, resolution: int, resize: str) -> torch.Tensor:
    """RGB picture -> pixel_values (3, resolution, resolution), float32 in -1 .. 1.

    `squash` scales both sides to the square as the slides' Resize((512, 512)) does; `center_crop`
    scales the shorter side and cuts the middle. Lanczos, antialiased.
    """
    size = (resolution, resolution)
    if resize == "squash":
        square = picture.resize(size, Image.Resampling.LANCZOS)
    else:
        square = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    values = np.asarray(square, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


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
    """Encodes picture files, in order, in fp32 on the device the VAE is on.

    Args:
        resolution: side of the square, px; a multiple of 8.
        mirrored: encode the pictures flipped left to right.
        on_progress: called with (pictures done, pictures in all) after each chunk.
    """
    device = next(base.vae.parameters()).device
    means, logvars = [], []
    for start in range(0, len(paths), CHUNK):
        chunk = [preprocess(open_picture(path), resolution, resize) for path in paths[start : start + CHUNK]]
        padding = [torch.zeros_like(chunk[0])] * (CHUNK - len(chunk))
        pixel_values = torch.stack(chunk + padding)
        if mirrored:
            pixel_values = pixel_values.flip(-1)
        posterior = base.vae.encode(pixel_values.to(device)).latent_dist
        for path, mean in zip(paths[start : start + CHUNK], posterior.mean, strict=False):
            if not mean.isfinite().all():
                raise UserMistake(f"{path}: the VAE makes no finite latents of it; take this picture out")
        means.append(posterior.mean[: len(chunk)].cpu())
        logvars.append(posterior.logvar[: len(chunk)].cpu())
        on_progress(min(start + CHUNK, len(paths)), len(paths))
    return Moments(torch.cat(means), torch.cat(logvars))
