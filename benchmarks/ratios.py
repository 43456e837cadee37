"""The ratio of two paired series of times, with an interval."""

from typing import NamedTuple

import numpy as np

RESAMPLED = 2000  # bootstrap samples of the pairs


class Ratio(NamedTuple):
    """How many times faster the second of two is, with a 95 % interval."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"


def ratio(before: list[float], after: list[float]) -> Ratio:
    """Return the ratio of the medians of paired times, and its percentile bootstrap interval (Efron 1979)."""
    paired = np.array(list(zip(before, after, strict=True)))
    drawn = np.random.default_rng(0).integers(0, len(paired), (RESAMPLED, len(paired)))
    each = np.median(paired[drawn], axis=1)  # (RESAMPLED, 2)
    low, high = np.quantile(each[:, 0] / each[:, 1], [0.025, 0.975])
    value = np.median(paired[:, 0]) / np.median(paired[:, 1])
    return Ratio(float(value), float(low), float(high), len(paired))
