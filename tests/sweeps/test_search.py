"""`python sweep.py` with sweep.search, sweep.halving and sweep.repeats: what is trained, and resuming."""

import math
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.commands import REPO, SMALL, python_sweep
from hydra.core.config_store import ConfigStore

import sweep
import train
from ghibli.runs import launch
from ghibli.runs.folder import RunDir
from ghibli.sweeps import grid, repeats, search, trials
from ghibli.sweeps.grid import PlannedTrial
from ghibli.sweeps.jobs import Work
from ghibli.sweeps.winner import seeded
from ghibli.training import session

LINES = ("lora.rank=2,4,8", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "seed=3")


@pytest.fixture
def words(images: Path, tmp_path: Path) -> list[str]:
    return [*SMALL, f"data.root={images}", "data.draw=null", f"hydra.sweep.dir={tmp_path / 'study'}"]


def replace_training(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[tuple[int, float]]:
    """Replace training by a function of rank and learning rate; at trial `stop_at` the process dies."""
    asked: list[tuple[int, float]] = []

    def gain(config, run, resumes=False) -> float:
        if run.status.state != "finished":
            if stop_at is not None and len(asked) == stop_at:
                raise SystemExit(137)
            asked.append((config.lora.rank, config.optimizer.lr))
            run.status.update(state="finished")
        return -abs(math.log10(config.optimizer.lr) + 3) - 1 / config.lora.rank

    monkeypatch.setattr(train, "run", gain)
    monkeypatch.setattr(sweep, "report", lambda folder: None)
    return asked


@pytest.mark.slow
def test_a_killed_search_continues_as_if_it_had_not_been_killed(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    optuna = pytest.importorskip("optuna")
    undisturbed = replace_training(monkeypatch)
    python_sweep(*words, *LINES, "sweep.search=12", f"hydra.sweep.dir={tmp_path / 'other'}")
    asked = []
    for stop_at in (2, 0, 5, None):
        asked.append(replace_training(monkeypatch, stop_at))
        with suppress(SystemExit):
            python_sweep(*words, *LINES, "sweep.search=12")
    assert [len(part) for part in asked] == [2, 0, 5, 5]
    assert [one for part in asked for one in part] == undisturbed
    assert len(undisturbed) == 12 and len({lr for _, lr in undisturbed}) == 12
    assert all(1e-4 <= lr <= 1e-2 and rank in (2, 4, 8) for rank, lr in undisturbed)
    table = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study' / 'optuna.db'}")
    assert len(table.trials) == 12 and {t.state.name for t in table.trials} == {"COMPLETE"}


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_the_search_and_is_retried(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    optuna = pytest.importorskip("optuna")
    replace_training(monkeypatch)
    good = train.run

    def sometimes(config, run, resumes=False) -> float:
        if config.lora.rank == 4:
            raise RuntimeError("no memory")
        return good(config, run)

    monkeypatch.setattr(train, "run", sometimes)
    for _ in range(2):  # it fails the second time too
        with pytest.raises(SystemExit) as left:
            python_sweep(*words, "lora.rank=2,4", "sweep.search=8")
        assert left.value.code == 1
    table = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study' / 'optuna.db'}")
    states = [(trial.params["lora.rank"], trial.state.name) for trial in table.trials]
    failed = states.count(("4", "FAIL")) // 2
    assert set(states) == {("2", "COMPLETE"), ("4", "FAIL")} and len(states) == 8 + failed
    monkeypatch.setattr(train, "run", good)
    python_sweep(*words, "lora.rank=2,4", "sweep.search=8")
    states = [trial.state.name for trial in table.trials]
    assert states.count("COMPLETE") == 8 and len(states) == 8 + 2 * failed


@pytest.mark.slow
def test_a_deleted_trial_of_a_search_is_trained_again(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    first = replace_training(monkeypatch)
    python_sweep(*words, "lora.rank=range(2,64)", "sweep.search=3")
    lost = next(path for path in (tmp_path / "study").iterdir() if f"rank={first[1][0]}," in path.name)
    shutil.rmtree(lost)
    again = replace_training(monkeypatch)
    python_sweep(*words, "lora.rank=range(2,64)", "sweep.search=3")
    assert again == first[1:2] and lost.is_dir()


def test_other_choices_in_the_same_folder_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("optuna")
    replace_training(monkeypatch)
    python_sweep(*words, "lora.rank=2,4", "sweep.search=1")
    with pytest.raises(SystemExit):
        python_sweep(*words, "lora.rank=2,16", "sweep.search=2")
    assert "lora.rank: the search in this folder had other values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("sweep.halving=true",), "add optimizer.schedule=constant"),
        (("-m", "sweep.halving=true"), "add optimizer.schedule=constant"),
        (("sweep.halving=true", "optimizer.schedule=constant"), "early_stopping.patience=null"),
        (("sweep.halving=true", "hydra/launcher=elsewhere"), "drop hydra/launcher"),
        (("sweep.halving=true", "optimizer.schedule=constant", "trainer.max_epochs=2,3"), "give one value"),
        (("sweep.halving=true", "sweep.search=3"), "sweep.halving=True is out of range: cannot be combined"),
        (("sweep.halving=true", "lora.rank=0,2"), "trial lora.rank=0"),
        (("sweep.race=true", "sweep.search=3"), "sweep.race=True is out of range: cannot be combined"),
        (("sweep.race=true", "hydra/launcher=elsewhere"), "drop hydra/launcher"),
        (("sweep.race=true", "trainer.devices=2"), "set trainer.devices=1"),
        (("sweep.search=0",), "sweep.search=0 is out of range"),
        (("sweep.search=3", "lora.rnak=2,4"), "unknown key lora.rnak"),
        (("sweep.search=3", "lora.rank=4,0"), "trial lora.rank=0: lora.rank=0 is out of range"),
        (("sweep.search=3", "optimizer.lr=interval(0.1,5)"), "optimizer.lr=5 is out of range"),
        (
            ("sweep.search=3", "wandb.project=a,b"),
            "would have the folder of trial lora.rank=2, wandb.project=a",
        ),
    ],
)
def test_what_is_refused_in_one_line(
    more: tuple[str, ...], line: str, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    node = {"_target_": "elsewhere.Launcher"}
    ConfigStore.instance().store(name="elsewhere", node=node, group="hydra/launcher")
    with pytest.raises(SystemExit) as left:
        python_sweep(*words, "lora.rank=2,4", *more)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert line in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("sweep.search=3", "python sweep.py"),
        ("sweep.race=true", "python sweep.py"),
        ("seed=0", "to resume these trials: the same"),
    ],
)
def test_train_py_refuses_a_search_and_says_how_to_resume_a_grid(
    more: str, said: str, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    given = [*SMALL, f"data.root={images}", "data.draw=null", "lora.rank=2,4", more]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *given])
    monkeypatch.chdir(tmp_path)
    started: list[int] = []
    with suppress(SystemExit):
        launch.hydra_entry(REPO / "conf", "train", lambda cfg: started.append(cfg.lora.rank))
    printed = "".join(capsys.readouterr())
    announced = "2 trials: 4 epochs in all; the first one will tell how long they take"
    begun = ["trial 1 of 2: lora.rank=2", "trial 2 of 2: lora.rank=4"]
    lines = [re.sub(", about .* left:", ":", line) for line in printed.splitlines()]  # of earlier trials
    assert said in printed and [line for line in lines if line.startswith("trial ")] == begun[: len(started)]
    assert (lines[0] == announced) == bool(started) and (len(lines) == 1 or started)
    assert started == ([] if "sweep." in more else [2, 4])
    assert ("hydra.sweep.dir=outputs/sweeps/" in printed) == bool(started)


def test_of_a_key_given_twice_the_last_counts(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    asked = replace_training(monkeypatch)
    python_sweep(*words, "lora.rank=2,4", "optimizer.lr=1e-4,1e-3", *LINES, "lora.rank=8", "sweep.search=2")
    assert [rank for rank, _ in asked] == [8, 8] and not {lr for _, lr in asked} & {1e-4, 1e-3}


def test_rungs() -> None:
    assert [search.rungs(epochs) for epochs in (1, 3, 9, 30)] == [[1], [1, 3], [1, 3, 9], [3, 10, 30]]


@pytest.mark.slow
def test_halving_extends_the_best_third_and_is_exact(words: list[str], tmp_path: Path) -> None:
    """The survivor equals a run that never stopped, the others end after an epoch; a rerun trains nothing."""
    common = ["optimizer.schedule=constant", "trainer.max_epochs=3"]
    common += ["early_stopping.patience=null"]
    line = [*words, *common, "optimizer.lr=1e-6,1e-4,2e-3", "sweep.halving=true"]
    python_sweep(*line)
    folder = grid.studies[0].folder
    epochs = {path.name: RunDir(path).status.read()["epoch"] for path in folder.iterdir() if path.is_dir()}
    assert sorted(epochs.values()) == [1, 1, 3]
    (best,) = [name for name, done in epochs.items() if done == 3]
    assert trials.read_trial(RunDir(folder / best)).settings["optimizer.lr"] == 2e-3

    straight = tmp_path / "straight"
    python_sweep(*words, *common, "optimizer.lr=2e-3,1e-4", f"hydra.sweep.dir={straight}")
    adapter = Path("adapter") / "pytorch_lora_weights.safetensors"
    (alone,) = (t for t in trials.read_trials(straight) if t.settings["optimizer.lr"] == 2e-3)
    assert (folder / best / adapter).read_bytes() == (alone.run.path / adapter).read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "training_session", lambda *_: pytest.fail("it trains"))
        python_sweep(*line)


@pytest.mark.slow
def test_the_best_are_repeated_with_other_seeds(words: list[str], capsys: pytest.CaptureFixture) -> None:
    fast = ["trainer.max_epochs=1", "lora.text_encoder=false"]
    python_sweep(*words, *fast, "optimizer.lr=1e-6,2e-3", "sweep.repeats=1", "sweep.best=1")
    folder = grid.studies[0].folder
    (repeat,) = [path.name for path in folder.iterdir() if "+seed=" in path.name]
    assert trials.read_trial(RunDir(folder / repeat)).settings["optimizer.lr"] == 2e-3
    assert repeat.endswith("+seed=1")
    assert "seed: a new one alone moves the gain by" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize(("close", "expected"), [(True, 4), (False, 0)])
def test_unasked_the_best_are_repeated_where_the_second_is_close(
    words: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch, close: bool, expected: int
) -> None:
    """What is close, tests/sweeps/test_winner.py tells; trials this small differ by many errors."""
    if close:
        monkeypatch.setattr(repeats, "is_close", lambda trials: not seeded(trials))
    fast = ["trainer.max_epochs=1", "lora.text_encoder=false"]
    line = [*words, *fast, "optimizer.lr=1e-6,2e-3", "sweep.repeats=null"]
    for _ in range(2):  # the second time they are there
        python_sweep(*line)
        folder = grid.studies[0].folder
        assert len([path for path in folder.iterdir() if "+seed=" in path.name]) == expected
        printed = " ".join(capsys.readouterr().out.split())
        assert ("the best trial's settings with 2 other seeds" in printed) == (expected > 0)


def test_a_search_says_how_much_it_trains() -> None:
    """And a study by halving too: as many epochs as its rungs add up to."""
    plan = [PlannedTrial(f"lora.rank={rank}", Work(9, False)) for rank in (2, 4, 8, 16)]
    past = [(Work(9, False), 90.0)]
    free = [SimpleNamespace(get_key_element=lambda: "lora.rank")]
    asked = SimpleNamespace(settings=SimpleNamespace(search=8), free=free)
    said = search.announcement(asked, plan, past)
    assert said.startswith("8 trials over lora.rank; about 12 min at the pace of your last runs")
    assert "the first one will tell how long they take" in search.announcement(asked, plan, [])
    said = search.halving_announcement(plan, past)  # 4 + 2 * 2 + 6 = 14 epochs of 10 s
    assert said.startswith("4 trials: 4 until epoch 1, 2 until epoch 3, 1 until epoch 9; about 2 min")


def test_a_running_trial_is_reopened_with_its_values() -> None:
    """Through FrozenTrial._trial_id, which is private; as of Optuna 5.0."""
    optuna = pytest.importorskip("optuna")
    table = optuna.create_study()
    trial = table.ask()
    value = trial.suggest_float("x", 0, 1)
    (running,) = table.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    again = search.reopen_trial(table, running)
    assert (again.number, again.suggest_float("x", 0, 1)) == (trial.number, value)
    table.tell(again.number, 1.0)
    assert [one.state.name for one in table.trials] == ["COMPLETE"]


@pytest.mark.parametrize("name", ["a?b", "a#b", "100%", "a%3Fb", "a&b=c", "plain"])
def test_a_studys_database_is_in_its_folder(name: str, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    (tmp_path / name).mkdir()
    optuna.create_study(study_name="x", storage=search.database(tmp_path / name))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.db")] == [Path(name, "optuna.db")]
