"""Estimates with standard errors."""

import math
from dataclasses import dataclass, field

import scipy.special
import torch


@dataclass(frozen=True)
class Estimate:
    """A measured value with its standard error."""

    value: float
    standard_error: float
    freedom: float = field(default=math.inf, kw_only=True)  # degrees of freedom of the error; inf = normal

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - self.reach

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + self.reach

    @property
    def reach(self) -> float:
        """Half the width of the 95 % interval."""
        return t_quantile(self.freedom) * self.standard_error


def t_quantile(freedom: float) -> float:
    """Return the 97.5 % point of Student's t: 1.96 for endless degrees of freedom, NaN below one."""
    if math.isinf(freedom):
        return float(scipy.special.ndtri(0.975))
    return float(scipy.special.stdtrit(freedom, 0.975)) if freedom >= 1 else math.nan


def jackknife_error(without: list[torch.Tensor]) -> float:
    """Compute a statistic's standard error over independent samples from its leave-one-out values.

    Args:
        without: one (N_i,) for each sample; their variances add up (Arvesen 1969, section 2).
    """
    return sum(jackknife_variances(without)) ** 0.5


def jackknife_variances(without: list[torch.Tensor]) -> list[float]:
    """Compute what each sample adds to the variance of jackknife_error."""
    return [float((len(v) - 1) / len(v) * (v - v.mean()).square().sum()) for v in without]


def jackknife(value: float, without: list[torch.Tensor]) -> Estimate:
    """Return a statistic with its jackknife error; Args: as for jackknife_error.

    The degrees of freedom are those of Welch and Satterthwaite: N - 1 for a single sample.
    """
    variances = jackknife_variances(without)
    squares = sum(one**2 / (len(v) - 1) for one, v in zip(variances, without, strict=True) if len(v) > 1)
    freedom = sum(variances) ** 2 / squares if squares > 0 else min(len(v) for v in without) - 1
    return Estimate(value, sum(variances) ** 0.5, freedom=freedom)


def mean_of(values: torch.Tensor, groups: torch.Tensor | None = None) -> Estimate:
    """Compute the mean of values (N,) with its standard error, which is NaN for one value.

    Args:
        groups: (N,) int64, 0 .. G-1; values of one group are not independent, so a group is left out at a
            time. None = all values are independent.
    """
    values, count = values.double(), len(values)
    if groups is None:
        return Estimate(values.mean().item(), (values.std() / count**0.5).item(), freedom=count - 1)
    members, sums = groups.bincount(), torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, groups, values)
    if len(members) < 2:
        return Estimate(values.mean().item(), math.nan, freedom=0)
    return jackknife(values.mean().item(), [(values.sum() - sums) / (count - members)])
