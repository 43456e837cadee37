"""Make the fixed (timestep, noise) items of the paired probe."""

from itertools import groupby

import torch

from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments
from ghibli.runtime.seeding import Stream, content_key, normal, rng


def strata(content_hash: str, items: int, num_train_timesteps: int) -> list[int]:
    """Return one timestep in each of `items` equal parts of 0 .. T-1; where in it depends on the content."""
    offsets = rng(Stream.PROBE, content_key(content_hash)).random(items)
    return [int((k + offset) * num_train_timesteps / items) for k, offset in enumerate(offsets)]


def make_items(
    images: list[CaptionedImage],
    moments: Moments,
    input_ids: torch.Tensor,
    *,
    items_per_image: int,
    num_train_timesteps: int,
    scaling_factor: float,
) -> list[dict[str, torch.Tensor]]:
    """Return a batch of K items for each image, with the tensors of a training batch.

    latents and noise are (K, 4, h, w) float32, timesteps (K,) and input_ids (K, L) int64.

    Args:
        images: P images.
        moments, input_ids: of the images, in their order; input_ids is (P, L).
        items_per_image: K.
        num_train_timesteps: T.
        scaling_factor: the VAE's.
    """
    batches = []
    for index, image in enumerate(images):
        shape = tuple(moments.mean[index].shape)
        keys = [(content_key(image.content_hash), k) for k in range(items_per_image)]
        latents = [
            moments.sample(index, normal(shape, Stream.POSTERIOR, *key), scaling_factor) for key in keys
        ]
        timesteps = strata(image.content_hash, items_per_image, num_train_timesteps)
        batch = {
            "latents": torch.stack(latents),
            "noise": torch.stack([normal(shape, Stream.NOISE, *key) for key in keys]),
            "timesteps": torch.tensor(timesteps),
            "input_ids": input_ids[index].expand(items_per_image, -1),
        }
        batches.append(batch)
    return batches


def in_passes(
    batches: list[dict[str, torch.Tensor]], rows: list[int], size: int
) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Divide some images into passes of up to `size` that follow each other and have one shape.

    A pass is (number of images, one batch of size x K items). Its last image fills it up, so that all
    passes are equally large: then rounding does not depend on which images share one.

    Args:
        batches: the items of all images, from make_items.
        rows: which images, in the order of their passes.
    """
    passes = []
    for _, alike in groupby(rows, key=lambda row: batches[row]["latents"].shape):
        same = list(alike)
        for start in range(0, len(same), size):
            chosen = same[start : start + size]
            filled = [*chosen, *chosen[-1:] * (size - len(chosen))]
            together = {key: torch.cat([batches[row][key] for row in filled]) for key in batches[chosen[0]]}
            passes.append((len(chosen), together))
    return passes
