"""Make the fixed (timestep, noise) items of the paired probe."""

import torch

from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments
from ghibli.runtime.seeding import Stream, content_key, normal, rng

ITEMS_TOGETHER, SMALL = 16, 256  # items scored at once, for images up to so many pixels a side


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


def images_in_a_pass(resolution: int, items_per_image: int) -> int:
    """Return how many images are scored at once: small ones together, as a few items use a processor badly.

    It depends on nothing that a study compares: rounding may depend on it.
    """
    return max(1, ITEMS_TOGETHER // items_per_image) if resolution <= SMALL else 1


def items_in_a_pass(resolution: int, items_per_image: int) -> int:
    """Return how many items are scored at once."""
    return images_in_a_pass(resolution, items_per_image) * items_per_image


def in_passes(
    batches: list[dict[str, torch.Tensor]], rows: list[int], size: int
) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """Divide some images into passes of up to `size` images of one shape.

    A pass is (places of its images in `rows`, one batch of size x K items). Its last image fills it up, so
    that all passes are equally large: then rounding does not depend on which images share one.

    Args:
        batches: the items of all images, from make_items.
        rows: which images.
    """
    alike: dict[torch.Size, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(batches[row]["latents"].shape, []).append(place)
    passes = []
    for places in alike.values():
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            filled = [batches[rows[place]] for place in [*chosen, *chosen[-1:] * (size - len(chosen))]]
            passes.append((chosen, {key: torch.cat([one[key] for one in filled]) for key in filled[0]}))
    return passes
