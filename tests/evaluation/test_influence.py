"""The influence of an image from its dot products, and the files that hold it."""

import csv
import math
from pathlib import Path

import pytest
import scipy.stats
import torch

from ghibli.evaluation.influence import (
    ODD,
    OUTPUTS,
    Influences,
    RankedImage,
    agreements,
    in_mean_sizes,
    influence_of,
    kept_influences,
    read_influences,
    write_influences,
)
from ghibli.evaluation.statistics import Estimate
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError


def test_it_is_the_first_order_change_of_the_gain() -> None:
    """A loss that is linear in the step: the gain with the step, minus that without it."""
    draw = torch.Generator().manual_seed(0)
    base, before = torch.rand(8, generator=draw) + 1, torch.rand(8, generator=draw) + 0.5
    parts = 0.01 * torch.randn(8, generator=draw)
    gains = [1 - (losses.sum() / base.sum()).item() for losses in (before - parts, before)]
    assert influence_of(parts, base).value == pytest.approx(gains[0] - gains[1], rel=1e-4)


def test_its_error_leaves_out_a_block_at_a_time() -> None:
    parts, base = torch.tensor([1.0, 4, -2, 3]), torch.tensor([2.0, 1, 1, 3])
    rest = [[at for at in range(4) if at != out] for out in range(4)]
    left_out = [(parts[keep].sum() / base[keep].sum()).item() for keep in rest]
    mean = sum(left_out) / 4
    found = influence_of(parts, base)
    assert found.standard_error == pytest.approx((3 / 4 * sum((one - mean) ** 2 for one in left_out)) ** 0.5)
    assert found.freedom == pytest.approx(3)
    assert math.isnan(influence_of(parts[:1], base[:1]).low)


def test_one_is_the_mean_size() -> None:
    found = in_mean_sizes([Estimate(0.002, 0.001, freedom=7), Estimate(-0.004, 0.002, freedom=7)])
    assert [(one.value, one.standard_error) for one in found] == [
        pytest.approx((2 / 3, 1 / 3)), pytest.approx((-4 / 3, 2 / 3))
    ]  # fmt: skip
    assert [one.value for one in in_mean_sizes([Estimate(0.0, 0.0)])] == [0] and in_mean_sizes([]) == []


def example(count: int = 5) -> Influences:
    ranked = [
        RankedImage(
            f"{place}.png", f"a cat, {place}", Estimate(2.0 - place, 0.2, freedom=7), agreement, place % 4
        )
        for place, agreement in enumerate((-1.0, -9.5, 0.5, -3.6, -3.4)[:count])
    ]
    return Influences(
        of={"weights": ["a", None], "items": 4, "timesteps": 1000}, checkpoints=["best.ckpt (step 8)"],
        preconditioned=True, held_out=9, images=5, base=[0.1, 0.2], blocks={"k": [1.0, -2.0]},
        levels={"k": [0.5]}, ranked=ranked,
    )  # fmt: skip


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    run, found = RunDir(tmp_path), example()
    write_influences(run, found)
    assert read_influences(run.influence) == found == kept_influences(run)
    with open(tmp_path / "influence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one.name for one in found.ranked]
    assert float(rows[4]["high95"]) == pytest.approx(-2 + 2.3646 * 0.2, abs=1e-3)  # Student's t, 7 degrees
    assert [row["timesteps"] for row in rows] == ["0-249", "250-499", "500-749", "750-999", "0-249"]


def test_an_agreement_is_a_modified_z_score() -> None:
    cosines = torch.tensor([[0.1, 0.5], [0.2, 0.5], [0.3, 0.5], [0.4, 0.5], [-0.9, 0.5]])
    found = agreements(cosines)
    column = cosines[:, 0]
    spread = scipy.stats.median_abs_deviation(column.numpy())
    torch.testing.assert_close(found[:, 0], 0.6745 * (column - 0.2) / spread)
    assert (found[:, 1] == 0).all()  # a level at which all are alike says nothing
    assert found[4, 0] < ODD < found[:4, 0].min()


def test_the_worst_are_those_that_agree_least() -> None:
    found = example()
    assert [one.name for one in found.worst(0.4)] == ["1.png", "3.png"]
    assert [one.name for one in found.worst(0.01)] == ["1.png"]  # at least one
    assert [one.is_odd for one in found.ranked] == [False, True, False, True, False]
    ends = [[one.name[0] for one in images] for images in found.ends(2).values()]
    assert ends == [["0", "1"], ["4", "3"], ["1", "3"]]
    assert [one.is_harmful for one in found.ranked] == [False, False, False, True, True]
    assert found.is_whole and not example(3).is_whole


@pytest.mark.parametrize("name", ["influence.json", *OUTPUTS])
def test_a_file_of_the_user_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"made_by": "me"}')
    with pytest.raises(UserError, match=f"{name} was not written by ghibli influence"):
        kept_influences(RunDir(tmp_path))
