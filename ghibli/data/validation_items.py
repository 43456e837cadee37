"""The fixed (timestep, noise) items of the paired probe."""

import torch

from ghibli.data.folder import CaptionedPicture
from ghibli.data.latents import Moments
from ghibli.runtime.seeding import Stream, content_key, normal, rng


def strata(content_hash: str, items: int, num_train_timesteps: int) -> list[int]:
    """One timestep in each of `items` equal parts of 0 .. T-1, placed by the picture's content."""
    places = rng(Stream.PROBE, content_key(content_hash)).random(items)
    return [int((k + place) * num_train_timesteps / items) for k, place in enumerate(places)]


def make_items(
    pictures: list[CaptionedPicture],
    moments: Moments,
    input_ids: torch.Tensor,
    *,
    items_per_picture: int,
    num_train_timesteps: int,
    scaling_factor: float,
) -> list[dict[str, torch.Tensor]]:
    """For each picture one batch of its K items, with the keys of a training batch.

    Args:
        moments, input_ids: of the pictures, in their order; input_ids is (P, L).
    """
    batches = []
    for index, picture in enumerate(pictures):
        shape = tuple(moments.mean[index].shape)
        keys = [(content_key(picture.content_hash), k) for k in range(items_per_picture)]
        latents = [
            moments.sample(index, normal(shape, Stream.POSTERIOR, *key), scaling_factor) for key in keys
        ]
        timesteps = strata(picture.content_hash, items_per_picture, num_train_timesteps)
        batch = {
            "latents": torch.stack(latents),
            "noise": torch.stack([normal(shape, Stream.NOISE, *key) for key in keys]),
            "timesteps": torch.tensor(timesteps),
            "input_ids": input_ids[index].expand(items_per_picture, -1),
        }
        batches.append(batch)
    return batches
