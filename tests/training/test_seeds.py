"""The further trainings of a run with several seeds: which are trained, with which settings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ghibli.config.files import to_yaml
from ghibli.config.schema import Config
from ghibli.runs import attempts
from ghibli.runs.folder import RunDir
from ghibli.runs.identity import code_hash, result_checksum, settings_hash
from ghibli.runs.repeats import repetition, with_seed
from ghibli.runtime.files import write_with_checksum
from ghibli.training.seeds import train_other_seeds


@pytest.fixture(autouse=True)
def failures(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The runs that failed in this process, none at first."""
    empty: list[Path] = []
    monkeypatch.setattr(attempts, "failures", empty)
    return empty


def finish(run: RunDir, config: Config) -> None:
    """Leave what a finished run is known by."""
    for checkpoint in (run.best_checkpoint, run.last_checkpoint):
        write_with_checksum(checkpoint, lambda file: file.write(b"weights"))
    run.adapter.mkdir()
    run.config.write_text(to_yaml(config))
    fields = {"objective": 0.5, "settings_hash": settings_hash(config), "code_hash": code_hash()}
    run.status.update(state="finished", **fields)
    run.status.update(seal=result_checksum(run.status.read()))


@pytest.fixture
def panda(make_config: Callable[..., Config], tmp_path: Path) -> tuple[RunDir, Config]:
    """Three trainings, all finished: the folder of the first, and its settings."""
    first, config = RunDir(tmp_path / "panda"), make_config("seeds=3")
    finish(first, config)
    for seed in (1, 2):
        finish(repetition(first, seed), with_seed(config, first, seed))
    return first, config


def test_the_training_just_resumed_is_not_visited_again(panda: tuple[RunDir, Config]) -> None:
    """Unless it lags behind the first one, whose epochs were raised by a command that was killed."""
    first, config = panda
    visited: list[tuple[str, int, bool]] = []

    def train(own: Config, run: RunDir, resumes: bool) -> float:
        visited.append((run.path.name, own.trainer["max_epochs"], resumes))
        return 0.5

    epochs = config.trainer["max_epochs"]
    train_other_seeds(first, [0, 1, 2], config, repetition(first, 1), train)
    assert visited == [("panda+seed=2", epochs, True)]
    longer = replace(config, trainer={**config.trainer, "max_epochs": epochs + 1})
    train_other_seeds(first, [0, 1, 2], longer, repetition(first, 1), train)
    assert visited[1:] == [("panda+seed=1", epochs + 1, True), ("panda+seed=2", epochs + 1, True)]
