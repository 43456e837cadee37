"""`from ghibli.api import Run`: the tables and images of a run, as its files have them."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghibli.api import Run
from ghibli.runtime.errors import UserError

FINISHED = Path(__file__).parent / "end_to_end" / "runs_of_73ce106" / "finished"


def test_tables_have_every_cell_of_the_files() -> None:
    pytest.importorskip("pandas")
    run = Run(FINISHED)
    for frame, name in ((run.probe, "probe.csv"), (run.metrics, "metrics.csv")):
        with open(FINISHED / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(frame.columns) == list(rows[0]) and len(frame) == len(rows)
        for column in frame.columns:
            expected = [float(row[column] or "nan") for row in rows]
            np.testing.assert_array_equal(frame[column].astype(float), expected)
    assert run.status["gain"] == run.probe["probe/val_gain"].max()


def test_grids_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="latest: no run below outputs/ yet"):
        Run()
    samples = tmp_path / "outputs" / "a" / "samples"
    samples.mkdir(parents=True)
    (samples.parent / "status.json").write_text('{"state": "running"}')
    run = Run()
    assert repr(run) == "Run('outputs/a'): killed, no gain yet"
    with pytest.raises(UserError, match="has no grid: it has none yet"):
        run.grid()
    for at, name in enumerate(("epoch_005", "epoch_010")):
        Image.new("RGB", (4, 2), (at, 0, 0)).save(samples / f"{name}.png")
        os.utime(samples / f"{name}.png", ns=(at, at))
    assert run.grid().getpixel((0, 0)) == (1, 0, 0)
    assert run.grid("epoch_005").getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(UserError, match="no grid epoch_015: it has epoch_005, epoch_010"):
        run.grid("epoch_015")
    with pytest.raises(UserError, match="has no adapter yet: it is killed"):
        _ = run.adapter
    with pytest.raises(UserError, match=r"probe\.csv is not there yet"):
        _ = run.probe
