"""The statistics of docs/experiments.py: differences in pairs, and Holm's correction."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import scipy.stats
import torch

from ghibli.evaluation.gain import Probe, paired_gain


@pytest.fixture(scope="module")
def experiments() -> ModuleType:
    file = Path(__file__).parents[2] / "docs" / "experiments.py"
    spec = importlib.util.spec_from_file_location("experiments", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probes(base: torch.Tensor, *losses: torch.Tensor) -> list[Probe]:
    return [Probe(val=one, val_g1=one, train=one, base_val=base, base_train=base) for one in losses]


def test_a_difference_in_points_has_both_errors(experiments: ModuleType) -> None:
    draws = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(30, 4, generator=draws)
    ours = [base - 0.5 + 0.1 * torch.randn(30, 4, generator=draws) for _ in range(3)]
    theirs = [base - 0.3 + 0.1 * torch.randn(30, 4, generator=draws) for _ in range(3)]
    found = experiments.points(probes(base, *ours), probes(base, *theirs))
    pairs = [
        100 * (paired_gain(a, base).value - paired_gain(b, base).value)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert found["pairs"] == pytest.approx(pairs, abs=0.006)
    assert found["points"] == pytest.approx(sum(pairs) / 3, abs=0.006)
    assert found["error over pairs"] == pytest.approx(scipy.stats.sem(pairs), abs=0.006)
    low, high = scipy.stats.t.interval(0.95, 2, sum(pairs) / 3, scipy.stats.sem(pairs))
    assert found["95 % over pairs"] == pytest.approx([low, high], abs=0.006)
    mean = base + torch.stack(ours).mean(0) - torch.stack(theirs).mean(0)
    assert found["error over images"] == pytest.approx(
        100 * paired_gain(mean, base).standard_error, abs=0.006
    )


def test_one_pair_has_no_error_over_pairs(experiments: ModuleType) -> None:
    base = torch.ones(5, 2)
    found = experiments.points(probes(base, 0.5 * base), probes(base, 0.6 * base))
    assert found["points"] == pytest.approx(10)
    assert found["error over pairs"] is None


def test_holm_is_the_papers_step_down(experiments: ModuleType) -> None:
    """The least times their number, the next times one less and so on; never falling, at most 1."""
    assert experiments.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert experiments.holm([0.9, 0.8]) == [1.0, 1.0]
    assert experiments.holm([]) == []


def test_every_run_of_every_part_has_settings_that_are_accepted(experiments: ModuleType) -> None:
    """No part fails at its last run after an hour."""
    guided = [(*experiments.GUIDED, *words) for words in experiments.UNCONDITIONAL.values()]
    for words in {*experiments.LOSSES.values(), *guided,
                  *experiments.MISTAKES.values(), *(words for words, _ in experiments.KINDS.values()),
                  ("loss.guidance_target=7.5",), ("lora.variant=rslora", "lora.alpha=16")}:  # fmt: skip
        experiments.compose_config([*experiments.QUIET, *words])
