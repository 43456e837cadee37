"""Timesteps of training: their range, and their distribution against scipy's."""

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from ghibli.config.schema import Config, LossConfig
from ghibli.diffusion.timesteps import quantile_function, timestep_function
from ghibli.runtime.errors import UserError
from ghibli.runtime.seeding import independent_timestep, timestep

T = 1000
CASES = {  # name -> (a, b, scipy's distribution function)
    "logit_normal": (-0.5, 0.8, lambda x: scipy.stats.norm.cdf(scipy.special.logit(x), -0.5, 0.8)),
    "beta": (2.0, 3.0, lambda x: scipy.stats.beta.cdf(x, 2, 3)),
}


@pytest.fixture(scope="module")
def options(make_config: Callable[..., Config]) -> LossConfig:
    return make_config().loss


def drawn(options: LossConfig, count: int, start: int = 0) -> np.ndarray:
    draw = timestep_function(options, T)
    return np.array([draw(start + example, 3) for example in range(count)])


def bent(options: LossConfig, name: str, **settings: object) -> LossConfig:
    a, b, _ = CASES[name]
    return replace(options, timestep_distribution=name, timestep_parameters=[a, b], **settings)


@pytest.mark.parametrize(("mode", "usual"), [("spread", timestep), ("independent", independent_timestep)])
def test_by_default_they_are_those_of_the_sequence(
    options: LossConfig, mode: str, usual: Callable[[int, int, int], int]
) -> None:
    found = drawn(replace(options, timesteps=mode), 300)
    assert found.tolist() == [usual(example, T, 3) for example in range(300)]


@pytest.mark.parametrize("mode", ["spread", "independent"])
def test_a_range_has_all_of_its_timesteps_and_no_other(options: LossConfig, mode: str) -> None:
    found = drawn(replace(options, timestep_range=[250, 269], timesteps=mode), 2000)
    counts = np.bincount(found - 250, minlength=20)
    assert (found.min(), found.max(), len(counts)) == (250, 269, 20)
    assert scipy.stats.chisquare(counts).pvalue > 0.001
    if mode == "spread":
        assert np.ptp(counts) <= 3


def largest_gap(found: np.ndarray, cdf: Callable, first: int, count: int) -> float:
    """Between the drawn share of timesteps below each bound and scipy's: Kolmogorov's distance."""
    bounds = np.arange(1, count)
    shares = np.searchsorted(np.sort(found - first), bounds) / len(found)
    return float(np.abs(shares - cdf(bounds / count)).max())


@pytest.mark.parametrize("chosen", [None, [100, 599]])
@pytest.mark.parametrize("name", CASES)
def test_a_distribution_is_scipys(options: LossConfig, name: str, chosen: list[int] | None) -> None:
    first, last = chosen or (0, T - 1)
    one, other = (
        largest_gap(
            drawn(bent(options, name, timestep_range=chosen, timesteps=mode), 4000),
            CASES[name][2], first, last - first + 1,
        )
        for mode in ("spread", "independent")
    )  # fmt: skip
    assert one < 0.002  # evenly spread points: far closer than chance
    assert 0.002 < other < 1.63 / 4000**0.5  # chance: 99 % of sets of independent draws


@pytest.mark.parametrize("name", CASES)
def test_neighbouring_examples_stay_spread(options: LossConfig, name: str) -> None:
    """Of any 20 in a row, about a quarter lies in each quarter of the probability."""
    found = CASES[name][2]((drawn(bent(options, name), 400) + 0.5) / T)
    for start in range(380):
        counts = np.histogram(found[start : start + 20], bins=4, range=(0, 1))[0]
        assert counts.min() >= 3, (start, counts)
        assert counts.max() <= 7, (start, counts)


def test_the_defaults_of_a_distribution_and_loader_processes(options: LossConfig) -> None:
    own = replace(options, timestep_distribution="logit_normal", timestep_parameters=None)
    named = replace(own, timestep_parameters=[0.0, 1.0])
    assert drawn(own, 50).tolist() == drawn(named, 50).tolist()
    again = pickle.loads(pickle.dumps(timestep_function(own, T)))  # what a loader process gets
    assert [again(example, 3) for example in range(50)] == drawn(own, 50).tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("loss.timestep_range=[5]",), "loss.timestep_range=.*first and last timestep"),
        (("loss.timestep_range=[9,5]",), "loss.timestep_range=.*first and last timestep"),
        (("loss.timestep_distribution=betta",), "timestep_distribution=betta .*uniform, logit_normal"),
        (("loss.timestep_parameters=[0,1]",), "loss.timestep_parameters=.*null, since uniform has none"),
        (
            ("loss.timestep_distribution=beta", "loss.timestep_parameters=[0,1]"),
            "loss.timestep_parameters=.*two numbers for beta, above 0 and above 0",
        ),
    ],
)
def test_what_no_distribution_has_is_refused(
    make_config: Callable[..., Config], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*words)


def test_a_range_beyond_the_base_is_refused(options: LossConfig) -> None:
    with pytest.raises(UserError, match=r"loss.timestep_range=\[0,1000\]: this base has timesteps 0 to 999"):
        timestep_function(replace(options, timestep_range=[0, 1000]), T)


def test_quantiles_of_uniform_timesteps_are_drawn_as_often_as_in_training(options: LossConfig) -> None:
    every = torch.arange(T)
    assert torch.equal(quantile_function(options, T)(every), every)
    ranged = quantile_function(replace(options, timestep_range=[250, 269]), T)(every)
    assert torch.bincount(ranged - 250, minlength=20).tolist() == [T // 20] * 20
    for name, (*_, cdf) in CASES.items():
        found = quantile_function(bent(options, name, timestep_range=[100, 899]), T)(every).numpy()
        assert found.min() >= 100 and found.max() <= 899
        assert largest_gap(found, cdf, 100, 800) < 2 / T
