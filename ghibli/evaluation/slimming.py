"""How much of a run's gain a smaller adapter loses, and the smallest that loses little enough.

Held-out images are split in two halves. The first chooses, by a bisection over ever smaller adapters; the
second only checks the one chosen, so its bound does not suffer from the choice.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t

from ghibli.evaluation.gain import Gain
from ghibli.evaluation.statistics import Estimate, jackknife_error

CONFIDENCE = 0.95  # of the bound, one-sided
CLOSE = 1.04  # the bisection ends when the next smaller candidate that was tried is at most this much smaller
LEAST = 5  # images in a half; Student's t with fewer than 4 degrees of freedom is very wide


@dataclass(frozen=True)
class LostGain(Estimate):
    """The share of a gain that is lost, over some images: 0 = none, 1 = all; below 0 = better than before."""

    images: int

    @property
    def _reach(self) -> float:
        """Standard errors from the value to the bound: Student's t with a degree less than there are images.

        It is NaN for one image.
        """
        return float(student_t.ppf(CONFIDENCE, self.images - 1))

    @property
    def bound(self) -> float:
        """What the lost gain stays under with 95 % confidence: value + t(0.95, P - 1) standard errors."""
        return self.value + self._reach * self.standard_error

    @property
    def cautious_bound(self) -> float:
        """What `bound` of as many other images stays under with about 95 % confidence.

        The other value differs from this one by the errors of both, sqrt(2) standard errors; its own bound
        is t of them above it: value + (1 + sqrt(2)) t(0.95, P - 1) standard errors.
        """
        return self.value + (1 + math.sqrt(2)) * self._reach * self.standard_error

    def __str__(self) -> str:
        return str_of(self)


def str_of(lost: Estimate) -> str:
    """Format a share as `0.31 % +- 0.05 %`; `-` where it is not finite."""
    if not math.isfinite(lost.value):
        return "-"
    error = f" +- {100 * lost.standard_error:.2f} %" if math.isfinite(lost.standard_error) else ""
    return f"{100 * lost.value:.2f} %{error}"


def lost_gain(losses: torch.Tensor, full: torch.Tensor, base: torch.Tensor) -> LostGain:
    """Compute sum(losses - full) / sum(base - full) with its jackknife standard error over images.

    The sums go over all images and items. The standard error leaves out one image at a time (Efron & Stein
    1981), in numerator and denominator alike; it is NaN for one image.

    Args:
        losses, full, base: (P, K) of the smaller adapter, the whole one and none, on P images x K items.
    """
    lost = (losses.double() - full.double()).sum(1)
    whole = (base.double() - full.double()).sum(1)
    value = (lost.sum() / whole.sum()).item()
    if len(lost) < 2:
        return LostGain(value, math.nan, len(lost))
    without_one = (lost.sum() - lost) / (whole.sum() - whole)
    return LostGain(value, jackknife_error([without_one]), len(lost))


def has_gain(gain: Gain, images: int) -> bool:
    """Tell whether a gain is above 0 with 95 % confidence, one-sided: else no share of it means anything."""
    if images < 2:
        return False
    return gain.value - float(student_t.ppf(CONFIDENCE, images - 1)) * gain.standard_error > 0


def halves(content_hashes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Split images in two halves by their content alone; return (those that choose, those that check).

    In the order of the sha256 of their content hash, the first, third, ... choose. With an odd number, one
    more chooses.

    Args:
        content_hashes: sha256 of each image, hex.
    """

    def place(index: int) -> str:
        return hashlib.sha256(f"slim {content_hashes[index]}".encode()).hexdigest()

    order = sorted(range(len(content_hashes)), key=place)
    return sorted(order[::2]), sorted(order[1::2])


@dataclass(frozen=True)
class Component:
    """A part of a layer's update that can be left out: one singular value, or the whole layer."""

    layer: str
    parameters: int  # numbers in the file
    share: float  # of the layer's squared norm, 0 .. 1


def in_order_of_worth(components: Sequence[Component], effects: Mapping[str, Estimate]) -> list[Component]:
    """Sort components by what a parameter of theirs is estimated to be worth, the most first.

    A component is worth its share of the layer's squared norm times the layer's sensitivity: the gain lost
    without the layer, where below 0 taken as 0, plus one standard error, as a layer that seems to do nothing
    may only have had luck. Components worth nothing are left out.

    Args:
        components: of a layer the largest first, in which order they stay.
        effects: of every layer the gain lost without it.
    """

    def worth(component: Component) -> float:
        effect = effects[component.layer]
        error = effect.standard_error if math.isfinite(effect.standard_error) else 0.0
        return component.share * (max(effect.value, 0.0) + error) / component.parameters

    return sorted((each for each in components if worth(each) > 0), key=lambda each: -worth(each))


def smallest(total: int, holds: Callable[[int], bool]) -> int:
    """Find about the smallest number of components, 1 .. total, with which `holds`; `total` always does.

    A bisection on a logarithmic scale that ends when the number below which it failed is at most 4 % smaller.
    The number returned was tried and held, or is `total`.
    """
    low, high = 0, total
    while high - low > 1 and (low == 0 or high > CLOSE * low):
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def most_trials(total: int) -> int:
    """Return the most numbers that `smallest` tries among 1 .. total."""
    if total < 2:
        return 0
    return math.ceil(math.log2(max(math.log(total) / math.log(CLOSE), 1))) + 2
