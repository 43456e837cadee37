"""Intervals over seeds and images together: against analysis of variance by hand, and by simulation."""

import math

import numpy as np
import pytest
import torch

from ghibli.evaluation.gain import Probe, gain_over_seeds, paired_gain
from ghibli.evaluation.seeds import over_seeds
from ghibli.evaluation.statistics import crossed_mean


def mean_squares(table: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of rows, columns and interaction of a two-way table, by their definitions."""
    rows, columns = table.shape
    mean = table.mean()
    of_rows = columns * sum((table[i].mean() - mean) ** 2 for i in range(rows)) / (rows - 1)
    of_columns = rows * sum((table[:, j].mean() - mean) ** 2 for j in range(columns)) / (columns - 1)
    rest = sum(
        (table[i, j] - table[i].mean() - table[:, j].mean() + mean) ** 2
        for i in range(rows)
        for j in range(columns)
    )
    return of_rows, of_columns, rest / ((rows - 1) * (columns - 1))


@pytest.mark.parametrize(("rows", "columns"), [(3, 12), (2, 40), (5, 5)])
def test_the_error_is_that_of_two_way_random_effects(rows: int, columns: int) -> None:
    draw = np.random.default_rng(rows)
    table = (
        3 + draw.normal(0, 2, (rows, 1)) + draw.normal(0, 1, columns) + draw.normal(0, 0.5, (rows, columns))
    )
    found = crossed_mean(torch.from_numpy(table))
    ms_rows, ms_columns, ms_rest = mean_squares(table)
    variance = (ms_rows + ms_columns - ms_rest) / (rows * columns)
    freedom = (rows * columns * variance) ** 2 / (
        ms_rows**2 / (rows - 1) + ms_columns**2 / (columns - 1) + ms_rest**2 / ((rows - 1) * (columns - 1))
    )
    assert found.value == pytest.approx(table.mean())
    assert found.standard_error == pytest.approx(variance**0.5)
    assert found.freedom == pytest.approx(max(freedom, 1))


def test_it_is_never_surer_than_over_images_or_seeds_alone() -> None:
    """Where the interaction is by chance larger than rows and columns, the difference could be below 0."""
    table = torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1], [0.5, -0.5, 0, 0.1]], dtype=torch.float64)
    found = crossed_mean(table)
    for means in (table.mean(0), table.mean(1)):
        assert found.standard_error >= (means.std() / len(means) ** 0.5).item() - 1e-9
    assert math.isnan(crossed_mean(table[:1]).standard_error) and math.isnan(crossed_mean(table[:, :1]).high)


def simulated(
    draw: np.random.Generator, seeds: int, images: int, between: tuple[float, float, float], items: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (S, P, K) and the base's (P, K), of trainings that gain 0.3.

    Args:
        between: standard deviations of the gain between seeds, between images, and of both together.
    """
    base = draw.gamma(4, 0.05, (images, 1)) * draw.gamma(1, 1, (images, items))
    seed, image, both = between
    gain = 0.3 + seed * draw.standard_normal((seeds, 1, 1)) + image * draw.standard_normal((1, images, 1))
    return torch.from_numpy(
        base * (1 - gain - both * draw.standard_normal((seeds, images, 1)))
    ), torch.from_numpy(base)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "between",
    [(0.02, 0.02, 0.02), (0.0, 0.1, 0.01), (0.03, 0.0, 0.02), (0.01, 0.1, 0.05)],
    ids=["alike", "images", "seeds", "small"],
)
@pytest.mark.parametrize("images", [10, 50])
def test_the_interval_holds_the_true_gain(
    seeds: int, images: int, between: tuple[float, float, float]
) -> None:
    """In 500 simulated experiments 95 % intervals hold it between 91 and 99 % of the time."""
    draw = np.random.default_rng(7)
    found = [gain_over_seeds(*simulated(draw, seeds, images, between)) for _ in range(500)]
    assert 0.91 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.99


def test_images_alone_hold_it_too_seldom() -> None:
    """Why both are needed: where seeds differ, the interval over images of their mean is too narrow."""
    draw = np.random.default_rng(7)
    pairs = [simulated(draw, 3, 50, (0.03, 0.03, 0.02)) for _ in range(200)]
    found = [paired_gain(losses.mean(0), base) for losses, base in pairs]
    assert np.mean([one.low <= 0.3 <= one.high for one in found]) < 0.75


def test_seeds_that_agree_have_the_error_over_images() -> None:
    """With equal losses for every seed it is the paired gain's."""
    losses, base = simulated(np.random.default_rng(1), 1, 40, (0, 0.1, 0.02))
    found, alone = gain_over_seeds(losses.expand(3, -1, -1), base), paired_gain(losses[0], base)
    assert found.value == pytest.approx(alone.value)
    assert found.standard_error == pytest.approx(alone.standard_error)
    assert found.freedom == pytest.approx(alone.freedom, rel=1e-6)


def probe(losses: torch.Tensor, base: torch.Tensor) -> Probe:
    return Probe(losses, losses, losses, base, base)


def test_the_summary_has_mean_spread_and_interval() -> None:
    losses, base = simulated(np.random.default_rng(2), 3, 30, (0.02, 0.05, 0.02))
    found = over_seeds({7 + number: probe(losses[number], base) for number in (2, 0, 1)})
    assert found is not None and found.seeds == [7, 8, 9]
    gains = [100 * (1 - (one.sum() / base.sum()).item()) for one in losses]
    text = "\n".join(found.lines)
    for seed, gain in zip((7, 8, 9), gains, strict=True):
        assert f"{seed}: {gain:.1f} %" in text
    low, high = 100 * found.mean.low, 100 * found.mean.high
    assert f"mean {np.mean(gains):.1f} % +- " in text and f"95 % interval {low:.1f} .. {high:.1f} %" in text
    assert f"moves it by {np.std(gains, ddof=1):.2f} points" in text


def test_what_was_scored_on_other_items_is_not_combined() -> None:
    losses, base = simulated(np.random.default_rng(2), 2, 30, (0.02, 0.05, 0.02))
    assert over_seeds({0: probe(losses[0], base)}) is None
    assert over_seeds({0: probe(losses[0], base), 1: probe(losses[1], 2 * base)}) is None
