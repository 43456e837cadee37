"""Which timesteps training draws: a range of them, and how often each comes.

A distribution bends the sequence of `ghibli.runtime.seeding`: a point u of 0 .. 1 becomes the timestep at
which the cumulative distribution reaches u. So whatever evenness the points have, the timesteps have within
the distribution: of any n neighbouring examples, about a tenth lie in each tenth of its probability.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial

import scipy.special
import torch

from ghibli.config.registry import DISTRIBUTIONS
from ghibli.config.schema import LossConfig
from ghibli.runtime.errors import UserError
from ghibli.runtime.registry import load_object
from ghibli.runtime.seeding import POINTS, independent_point, independent_timestep, spread_point, timestep


def logit_normal_cdf(x: float, mean: float, deviation: float) -> float:
    """Return P(X < x) for logit(X) normal, 0 < x < 1 (Esser et al. 2024, equation 19)."""
    return float(scipy.special.ndtr((math.log(x) - math.log1p(-x) - mean) / deviation))


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return P(X < x) for X of the beta distribution, 0 < x < 1: the regularised incomplete beta function."""
    return float(scipy.special.betainc(a, b, x))


def timestep_function(options: LossConfig, num_train_timesteps: int) -> Callable[[int, int], int]:
    """Return (example number, seed) -> timestep, 0 .. T-1, under `options`.

    Without range and distribution it is `seeding.timestep` or `seeding.independent_timestep` itself.

    Raises:
        UserError: the range goes beyond the base's timesteps.
    """
    first, last = options.timestep_range or (0, num_train_timesteps - 1)
    if last >= num_train_timesteps:
        raise UserError(
            f"loss.timestep_range=[{first},{last}]: this base has timesteps 0 to {num_train_timesteps - 1}"
        )
    count, is_spread = last - first + 1, options.timesteps == "spread"
    if options.timestep_distribution == "uniform":
        draw = timestep if is_spread else independent_timestep
        return partial(uniform_timestep, draw=draw, first=first, count=count)
    point = spread_point if is_spread else independent_point
    return partial(bent_timestep, point=point, first=first, bounds=cumulative(options, count))


def quantile_function(
    options: LossConfig, num_train_timesteps: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from timesteps that are uniform over 0 .. T-1 to those that training draws as often.

    Without range and distribution it changes none.
    """
    first, last = options.timestep_range or (0, num_train_timesteps - 1)
    count, is_uniform = last - first + 1, options.timestep_distribution == "uniform"
    bounds = [] if is_uniform else cumulative(options, count)

    def quantile(timesteps: torch.Tensor) -> torch.Tensor:
        if is_uniform:
            return first + timesteps * count // num_train_timesteps
        points = [(2 * int(t) + 1) * POINTS // (2 * num_train_timesteps) for t in timesteps]
        return torch.tensor([first + bisect_right(bounds, point) for point in points])

    return quantile


def uniform_timestep(
    example: int, seed: int, *, draw: Callable[[int, int, int], int], first: int, count: int
) -> int:
    """Return one of `count` timesteps from `first` on, as `draw` chooses among them."""
    return first + draw(example, count, seed)


def bent_timestep(
    example: int, seed: int, *, point: Callable[[int, int], int], first: int, bounds: list[int]
) -> int:
    """Return the timestep in whose part of 0 .. POINTS-1 the example's point lies; see cumulative."""
    return first + bisect_right(bounds, point(example, seed))


def cumulative(options: LossConfig, count: int) -> list[int]:
    """Return below which point of 0 .. POINTS-1 each of `count` timesteps ends, but for the last."""
    entry = DISTRIBUTIONS[options.timestep_distribution]
    cdf = load_object(entry.cdf)
    a, b = options.timestep_parameters or entry.parameters
    return [int(cdf(k / count, a, b) * POINTS) for k in range(1, count)]
