"""`from ghibli import Run, show`: the tables and images of a run, as its files have them."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run_python
from matplotlib.figure import Figure
from PIL import Image

import ghibli
from ghibli.api import Run, show
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


def test_the_package_gives_them_and_loads_neither_before() -> None:
    assert (ghibli.Run, ghibli.show) == (Run, show)
    with pytest.raises(AttributeError, match="module 'ghibli' has no attribute 'run'"):
        _ = ghibli.run
    code = "import sys, ghibli.cli.main; print({'PIL', 'matplotlib', 'ghibli.api'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"


def test_show_displays_state_findings_curve_and_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    display = pytest.importorskip("IPython.display")
    shown: list[object] = []
    monkeypatch.setattr(display, "display", lambda value, raw=False: shown.append(value))
    show(FINISHED)
    text, curve, grid = shown
    assert text["text/plain"].startswith(f"Run('{FINISHED}'): finished, gain ")
    assert np.array_equal(curve, Run(FINISHED).curve()) and np.array_equal(grid, Run(FINISHED).grid())


def test_the_curve_has_every_gain_and_its_band(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        "ghibli.api.Figure", lambda *words, **more: drawn.append(Figure(*words, **more)) or drawn[0]
    )
    image = Run(FINISHED).curve()
    assert image.mode == "RGB" and image.size == (600, 300)
    (axes,) = drawn[0].axes
    with open(FINISHED / "probe.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    line = axes.lines[-1].get_xydata()
    np.testing.assert_allclose(line, [[int(r["epoch"]), 100 * float(r["probe/val_gain"])] for r in rows])
    (band,) = axes.collections
    corners = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    for row in rows:
        for end in ("low", "high"):
            assert (int(row["epoch"]), round(100 * float(row[f"probe/val_gain_{end}"]), 6)) in corners
