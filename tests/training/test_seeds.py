"""The further trainings of a run with several seeds: which are trained, with which settings."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import REPO

from ghibli.config.files import to_yaml
from ghibli.config.schema import Config
from ghibli.runs import attempts
from ghibli.runs.folder import RunDir
from ghibli.runs.identity import code_hash, result_checksum, settings_hash
from ghibli.runs.launch import check_other_seeds
from ghibli.runs.repeats import repetition, with_seed
from ghibli.runtime.errors import UserError
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
    run.adapter.mkdir(exist_ok=True)
    run.config.write_text(to_yaml(config))
    fields = {"objective": 0.5, "settings_hash": settings_hash(config), "code_hash": code_hash()}
    run.status.update(state="finished", **fields)
    run.status.update(seal=result_checksum(run.status.read()))


@contextmanager
def worker_in(run: RunDir) -> Iterator[None]:
    """Another process that holds the run's folder."""
    code = (
        "import sys; from pathlib import Path; from ghibli.runs.folder import RunDir; "
        "kept = RunDir(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=pipe, stdout=pipe, text=True, cwd=REPO
    )
    try:
        assert worker.stdout is not None and worker.stdout.readline() == "held\n"
        yield
    finally:
        worker.communicate()


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


def test_a_folder_that_is_not_free_gets_no_note(
    panda: tuple[RunDir, Config], failures: list[Path], capsys: pytest.CaptureFixture
) -> None:
    """One is of other settings and finished, in the other a second process is at work; a third does fail."""
    first, config = panda
    other, busy, lost = (repetition(first, seed) for seed in (1, 2, 3))
    finish(other, with_seed(replace(config, lora=replace(config.lora, rank=2)), first, 1))
    busy.status.update(state="running")

    def train(own: Config, run: RunDir, resumes: bool) -> float:
        raise UserError("a reason")

    with worker_in(busy):
        train_other_seeds(first, [0, 1, 2, 3], config, None, train)
    assert failures == [other.path, busy.path, lost.path]
    said = capsys.readouterr().out
    assert "panda+seed=1 already holds a run with other settings: lora.rank is 2 there" in said
    assert "another process is at work in" in said
    assert [run.no_result.exists() for run in (other, busy, lost)] == [False, False, True]
    assert lost.no_result.read_text() == "a reason"


def test_the_other_folders_are_checked_before_the_first_training_begins(panda: tuple[RunDir, Config]) -> None:
    """Also where the first one is gone, as after `ghibli rm`, and begins anew with other settings."""
    first, config = panda
    check_other_seeds(first, config)
    with worker_in(repetition(first, 1)):
        for resumes in (False, True):
            with pytest.raises(UserError, match="another process is at work in"):
                check_other_seeds(first, config, resumes)
    shutil.rmtree(first.path)
    with pytest.raises(UserError, match=r"panda\+seed=1 already holds a run with other settings: lora.rank"):
        check_other_seeds(first, replace(config, lora=replace(config.lora, rank=2)))
    check_other_seeds(first, replace(config, seeds=1, lora=replace(config.lora, rank=2)))
    check_other_seeds(RunDir(first.path.with_name("bear")), config)
    assert not first.path.with_name("bear+seed=1").exists()
