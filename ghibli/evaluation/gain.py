"""The paired gain on held-out images: whether scores on fixed items show learning."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ghibli.evaluation.statistics import Estimate, crossed_mean
from ghibli.runtime.errors import UserError


@dataclass(frozen=True)
class Gain(Estimate):
    """How far a loss is below a reference's, as a share of the latter (0.25 = 25 %)."""

    @property
    def size(self) -> str:
        """`4.1 % +- 0.3 %` without a sign; without the error where one image gives none."""
        error = "" if math.isnan(self.standard_error) else f" +- {100 * self.standard_error:.1f} %"
        return f"{abs(100 * self.value):.1f} %{error}"

    @property
    def signed_size(self) -> str:
        """`size` with a minus sign for a loss above the reference's; `-` for NaN."""
        if math.isnan(self.value):
            return "-"
        return f"{'' if self.value >= 0 else '-'}{self.size}"

    def __str__(self) -> str:
        word = "better" if self.value >= 0 else "WORSE"
        return f"{word} than the base by {self.size} on held-out images"


def paired_gain(losses: torch.Tensor, base_losses: torch.Tensor) -> Gain:
    """Compute 1 - sum(losses) / sum(base_losses) with its jackknife standard error over images.

    Args:
        losses, base_losses: (P, K) of P images with K items each, on the same items.

    The standard error leaves out one image at a time (Efron & Stein 1981); it is NaN for one image.
    """
    return mean_gain(losses.double().sum(1, keepdim=True), base_losses.double().sum(1, keepdim=True))


def mean_gain(losses: torch.Tensor, base_losses: torch.Tensor) -> Gain:
    """Compute the mean over K columns of 1 - sum(losses) / sum(base_losses), with its jackknife error.

    So every column counts alike, however small its losses are. The standard error is over images, as that
    of paired_gain.

    Args:
        losses, base_losses: (P, K) of P images.
    """
    ours, base = losses.double(), base_losses.double()
    value = (1 - ours.sum(0) / base.sum(0)).mean()
    count = len(ours)
    if count < 2:
        return Gain(value.item(), float("nan"), freedom=0)
    without_one = (1 - (ours.sum(0) - ours) / (base.sum(0) - base)).mean(1)
    variance = (count - 1) / count * (without_one - without_one.mean()).square().sum()
    return Gain(value.item(), variance.sqrt().item(), freedom=count - 1)


def gain_over_seeds(losses: torch.Tensor, base_losses: torch.Tensor) -> Gain:
    """Compute the mean gain of trainings with S seeds, with its error over seeds and images together.

    So the interval holds what another seed and other held-out images would give. The gain is a ratio of sums;
    its jackknife pseudo-values (Tukey 1958) of every seed and image are the table for crossed_mean, so seeds
    that agree have the error of paired_gain.

    Args:
        losses: (S, P, K) of P images with K items each.
        base_losses: (P, K) of the base, the same for all seeds.
    """
    ours, base = losses.double().sum(2), base_losses.double().sum(1)
    gains, count = 1 - ours.sum(1, keepdim=True) / base.sum(), len(base)
    without_one = 1 - (ours.sum(1, keepdim=True) - ours) / (base.sum() - base)
    found = crossed_mean(count * gains - (count - 1) * without_one)
    return Gain(gains.mean().item(), found.standard_error, freedom=found.freedom)


def paired_difference(losses: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """Compute the mean of losses - others, both (P, K), and its standard error over images.

    The standard error is NaN for one image.
    """
    difference = (losses.double() - others.double()).mean(1)
    if len(difference) < 2:
        return difference.mean().item(), float("nan")
    return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()


@dataclass(frozen=True)
class Probe:
    """A model's losses on the fixed items, beside those of the untouched base at guidance 1."""

    val: torch.Tensor  # (P, K) held-out images, at the training guidance
    val_g1: torch.Tensor  # (P, K) the same at guidance 1: the conditional branch alone
    train: torch.Tensor  # (Q, K) a fixed part of the training images, at the training guidance
    base_val: torch.Tensor  # (P, K) the base at guidance 1
    base_train: torch.Tensor  # (Q, K)
    price: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    # (R, K) what the base was made for, at the training guidance; R = 0 where that is not measured
    base_price: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (R, K)

    @property
    def val_gain(self) -> Gain:
        """The gain over the base on held-out images."""
        return paired_gain(self.val, self.base_val)

    @property
    def train_gain(self) -> Gain:
        """The gain over the base on training images."""
        return paired_gain(self.train, self.base_train)

    @property
    def forgotten(self) -> Gain | None:
        """The price: how far the loss on what the base was made for is above the base's; None = not measured.

        A share of the base's loss, like the gain, with the opposite sign: 0.04 = 4 % above.
        """
        if not self.price.numel():
            return None
        gain = paired_gain(self.price, self.base_price)
        return replace(gain, value=0.0 - gain.value)

    @property
    def balanced_gain(self) -> Gain:
        """The held-out gain with each of the K intervals of the timesteps counted alike.

        In `val_gain` they count as much as the base's loss in them: on the demo the lowest quarter of the
        timesteps, noise that hides only fine texture, has 72 % of it and the highest 0.9 %.
        """
        return mean_gain(self.val, self.base_val)

    @property
    def gain_by_timestep(self) -> list[Gain]:
        """Held-out gain in each of K equal intervals of the timesteps, low noise first."""
        items = self.val.shape[1]
        return [paired_gain(self.val[:, k : k + 1], self.base_val[:, k : k + 1]) for k in range(items)]

    @property
    def broken(self) -> list[int]:
        """Indices of images with a score that is not finite: held-out, training, price; model's or base's."""
        scores = torch.cat([self.val + self.base_val, self.train + self.base_train])
        if self.price.numel():
            scores = torch.cat([scores, self.price + self.base_price])
        return (~scores.isfinite().all(1)).nonzero()[:, 0].tolist()


class Diverged(UserError):
    """Some scores of an epoch are not finite.

    Args:
        items: (name, timesteps) of each image with such a score.
    """

    def __init__(self, items: list[tuple[str, list[int]]], epoch: int, lr: float):
        named = [f"{name} at timesteps {', '.join(map(str, timesteps))}" for name, timesteps in items[:3]]
        more = f" and {len(items) - len(named)} more images" if len(items) > len(named) else ""
        super().__init__(
            f"the run diverged: after epoch {epoch} the probe's loss is not finite for "
            f"{'; '.join(named)}{more}; start again with a lower learning rate (optimizer.lr was {lr:g}); "
            "best.ckpt, if there is one, is from before"
        )


def best_epoch(history: list[Probe]) -> int:
    """Return the finished epoch (1, 2, ...) with the lowest held-out loss; 0 before the first.

    Args:
        history: starts with the untouched model.
    """
    losses = [probe.val.double().sum().item() for probe in history]
    return min(range(1, len(history)), key=losses.__getitem__, default=0)


def significant_best(history: list[Probe], least: float = 0.0) -> Gain:
    """Return the best gain so far, ignoring improvements that are chance or too small to matter.

    Chance is the paired difference's standard error. So early stopping on this value ends when learning
    does. With one held-out image there is no error.

    Args:
        history: starts with the untouched model.
        least: improvement of the gain that matters, as a share of the base's loss (0.002 = 0.2 points).
    """
    best = history[0]
    for probe in history[1:]:
        difference, error = paired_difference(probe.val, best.val)
        enough = least * probe.base_val.double().mean().item()
        if difference < -max(enough, 0 if math.isnan(error) else error):
            best = probe
    return best.val_gain


def expected_losses(timesteps: torch.Tensor, losses: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Compute the loss that a model is expected to have at each timestep, (T,) float32.

    Interpolated between means over items in equal intervals of the timesteps.

    Args:
        timesteps, losses: (N,) of scored items.
        num_train_timesteps: T.
    """
    parts = min(20, max(1, len(timesteps) // 8))
    part = (timesteps * parts // num_train_timesteps).numpy()
    filled = np.unique(part)
    means = [losses.double().numpy()[part == i].mean() for i in filled]
    centers = (filled + 0.5) * num_train_timesteps / parts
    table = np.interp(np.arange(num_train_timesteps), centers, means)
    return torch.from_numpy(table).float()
