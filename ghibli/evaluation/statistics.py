"""Estimates with standard errors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A measured value with its standard error."""

    value: float
    standard_error: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - 1.96 * self.standard_error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + 1.96 * self.standard_error


def jackknife_error(without: list[torch.Tensor]) -> float:
    """Compute a statistic's standard error over independent samples from its leave-one-out values.

    Args:
        without: one (N_i,) for each sample; their variances add up (Arvesen 1969, section 2).
    """
    variance = sum((len(v) - 1) / len(v) * (v - v.mean()).square().sum() for v in without)
    return float(variance) ** 0.5


def mean_of(values: torch.Tensor) -> Estimate:
    """Compute the mean of independent values (N,) with its standard error, which is NaN for one value."""
    values = values.double()
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item())
