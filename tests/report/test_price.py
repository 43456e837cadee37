"""The price in the report: a sentence, a curve, a column; nothing of it where it was never measured."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import report_material
from helpers.report_material import make_run, page_of

from ghibli.evaluation.gain import Probe
from ghibli.report.text import price_sentence
from ghibli.training.loggers.tables import gain_and_price


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe of a synthetic run has a price of half its gain."""
    plain = report_material.probe_of

    def probe_of(gain: float) -> Probe:
        base = torch.rand((6, 4), generator=torch.Generator().manual_seed(1)) + 0.5
        return replace(plain(gain), price=base * (1 + gain / 2), base_price=base)

    monkeypatch.setattr(report_material, "probe_of", probe_of)


@pytest.mark.usefixtures("priced")
def test_one_run_says_what_it_cost(tmp_path: Path) -> None:
    make_run(tmp_path / "run", (0, 0.3, 0.4, 0.35))
    text = page_of(tmp_path / "run").text.replace("\u00a0", " ")
    assert "The price: on what the base was made for, its loss is 20.0 % ± 0.0 % above the base's." in text
    assert "Price: what it forgot" in text
    assert [f"{100 * gain / 2:.1f} % ± 0.0 %" in text for gain in (0.3, 0.4, 0.35)] == [True] * 3


@pytest.mark.parametrize(("value", "side"), [(0.123, "above"), (-0.123, "below")])
def test_a_price_without_an_error_is_not_called_chance(value: float, side: str) -> None:
    """Of one group of images: it has no interval, so nothing is known of it."""
    row = {"probe/price": value, "probe/price_se": math.nan, "probe/price_groups": 1}
    said = price_sentence(SimpleNamespace(best=row))
    assert said is not None and f"its loss is 12.3 % {side} the base's; so few images give no" in said
    row |= {"probe/price_se": 0.1, "probe/price_groups": 8}
    assert "no more than chance" in str(price_sentence(SimpleNamespace(best=row)))


@pytest.mark.usefixtures("priced")
def test_several_runs_are_compared_by_it(tmp_path: Path) -> None:
    for name, gains in (("low", (0, 0.1, 0.2)), ("high", (0, 0.3, 0.5))):
        make_run(tmp_path / name, gains, lora__rank=len(name), best_epoch=2)
    text = page_of(tmp_path).text.replace("\u00a0", " ")
    assert "Gain over price" in text and "25.0 % ± 0.0 %" in text and "10.0 % ± 0.0 %" in text


def test_without_it_nothing_is_said(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, lora__rank=len(name))
    for folder in (tmp_path, tmp_path / "one"):
        text = page_of(folder).text
        assert "price" not in text and "Price" not in text


def test_dashboards_get_both_curves_with_their_bands() -> None:
    gain = {"probe/val_gain": "0.5", "probe/val_gain_low": "0.4", "probe/val_gain_high": "0.6"}
    price = {"probe/price": "0.25", "probe/price_low": "0.1", "probe/price_high": "0.4"}
    (table,) = gain_and_price([{"epoch": "1"} | gain | price])
    assert table.rows == [[1, 0.5, 0.4, 0.6, 0.25, 0.1, 0.4]]
    assert len(table.columns) == 7
    assert gain_and_price([{"epoch": 1} | gain]) == gain_and_price([]) == []
