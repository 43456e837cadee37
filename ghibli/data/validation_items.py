"""The fixed (timestep, noise) items of the paired probe."""

import torch

from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments
from ghibli.runtime.seeding import Stream, content_key, normal, rng


def strata(content_hash: str, items: int, num_train_timesteps: int) -> list[int]:
    """One timestep in each of `items` equal parts of 0 .. T-1, placed by the image's content."""
    places = rng(Stream.PROBE, content_key(content_hash)).random(items)
    return [int((k + place) * num_train_timesteps / items) for k, place in enumerate(places)]


def make_items(
    images: list[CaptionedImage],
    moments: Moments,
    input_ids: torch.Tensor,
    *,
    items_per_image: int,
    num_train_timesteps: int,
    scaling_factor: float,
) -> list[dict[str, torch.Tensor]]:
    """For each image one batch of its K items, with the keys of a training batch.

    Args:
        moments, input_ids: of the images, in their order; input_ids is (P, L).
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
