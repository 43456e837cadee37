"""trackio: its own store holds what was sent; a resume goes on in the same run; no failure is silent."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.commands import CACHE
from helpers.dashboards import curves_of, trackio_runs, use_all

from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here
from ghibli.training.loggers import choice, dashboard

trackio = pytest.importorskip("trackio")
STORE = Path(trackio.utils.TRACKIO_DIR)


@pytest.fixture(autouse=True)
def store() -> Iterator[None]:
    """An empty store, and Python's own way of showing warnings afterwards."""
    shutil.rmtree(STORE, ignore_errors=True)
    before = warnings.showwarning
    yield
    assert warnings.showwarning == before
    shutil.rmtree(STORE, ignore_errors=True)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(dashboard.log, "warning", lines.append)
    return lines


def start(make_config: Callable, run: RunDir, *words: str) -> dashboard.DashboardLogger:
    (logger,) = choice.start(make_config("logger=trackio", *words), run, "LoRA rank 4")
    return logger


def test_a_resumed_run_goes_on_in_its_own_and_another_of_its_settings_is_another(
    make_config: Callable, tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture
) -> None:
    run = RunDir(tmp_path / "one")
    for step in (1, 2):
        start(make_config, run).log_metrics({"train/loss": 0.5 / step}, step)
        choice.close_all()
    other = start(make_config, RunDir(tmp_path / "two"))
    use_all(other)
    choice.close_all()
    assert said == [] and capsys.readouterr().out == ""
    first, second = sorted(trackio_runs(STORE), key=lambda found: found["name"])
    assert first["name"] == "one LoRA rank 4" == run.status.read()["trackio_name"]
    assert curves_of(first["logs"])["train/loss"] == [(1, 0.5), (2, 0.25)]
    assert first["config"]["lora"]["rank"] == 32
    curves = curves_of(second["logs"])
    assert (curves["loss"], curves["best/val_gain"]) == ([(1, 1.0)], [(1, 0.5)])
    assert [(alert["title"], alert["text"], alert["step"]) for alert in second["alerts"]] == [
        ("name", "text", 1)
    ]
    assert other.how_to_look() == [f"trackio  {command_here('trackio', 'show')} --project ghibli-lora-lab"]


def test_a_name_with_slashes_leads_nowhere_else(
    make_config: Callable, tmp_path: Path, said: list[str]
) -> None:
    """As in the status.json of a stranger's run."""
    run = RunDir(tmp_path / "run")
    run.status.update(trackio_name="../../../elsewhere")
    use_all(start(make_config, run))
    choice.close_all()
    assert said == []
    (image,) = Path(CACHE).rglob("*.png")
    assert image.is_relative_to(STORE / "media" / "ghibli-lora-lab")


@pytest.mark.parametrize("when", ["from the start", "in mid-run"])
def test_what_it_cannot_write_is_one_warning(
    when: str, make_config: Callable, tmp_path: Path, said: list[str]
) -> None:
    """trackio itself would go on with a Python warning for each kind of data."""
    logger = start(make_config, RunDir(tmp_path))
    if when == "in mid-run":
        logger.log_metrics({"loss": 1.0}, 0)
        choice.close_all()
        logger = start(make_config, RunDir(tmp_path))
        shutil.rmtree(STORE)
    STORE.write_text("no folder")
    use_all(logger)
    choice.close_all()
    STORE.unlink()
    assert len(said) == 1 and said[0].startswith("trackio failed (")


@pytest.mark.parametrize("how", ["raises", "warns"])
def test_one_that_does_not_start_is_one_warning(
    how: str, make_config: Callable, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*words: object, **more: object) -> None:
        if how == "raises":
            raise ValueError("no server")
        trackio.utils._emit_nonfatal_warning("no server")

    monkeypatch.setattr(trackio, "init", init)
    assert choice.start(make_config("logger=trackio"), RunDir(tmp_path), "x") == []
    assert said == ["trackio failed (no server): going on without it; metrics.csv has all numbers"]


def test_other_warnings_stay_what_they_are(make_config: Callable, tmp_path: Path, said: list[str]) -> None:
    start(make_config, RunDir(tmp_path))
    with pytest.warns(UserWarning, match="not of trackio"):
        warnings.warn("not of trackio", UserWarning, stacklevel=1)
    choice.close_all()
    assert said == []
