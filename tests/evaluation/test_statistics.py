"""Intervals and errors against scipy, and against leaving out by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ghibli.evaluation.statistics import Estimate, jackknife, mean_of


@pytest.mark.parametrize("freedom", [1, 4, 19.5, 400])
def test_an_interval_is_students(freedom: float) -> None:
    low, high = scipy.stats.t.interval(0.95, freedom, loc=2.0, scale=0.3)
    found = Estimate(2.0, 0.3, freedom=freedom)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_without_degrees_of_freedom_it_is_the_normal_one_or_none() -> None:
    assert Estimate(2.0, 0.3).high == pytest.approx(scipy.stats.norm.ppf(0.975, 2.0, 0.3))
    assert math.isnan(Estimate(2.0, math.nan, freedom=0).low)


def test_a_mean_has_the_interval_of_scipys_t_test() -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(0)) + 1
    found = mean_of(values)
    wanted = scipy.stats.ttest_1samp(values.double().numpy(), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_two_samples_have_welchs_degrees_of_freedom() -> None:
    """The difference of two means, whose leave-one-out values are known."""
    x, y = np.random.default_rng(0).normal(0, 3, 6), np.random.default_rng(1).normal(0, 1, 15)
    without = [
        torch.from_numpy((x.sum() - x) / (len(x) - 1) - y.mean()),
        torch.from_numpy(x.mean() - (y.sum() - y) / (len(y) - 1)),
    ]
    found = jackknife(x.mean() - y.mean(), without)
    wanted = scipy.stats.ttest_ind(x, y, equal_var=False)
    assert found.freedom == pytest.approx(wanted.df)
    assert found.low == pytest.approx(wanted.confidence_interval(0.95).low)


def test_a_mean_by_groups_leaves_a_group_out_at_a_time() -> None:
    values, groups = torch.tensor([1.0, 2, 4, 8, 16, 3, 5]), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    left_out = [values[groups != g].mean().item() for g in range(3)]
    wanted = (2 / 3 * sum((v - np.mean(left_out)) ** 2 for v in left_out)) ** 0.5
    found = mean_of(values, groups)
    assert found.value == pytest.approx(values.mean().item())
    assert found.standard_error == pytest.approx(wanted)
    assert found.freedom == 2
    alone = mean_of(values, torch.arange(7))
    assert alone.standard_error == pytest.approx(mean_of(values).standard_error)
    assert math.isnan(mean_of(values, torch.zeros(7, dtype=torch.int64)).standard_error)
