"""How the page names runs."""

import math
from pathlib import Path
from typing import Any

import pytest

from ghibli.app import labels
from ghibli.runs.folder import RunDir


@pytest.mark.parametrize(
    ("name", "gain", "label"),
    [
        ("2026-11-28_21-40-07", 0.281, "2026-11-28 21:40, 28.1 % better than the base"),
        ("run", -1.28, "run, 128.0 % worse than the base"),
        ("run", None, "run"),
        ("run", math.nan, "run"),
        ("lora.rank=16,optimizer.lr=0.001,loss.guidance=7.5,seed=3", 0.0,
         "lora.rank=16,optimiz ... .guidance=7.5,seed=3, 0.0 % better than the base"),
    ],
)  # fmt: skip
def test_a_run_has_a_short_name_and_its_gain_in_words(name: str, gain: Any, label: str) -> None:
    assert labels.run_label(RunDir(Path("outputs/train") / name), gain) == label
    assert labels.with_numbers(["a", "b", "a"]) == ["a", "b", "a (2)"]
