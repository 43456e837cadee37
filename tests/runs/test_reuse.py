"""A trial started again: finished, it returns its result; unfinished, it resumes; another one is refused."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults.compare import different_parts
from helpers.commands import CHECKPOINTS, REPO, SMALL
from helpers.stand_in import QUICK, StandIn, stop_at

import train
from ghibli.config.files import from_yaml
from ghibli.config.schema import Config
from ghibli.runs import compare, compose, launch, reuse
from ghibli.runs.folder import RunDir
from ghibli.runs.identity import settings_hash
from ghibli.runs.repeats import planned_seeds, repetition
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

ONE_EPOCH = (*QUICK, *CHECKPOINTS, "trainer.max_epochs=1")


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(*ONE_EPOCH)


@pytest.fixture(scope="module")
def done(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Train a run to its end: (folder, objective)."""
    folder = tmp_path_factory.mktemp("done")
    return folder, train.run(config, RunDir(folder))


@pytest.fixture
def finished(done: tuple[Path, float], tmp_path: Path) -> RunDir:
    """Copy the finished run."""
    return RunDir(Path(shutil.copytree(done[0], tmp_path / "run")))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(GhibliModule, "__init__", refuse)


def content_of(folder: Path) -> dict[Path, bytes]:
    """Read every file of a run but those in .hydra."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".hydra" not in path.parts)
    return {path.relative_to(folder): path.read_bytes() for path in files}


# The same trial


@pytest.mark.usefixtures("no_training")
def test_a_finished_trial_returns_its_objective_without_training(
    finished: RunDir, done: tuple[Path, float], config: Config, capsys: pytest.CaptureFixture
) -> None:
    before = content_of(finished.path)
    assert train.run(config, finished) == done[1]
    assert f"is finished: its objective was {done[1]:.4f}" in capsys.readouterr().out
    assert content_of(finished.path) == before


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("resumes", [False, True])
def test_a_finished_run_notes_that_more_seeds_were_asked_for(
    finished: RunDir, config: Config, resumes: bool
) -> None:
    """Otherwise a resume of its fifth training, killed, would know of three, or of none."""
    member = repetition(finished, config.seed + 4)
    for asked, known in ((3, 3), (5, 5), (2, 5), (1, 5)):
        train.run(replace(config, seeds=asked), finished, resumes)
        stored = from_yaml(finished.config)
        assert (stored.seeds, settings_hash(stored)) == (known, settings_hash(config))
        first, seeds = planned_seeds(member, config)
        assert (first, seeds) == (finished, [config.seed + number for number in range(known)])


def test_a_changed_objective_is_not_trusted(
    finished: RunDir, config: Config, done: tuple[Path, float]
) -> None:
    finished.status.update(objective=done[1] + 0.1)
    assert train.run(config, finished) == done[1]
    assert finished.status.read()["objective"] == done[1]


@pytest.mark.slow
def test_an_unfinished_trial_resumes_to_the_same_result(
    config: Config, done: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = RunDir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(StandIn):
            train.run(config, run)
    assert train.run(config, run) == done[1]
    said = capsys.readouterr().out
    assert "failed before: StandIn" in said
    assert "is unfinished: resuming from step 4" in said
    assert different_parts(done[0], tmp_path) == []
    rows, _, verdict = compare.compare(*(compare.read_side(str(folder)) for folder in (done[0], tmp_path)))
    assert rows == []
    assert verdict.endswith("results must be bit-identical, and they are")
    assert [start["step"] for start in run.status.read()["starts"]] == [None, 4]


@pytest.mark.slow
def test_a_failed_trial_without_a_checkpoint_starts_over(
    config: Config, done: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What the failed attempt had noted, such as the hash of wrong images, is deleted."""
    run = RunDir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StandIn):
            train.run(config, run)
    run.status.update(data_hash="of other images", reason="the disk is full")
    assert train.run(config, run) == done[1]
    assert "failed before: the disk is full" in capsys.readouterr().out
    assert different_parts(done[0], tmp_path) == []


# Another trial


@pytest.mark.usefixtures("no_training")
def test_other_settings_are_named(finished: RunDir, make_config: Callable[..., Config]) -> None:
    before = content_of(finished.path)
    with pytest.raises(UserError) as error:
        train.run(make_config(*ONE_EPOCH, "lora.rank=8", "+trainer.max_steps=9"), finished)
    assert str(error.value) == (
        f"{finished.path} already holds a run with other settings: lora.rank is 4 there, 8 requested; "
        "lora.alpha is 8.0 there, 16.0 requested; trainer.max_steps is not set there, 9 requested; "
        f"resume it with resume={finished.path}, or choose another folder"
    )
    assert content_of(finished.path) == before


@pytest.mark.usefixtures("no_training")
def test_other_code_is_named(finished: RunDir, config: Config) -> None:
    finished.status.update(code_hash="0" * 64, git_commit="abcdef0123", git_dirty=True)
    with pytest.raises(UserError, match=r"made by other code \(commit abcdef0 with changes\)"):
        train.run(config, finished)


def test_a_reused_process_number_does_not_block_a_resume(finished: RunDir, config: Config) -> None:
    """The folder's lock decides, whatever status.json says about process 1."""
    finished.status.update(state="running", process=1)
    assert reuse.resume_or_restart(config, finished) == (None, True)


@pytest.mark.usefixtures("no_training")
def test_halving_continues_the_same_trial_only(finished: RunDir, make_config: Callable[..., Config]) -> None:
    longer = make_config(*QUICK, "trainer.max_epochs=9")
    reuse.require_same_trial_except_epochs(longer, finished)
    with pytest.raises(UserError, match=r"lora.rank is 4 there, 8 requested; .*hydra.sweep.dir=DIR"):
        reuse.require_same_trial_except_epochs(make_config(*QUICK, "lora.rank=8"), finished)
    finished.status.update(code_hash="0" * 64)
    with pytest.raises(UserError, match="made by other code"):
        reuse.require_same_trial_except_epochs(longer, finished)


@pytest.mark.slow
def test_a_sweep_twice(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.py -m` into the same folder twice: the second time no trial trains."""
    words = [*SMALL, f"data.root={images}", *ONE_EPOCH]
    words += ["lora.dropout=0.1", "optimizer.lr=1e-3", "loss.guidance=1"]  # else grid=slides sweeps them
    grid = ["lora.rank=1,2", f"hydra.sweep.dir={tmp_path}"]
    objectives: list[float] = []

    def job(cfg: object) -> float:
        objectives.append(train.main(cfg))
        return objectives[-1]

    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *words, *grid])
    launch.hydra_entry(REPO / "conf", "train", job)
    trials = sorted(path.parent for path in tmp_path.glob("*/status.json"))
    assert len(trials) == 2 and all(len(trial.name) <= compose.LONGEST_NAME for trial in trials)
    before, start = [content_of(folder) for folder in trials], time.monotonic()
    launch.hydra_entry(REPO / "conf", "train", job)
    assert time.monotonic() - start < 10
    assert [content_of(folder) for folder in trials] == before
    assert len(set(objectives[:2])) == 2
    assert objectives[2:] == objectives[:2]
    kept = [json.loads((folder / "status.json").read_text())["objective"] for folder in trials]
    assert sorted(kept) == sorted(objectives[:2])


def test_a_finished_run_to_resume_says_so_at_once(
    finished: RunDir, done: tuple[Path, float], config: Config, capsys: pytest.CaptureFixture
) -> None:
    """Without loading anything; with more epochs, or without its weights, there is something to do."""
    before = content_of(finished.path)
    assert train.run(config, finished, resumes=True) == done[1]
    said = capsys.readouterr().out
    assert "is finished, and nothing was done; to train on: python train.py resume=" in said
    assert f"trainer.max_epochs={2 * config.trainer['max_epochs']}" in said and "loading" not in said
    assert content_of(finished.path) == before
    more = replace(config, trainer=config.trainer | {"max_epochs": 9})
    assert reuse.resume_or_restart(more, finished, resumes=True) == (None, True)
    shutil.rmtree(finished.adapter)
    assert reuse.resume_or_restart(config, finished, resumes=True) == (None, True)
