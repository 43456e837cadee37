"""The fixed items that are scored every epoch, and what a score says about learning.

For each held-out picture K pairs (timestep, noise) follow from the picture's content alone:
stratified over the timesteps, the same in every epoch, run and machine. The base is scored on the
same items, so the difference is paired: the spread between timesteps and noises cancels out.
"""

from dataclasses import dataclass

import torch

from ghibli.captions import CaptionedPicture
from ghibli.latents import Moments
from ghibli.mistakes import UserMistake
from ghibli.randomness import Stream, content_key, normal, rng


@dataclass(frozen=True)
class Gain:
    """How much better than the base, as a share of the base's loss (0.25 = 25 %)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        word = "better" if self.value >= 0 else "WORSE"
        size = f"{abs(100 * self.value):.1f} % +- {100 * self.standard_error:.1f} %"
        return f"{word} than the base by {size} on held-out pictures"


def paired_gain(losses: torch.Tensor, base_losses: torch.Tensor) -> Gain:
    """1 - sum(losses) / sum(base_losses) with its jackknife standard error over pictures.

    Args:
        losses, base_losses: (P, K) of P pictures with K items each, on the same items.

    The standard error leaves out one picture at a time (Efron & Stein 1981); nan for one picture.
    """
    ours, base = losses.double().sum(1), base_losses.double().sum(1)
    value = 1 - ours.sum() / base.sum()
    count = len(ours)
    if count < 2:
        return Gain(value.item(), float("nan"))
    without_one = 1 - (ours.sum() - ours) / (base.sum() - base)
    variance = (count - 1) / count * (without_one - without_one.mean()).square().sum()
    return Gain(value.item(), variance.sqrt().item())


def require_finite(losses: torch.Tensor, epoch: int, lr: float) -> None:
    """Raises a UserMistake when a run has diverged: its losses (P, K) are not all finite."""
    if not losses.isfinite().all():
        raise UserMistake(
            f"the run diverged: the validation loss is not finite after epoch {epoch + 1}; start it again "
            f"with a lower learning rate (optimizer.lr was {lr:g}); best.ckpt is from before, if there is one"
        )


def strata(content_hash: str, items: int, num_train_timesteps: int) -> list[int]:
    """One timestep in each of `items` equal parts of 0 .. T-1, placed by the picture's content."""
    places = rng(Stream.PROBE, content_key(content_hash)).random(items)
    return [int((k + place) * num_train_timesteps / items) for k, place in enumerate(places)]


def make_chunks(
    pictures: list[CaptionedPicture],
    moments: Moments,
    input_ids: torch.Tensor,
    *,
    items_per_picture: int,
    chunk: int,
    num_train_timesteps: int,
    scaling_factor: float,
) -> list[dict[str, torch.Tensor]]:
    """All items of all pictures, picture by picture, in batches of exactly `chunk` items.

    The last batch is filled up with copies; a fixed size makes a score independent of any
    batch size. `input_ids` is (P, L); each batch has the keys of a training batch.
    """
    items = []
    for index, picture in enumerate(pictures):
        for k, t in enumerate(strata(picture.content_hash, items_per_picture, num_train_timesteps)):
            key = (content_key(picture.content_hash), k)
            shape = tuple(moments.mean.shape[1:])
            posterior_noise = normal(shape, Stream.POSTERIOR, *key)
            item = {
                "latents": moments.sample(index, posterior_noise, scaling_factor),
                "noise": normal(shape, Stream.NOISE, *key),
                "timesteps": torch.tensor(t),
                "input_ids": input_ids[index],
            }
            items.append(item)
    items += [items[-1]] * (-len(items) % chunk)
    return [
        {key: torch.stack([item[key] for item in items[start : start + chunk]]) for key in items[0]}
        for start in range(0, len(items), chunk)
    ]
