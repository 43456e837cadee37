"""Make the fixed (timestep, noise) items of the paired probe."""

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
