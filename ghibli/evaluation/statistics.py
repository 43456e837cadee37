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


def crossed_mean(values: torch.Tensor) -> Estimate:
    """Compute the mean of a table (S, P) whose rows and whose columns are both samples, with its error.

    Two-way random effects without replication (Searle, Casella and McCulloch 1992, chapter 4): the mean
    squares of rows, columns and their interaction give an unbiased variance of the mean, (MS_rows +
    MS_columns - MS_interaction) / (S P), with the degrees of freedom of Satterthwaite (1946). It is taken to
    be no smaller than the variance over rows alone, or over columns alone. NaN for one row or column.
    """
    table = values.double()
    rows, columns = table.shape
    mean = table.mean()
    if min(rows, columns) < 2:
        return Estimate(mean.item(), math.nan, freedom=0)
    of_rows, of_columns = table.mean(1) - mean, table.mean(0) - mean
    rest = table - mean - of_rows[:, None] - of_columns
    parts = {  # what each adds to the variance of the mean -> its degrees of freedom
        "rows": (of_rows.square().sum() / (rows * (rows - 1)), rows - 1),
        "columns": (of_columns.square().sum() / (columns * (columns - 1)), columns - 1),
        "rest": (
            rest.square().sum() / (rows * columns * (rows - 1) * (columns - 1)), (rows - 1) * (columns - 1)
        ),
    }  # fmt: skip
    variances = {name: variance.item() for name, (variance, _) in parts.items()}
    variance = variances["rows"] + variances["columns"] - variances["rest"]
    variance = max(variance, variances["rows"], variances["columns"])
    squares = sum(variances[name] ** 2 / freedom for name, (_, freedom) in parts.items())
    freedom = variance**2 / squares if squares > 0 else min(rows, columns) - 1
    return Estimate(mean.item(), variance**0.5, freedom=max(freedom, 1.0))
