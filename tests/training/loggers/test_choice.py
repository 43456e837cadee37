"""`logger`: which dashboards it starts, and that no failure of one is more than a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import run_python
from helpers.dashboards import use_all

from ghibli.config import files, paths
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.registry import DASHBOARDS, DashboardEntry
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.training.loggers import choice, dashboard

METHODS = ["log_values", "log_image", "log_table", "log_finding", "log_summary", "how_to_look", "close"]


class Toy:
    """A dashboard that remembers what it gets, and raises from one of its methods."""

    label = "Toy"

    def __init__(self, failing: str | None = None):
        self.failing, self.calls = failing, []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*words: object) -> list[str]:
            self.calls.append(name)
            if name == self.failing:
                raise RuntimeError("no more\n of this")
            return ["look here"]

        return method


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(dashboard.log, "warning", lines.append)
    return lines


@pytest.mark.parametrize("failing", METHODS)
def test_the_first_failure_is_one_warning_and_the_last_call(failing: str, said: list[str]) -> None:
    logger = dashboard.DashboardLogger(Toy(failing))
    for _ in range(2):
        use_all(logger)
        logger.how_to_look()
    logger.close()
    assert said == ["Toy failed (no more of this): going on without it; metrics.csv has all numbers"]
    if failing.startswith("log_"):
        calls = logger.dashboard.calls
        assert calls[-1] == "close" and calls.count(failing) == 1
        assert not [name for name in calls[calls.index(failing) + 1 :] if name.startswith("log_")]


def test_a_dashboard_gets_all_that_a_run_shows(said: list[str]) -> None:
    logger = dashboard.DashboardLogger(Toy())
    use_all(logger)
    logger.close()
    assert logger.dashboard.calls == [
        "log_values", "log_image", "log_table", "log_table", "log_finding", "log_summary", "close",
    ]  # fmt: skip
    assert (logger.how_to_look(), said) == (["look here"], [])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("wandb", ["wandb"]), ("csv", []), ("none", []), ("null", []), ("[]", []),
        ("[wandb,csv,tensorboard,wandb]", ["wandb", "tensorboard"]), ("[none]", []),
    ],
)  # fmt: skip
def test_one_name_or_several(given: str, names: list[str], make_config: Callable, tmp_path: Path) -> None:
    config = make_config(f"logger={given}")
    assert config.logger == names
    (tmp_path / "config.yaml").write_text(files.to_yaml(config))
    assert files.from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", r"^logger=tensorbord is unknown: choose one of wandb, .*; did you mean tensorboard\?"),
        ("[wandb,none]", r"^logger=.* none alone, or other names"),
        ("[1]", r"^logger=\[1\] .*a name, or a list of names"),
    ],
)
def test_what_is_no_dashboard_is_refused(given: str, message: str, make_config: Callable) -> None:
    with pytest.raises(UserError, match=message), hydra_errors():
        make_config(f"logger={given}")


def test_a_missing_package_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^logger=trackio: .*pip install -e '\.\[trackio\]'$"):
        paths.check_dashboard("trackio")
    paths.check_dashboard("wandb")  # it is the default: without it a run goes on


def test_one_that_does_not_start_leaves_the_others(
    make_config: Callable, tmp_path: Path, said: list[str]
) -> None:
    """Two toys from outside, one of which cannot be made: one entry each, no other edit."""
    for name in ("toy", "broken"):
        DASHBOARDS.register(name, DashboardEntry(name.title(), f"{__name__}:make_{name}"))
    try:
        (logger,) = choice.start(make_config("logger=[broken,toy]"), RunDir(tmp_path), "name")
        choice.close_all()
    finally:
        for name in ("toy", "broken"):
            DASHBOARDS.remove(name)
    assert logger.dashboard.calls == ["close"] and choice.opened == []
    assert said == ["Broken failed (disk full): going on without it; metrics.csv has all numbers"]


def make_toy(config: object, run: RunDir, name: str) -> Toy:
    return Toy()


def make_broken(config: object, run: RunDir, name: str) -> Toy:
    raise OSError("disk full")


def test_nothing_is_imported_that_is_not_used() -> None:
    """Not by the package of loggers, the callbacks nor the command; the libraries alone do not either."""
    code = (
        "import sys, train, ghibli.training.finalize, ghibli.training.session\n"
        "print([name for name in ('wandb', 'tensorboard', 'trackio') if name in sys.modules])"
    )
    done = run_python("-c", code, warm=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
