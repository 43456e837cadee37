"""Distances against scipy, torch-fidelity and large samples."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from ghibli.evaluation import distances, statistics
from ghibli.evaluation.distances import kernel_difference, kernel_distance
from ghibli.evaluation.statistics import Estimate


def normal_rows(count: int, seed: int, shift: float = 0.0, width: int = 8) -> torch.Tensor:
    """(count, width) float64 normal numbers around `shift`."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=made, dtype=torch.float64) + shift


@pytest.mark.parametrize(("count", "others"), [(200, 300), (6, 5)])  # 6 rows: singular covariances
def test_frechet_distance_is_scipys(count: int, others: int) -> None:
    x, y = normal_rows(count, 0, 0.3), 1.5 * normal_rows(others, 1)
    covariances = [np.cov(rows.numpy(), rowvar=False) for rows in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = (x.mean(0) - y.mean(0)).square().sum().item()
    wanted = means + sum(np.trace(c) for c in covariances) - 2 * np.trace(root)
    assert distances.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_is_torch_fidelitys() -> None:
    x, y = normal_rows(500, 2, 0.3, 32), normal_rows(400, 3, width=32)
    wanted = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    found = distances.frechet_distance(x, y)
    assert found == pytest.approx(wanted["frechet_inception_distance"], rel=1e-6)


def test_kernel_distance_is_torch_fidelitys() -> None:
    x, y = normal_rows(60, 4, 0.4), normal_rows(60, 5)
    wanted = kernel_mmd(x.numpy(), y.numpy())
    assert distances.kernel_distance(x, y).value == pytest.approx(float(wanted), rel=1e-9)


def test_leave_one_out_equals_leaving_each_row_out() -> None:
    x, y = normal_rows(7, 6, 0.4), normal_rows(9, 7)
    value, (no_x, no_y) = distances.leave_one_out(x, y)
    assert value == distances.kernel_distance(x, y).value
    for i in range(7):
        less = torch.cat([x[:i], x[i + 1 :]])
        assert no_x[i].item() == pytest.approx(distances.kernel_distance(less, y).value, rel=1e-9)
    for i in range(9):
        less = torch.cat([y[:i], y[i + 1 :]])
        assert no_y[i].item() == pytest.approx(distances.kernel_distance(x, less).value, rel=1e-9)


def share_covered(estimates: list[Estimate], truth: float) -> float:
    return sum(e.low <= truth <= e.high for e in estimates) / len(estimates)


@pytest.mark.slow
def test_intervals_hold_the_large_sample_value() -> None:
    """95 % intervals of 200 small samples, against the value of a large one."""
    x, y = normal_rows(6000, 8, 0.25), normal_rows(6000, 9)
    z = 0.5 * x + normal_rows(6000, 10)  # a second model that fails on the same prompts
    distances, differences, means = [], [], []
    for i in range(200):
        rng = torch.Generator().manual_seed(i)
        ours, real = (torch.randint(6000, (n,), generator=rng) for n in (60, 120))
        distances.append(kernel_distance(x[ours], y[real]))
        differences.append(kernel_difference(x[ours], z[ours], y[real]))
        means.append(statistics.mean_of(x[ours, 0].tanh()))
    value = kernel_distance(x, y).value
    assert 0.9 <= share_covered(distances, value) <= 0.99
    difference = value - kernel_distance(z, y).value
    assert 0.9 <= share_covered(differences, difference) <= 0.99
    assert 0.9 <= share_covered(means, x[:, 0].tanh().mean().item()) <= 0.99


def between_captions(x: torch.Tensor, y: torch.Tensor, of_x: torch.Tensor, of_y: torch.Tensor) -> float:
    """The kernel distance over all pairs of rows with different captions, one mean after another."""
    means = [
        distances.kernel(one, other)[a[:, None] != b[None]].mean()
        for one, other, a, b in ((x, x, of_x, of_x), (y, y, of_y, of_y), (x, y, of_x, of_y))
    ]
    return (means[0] + means[1] - 2 * means[2]).item()


def test_leaving_a_caption_out_equals_leaving_its_rows_out() -> None:
    x, y, groups = normal_rows(9, 14, 0.4), normal_rows(5, 15), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    every = torch.arange(5)
    value, (drawn, others) = distances.leave_group_out(x, y, groups)
    assert value == pytest.approx(between_captions(x, y, groups, every), rel=1e-9)
    for g, found in enumerate([*drawn, *others]):  # the last row of y has no row of x
        less = between_captions(x[groups != g], y[every != g], groups[groups != g], every[every != g])
        assert found.item() == pytest.approx(less, rel=1e-9), g
    assert len(distances.leave_group_out(x[:5], y, every)[1]) == 1


CAPTIONS, EACH = 20, 4  # 4 samples from each of 20 captions, against those captions' own images


def of_captions(seed: int, captions: int, each: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(samples, one after another through the captions; reference): what a caption says is common to both."""
    said = normal_rows(captions, 3 * seed)
    x = said.repeat(each, 1) + 0.5 * normal_rows(captions * each, 3 * seed + 1) + shift
    return x, said + 0.5 * normal_rows(captions, 3 * seed + 2)


def test_intervals_by_caption_hold_the_large_sample_value() -> None:
    """200 repeats of 20 captions with 4 samples each; as independent rows, distances are far too small."""
    groups = torch.arange(CAPTIONS * EACH) % CAPTIONS
    by_caption, by_row, differences, fits = [], [], [], []
    for seed in range(200):
        x, y = of_captions(seed, CAPTIONS, EACH, 0.4)
        z = 0.8 * x + 0.3
        by_caption.append(kernel_distance(x, y, groups))
        by_row.append(kernel_distance(x, y))
        differences.append(kernel_difference(x, z, y, groups))
        fits.append(statistics.mean_of(x[:, 0].tanh(), groups))
    x, y = (of_captions(seed, 3000, 1, 0.4)[which] for which, seed in enumerate((1000, 1001)))
    truth = kernel_distance(x, y).value
    assert 0.9 <= share_covered(by_caption, truth) <= 0.99
    assert 0.9 <= share_covered(differences, truth - kernel_distance(0.8 * x + 0.3, y).value) <= 0.99
    assert 0.9 <= share_covered(fits, x[:, 0].tanh().mean().item()) <= 0.99
    assert np.mean([one.value for one in by_row]) < truth / 2
    assert abs(np.mean([one.value for one in by_caption]) - truth) < 0.1 < truth / 5
    means = [statistics.mean_of(of_captions(s, CAPTIONS, EACH, 0.4)[0][:, 0].tanh()) for s in range(200)]
    assert share_covered(means, x[:, 0].tanh().mean().item()) < 0.85


def test_a_paired_difference_is_sharper_than_two_distances() -> None:
    x, y = normal_rows(80, 11, 0.3), normal_rows(200, 12)
    almost = x + 0.05 * normal_rows(80, 13)
    paired = distances.kernel_difference(almost, x, y)
    assert paired.value == pytest.approx(
        distances.kernel_distance(almost, y).value - distances.kernel_distance(x, y).value
    )
    assert paired.standard_error < 0.5 * distances.kernel_distance(x, y).standard_error


def test_precision_and_recall_of_two_images() -> None:
    """With fewer than k + 1 rows the radius is the distance to the farthest row of the set."""
    two, near, far = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [0.6]]), torch.tensor([[5.0], [6.0]])
    assert distances.precision_recall(near, two) == (1.0, 0.0)
    assert distances.precision_recall(far, two) == (0.0, 0.0)
