"""The front of best trade-offs between gain and price, against every pair of trials."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghibli.evaluation.gain import Probe
from ghibli.runs.folder import RunDir
from ghibli.sweeps import plots
from ghibli.sweeps.plots import write_plot
from ghibli.sweeps.tradeoffs import front, front_line
from ghibli.sweeps.trials import Trial


def trial(gain: float, price: float | None, rank: int = 4, place: Path = Path("run")) -> Trial:
    """A finished trial with exactly this gain and price; None = it was not measured."""
    base = torch.ones(6, 2, dtype=torch.float64)
    priced = () if price is None else (base * (1 + price), base)
    probe = Probe(base * (1 - gain), base, base, base, base, *priced)
    return Trial(RunDir(place), {"lora.rank": rank}, {}, probe)


def test_the_front_is_what_no_other_trial_beats_in_both() -> None:
    rng = np.random.default_rng(0)
    trials = [trial(*pair) for pair in rng.random((40, 2))]
    values = {id(one): (one.gain.value, one.price.value) for one in trials}
    best = [
        one
        for one in trials
        if not any(
            values[id(other)][0] >= values[id(one)][0]
            and values[id(other)][1] <= values[id(one)][1]
            and other is not one
            for other in trials
        )
    ]
    found = [one for one, _, _ in front(trials)]
    assert sorted(map(id, found)) == sorted(map(id, best)) and 1 < len(found) < 40
    assert [one.price.value for one in found] == sorted(one.price.value for one in found)


def test_trials_without_a_price_take_no_part() -> None:
    trials = [trial(0.9, None), trial(0.5, 0.2), trial(0.4, 0.1), trial(0.3, 0.15)]
    assert front_line(trials) == (
        "best trade-offs, the lowest price first: 3 (gain 40.0 % +- 0.0 %, price 10.0 % +- 0.0 %); "
        "2 (gain 50.0 % +- 0.0 %, price 20.0 % +- 0.0 %)"
    )
    assert front_line(trials[:2]) == front_line([]) == ""


def test_the_plot_has_one_more_panel_where_prices_were_measured(tmp_path: Path) -> None:
    def width(prices: list[float | None]) -> int:
        trials = [trial(0.1 * rank, price, rank) for rank, price in enumerate(prices, start=1)]
        data = write_plot(tmp_path, trials).read_bytes()
        return int.from_bytes(data[16:20], "big")  # of a PNG

    assert width([0.1, 0.2, 0.15]) - width([None] * 3) == round(2.4 * 120)


def test_the_legend_names_guidances_and_the_mean_beside_prices_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the last panel draws, which has a legend of its own."""
    trials = [trial(0.1 * number, 0.1, rank=number) for number in (1, 2)]
    for one, guidance in zip(trials, (1.0, 7.5), strict=True):
        one.settings["loss.guidance"] = guidance
    figures: list[Any] = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    write_plot(tmp_path, trials)
    (figure,) = figures
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["training guidance 1.0", "training guidance 7.5", "mean"]
