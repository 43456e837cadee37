"""The rows of probe.csv where the price begins or ends with a resume."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.report_material import probe_of

from ghibli.evaluation.gain import Probe
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import read_rows
from ghibli.training.callbacks.metrics import Records

PRICE = ("price", "price_se", "price_low", "price_high", "price_loss", "price_groups")


def probe(price: float | None) -> Probe:
    """A probe with this price, the same for each of 6 groups; None = not measured."""
    if price is None:
        return probe_of(0.2)
    return replace(probe_of(0.2), price=torch.full((6, 4), 1 + price), base_price=torch.ones(6, 4))


def trainer_with(tables: list[Any]) -> Any:
    """What Records asks of a trainer, with a dashboard that keeps its tables."""
    board = SimpleNamespace(
        log_metrics=lambda *args, **named: None, log_table=lambda table, step: tables.append(table)
    )
    return SimpleNamespace(
        global_step=4, is_global_zero=True, loggers=[board],
        datamodule=SimpleNamespace(num_train_timesteps=1000),
        lightning_module=SimpleNamespace(config=SimpleNamespace(term_names=[])),
    )  # fmt: skip


@pytest.mark.parametrize("prices", [(None, 0.25), (0.25, None)])
def test_a_price_may_begin_or_end_with_a_resume(tmp_path: Path, prices: tuple[float | None, ...]) -> None:
    """As of a base whose samples are NaN in 16 bits: every row is written, without a price as empty cells."""
    run, tables = RunDir(tmp_path), []
    history = [probe(price) for price in prices]
    trainer = trainer_with(tables)
    first = Records(run)
    first.add_probe(trainer, history[:1])
    resumed = Records(run)
    resumed.load_state_dict(first.state_dict())
    resumed.on_fit_start(trainer, SimpleNamespace(probe=SimpleNamespace(history=history[:1])))
    resumed.add_probe(trainer, history)
    resumed.flush(trainer)
    rows = read_rows(run.probe)
    assert [row["probe/price"] for row in rows] == ["" if price is None else "0.25" for price in prices]
    for row, price in zip(rows, prices, strict=True):
        assert all((row[f"probe/{name}"] == "") == (price is None) for name in PRICE)
    epoch = prices.index(0.25)
    drawn = [table.rows for table in tables if table.name == "probe/gain_and_price"]
    gain, price = history[epoch].val_gain, history[epoch].forgotten
    bands = [gain.value, gain.low, gain.high, price.value, price.low, price.high]
    assert drawn[-1] == [[epoch, *map(pytest.approx, bands)]]
