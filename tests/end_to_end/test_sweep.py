"""`python sweep.py`: a grid in which two trials fail; its table, effects and plot; what it refuses."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import REPO, SMALL, python_sweep
from helpers.wandb_files import offline_records
from hydra import compose
from hydra.errors import HydraException
from PIL import Image

import sweep
import train
from ghibli.config.hydra_errors import explain
from ghibli.config.keys import affects_result, all_keys
from ghibli.config.schema import Command, Config
from ghibli.runs import launch, reuse
from ghibli.runs.folder import RunDir
from ghibli.sweeps import effects, grid, trials
from ghibli.sweeps.trials import read_trials

ONE_EPOCH = ("trainer.max_epochs=1", "lora.text_encoder=false", "lora.rank=4")


@pytest.fixture(scope="module")
def words(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four trials, of which two fail because their batch is larger than the image set."""
    folder = tmp_path_factory.mktemp("study")
    return [
        *SMALL, f"data.root={images}", "data.draw=null", *ONE_EPOCH, f"hydra.sweep.dir={folder}",
        "optimizer.lr=1e-4,1e-3", "data.batch_size=4,500",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(words: list[str]) -> Path:
    """The folder of the finished study."""
    with pytest.raises(SystemExit) as left:
        python_sweep(*words)
    assert left.value.code == 1  # two failed
    return grid.studies[0].folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "study.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_failing_trials_stop_no_other_and_are_reported(folder: Path) -> None:
    rows = rows_of(folder)
    assert [row["verdict"].split(":")[0] for row in rows[2:]] == ["failed", "failed"]
    assert all("data.batch_size=500" in row["verdict"] for row in rows[2:])
    assert [float(row["gain"]) for row in rows[:2]] == sorted(
        (float(r["gain"]) for r in rows[:2]), reverse=True
    )
    assert {row["optimizer.lr"] for row in rows[:2]} == {"0.0001", "0.001"}
    assert np.asarray(Image.open(folder / "study.png")).std() > 5


@pytest.mark.slow
def test_a_trial_is_the_single_run_with_its_settings(folder: Path, words: list[str], tmp_path: Path) -> None:
    single = [w for w in words if not w.startswith(("hydra.", "optimizer.lr", "data.batch_size"))]
    with pytest.MonkeyPatch.context() as patch:
        more = ["optimizer.lr=1e-3", "data.batch_size=4", f"hydra.run.dir={tmp_path / 'run'}"]
        patch.setattr(sys, "argv", ["train.py", *single, *more])
        launch.hydra_entry(REPO / "conf", "train", train.main)
    weights = Path("adapter") / "pytorch_lora_weights.safetensors"
    (trial,) = (t for t in trials.read_trials(folder) if t.gain and t.settings["optimizer.lr"] == 1e-3)
    assert (trial.run.path / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_report_only_trains_nothing(folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "main", lambda cfg: pytest.fail("it trains"))
    (folder / "study.csv").unlink()
    before = {path.name for path in folder.iterdir() if path.is_dir()}
    python_sweep(*words, "sweep.report_only=true", "lora.rank=8")
    assert len(rows_of(folder)) == 4
    assert {path.name for path in folder.iterdir() if path.is_dir()} == before


def test_no_folder_is_named_after_what_changes_no_result() -> None:
    """Otherwise `sweep.py` and then `sweep.py sweep.repeats=3` would train everything twice."""
    with grid.hydra_on_conf():
        hydra = compose("train", return_hydra_config=True).hydra
    free = {key for key in all_keys(Command) if not affects_result(key) or key.startswith("sweep.")}
    assert free <= set(hydra.job.config.override_dirname.exclude_keys)


def without_training(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every trial that would be trained end at once with 0; return the list that names them."""
    decide, started = reuse.resume_or_restart, []

    def decided(config: Config, run: RunDir, resumes: bool = False) -> tuple[float | None, bool]:
        objective, resumes = decide(config, run, resumes)
        if objective is None:
            started.append(run.path.name)
        return objective or 0.0, resumes

    monkeypatch.setattr(reuse, "resume_or_restart", decided)
    return started


@pytest.mark.slow
def test_a_refused_trial_is_not_ranked(
    folder: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result comes from other code. With report_only, which trains nothing, it is ranked as it is."""
    without_training(monkeypatch)
    copy = tmp_path / "study"
    shutil.copytree(folder, copy)
    first, second = trials.read_trials(copy)[:2]
    first.run.status.update(code_hash="0" * 64)
    with pytest.raises(SystemExit) as left:
        python_sweep(*words, f"hydra.sweep.dir={copy}")
    assert left.value.code == 1
    rows = rows_of(copy)
    assert [row["trial"] for row in rows] == [second.run.path.name, first.run.path.name]
    assert rows[1]["gain"] == ""
    assert rows[1]["verdict"].startswith("failed: already holds this run, made by other code")
    python_sweep(*words, f"hydra.sweep.dir={copy}", "sweep.report_only=true")
    assert [row["trial"] for row in rows_of(copy)] == [first.run.path.name, second.run.path.name]


@pytest.mark.slow
def test_repeats_have_their_own_name_and_the_report_survives_a_failing_one(
    folder: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, asked = tmp_path / "study", []
    shutil.copytree(folder, copy)
    first, second = trials.read_trials(copy)[:2]
    first.run.config.write_text("# edited\n" + first.run.config.read_text())
    (copy / "study.csv").unlink()
    monkeypatch.setattr(train, "main", lambda cfg: 0.0)
    monkeypatch.setattr(train, "run", lambda config, run: asked.append((config, run)) or 0.0)
    with pytest.raises(SystemExit) as left:
        python_sweep(*words, f"hydra.sweep.dir={copy}", "sweep.repeats=1")
    assert left.value.code == 1 and len(rows_of(copy)) == 4
    ((config, run),) = asked
    assert run.path.name == f"{second.run.path.name}+seed=1" == config.wandb.name
    assert config.seed == 1 and config.optimizer.lr == second.settings["optimizer.lr"]


def test_the_effect_of_a_setting_is_the_paired_difference(folder: Path) -> None:
    trials = read_trials(folder)
    (effect,) = effects.effects(trials)
    slow, fast = (
        next(t for t in trials if t.gain and t.settings["optimizer.lr"] == lr) for lr in (1e-4, 1e-3)
    )
    assert (effect.key, effect.low, effect.high, effect.pairs) == ("optimizer.lr", 1e-4, 1e-3, 1)
    assert effect.difference.value == pytest.approx(fast.gain.value - slow.gain.value)


def test_an_unfinished_trial_has_no_result(folder: Path, tmp_path: Path) -> None:
    """Judged by its best epoch so far, its settings would look bad."""
    copy = tmp_path / "study"
    shutil.copytree(folder, copy)
    first = trials.read_trials(copy)[0]
    first.run.status.update(state="interrupted", reason="Ctrl-C")
    again = trials.read_trial(first.run)
    assert again.gain is None and again.verdict == "interrupted: Ctrl-C"
    assert trials.read_trials(copy)[0].run.path != first.run.path
    assert effects.effects(trials.read_trials(copy)) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("lora.rank=4,0", "trial lora.rank=0: lora.rank=0 is out of range"),
        ("lora.rank=4,x", "lora.rank"),
        ("lora.rnak=4,8", "unknown key lora.rnak"),
        ("resume=latest", "drop"),
        ("lora.rank=", "lora.rank=: expected a whole number"),
        ("lora.rank=choice()", "cannot parse `lora.rank=choice()`"),
        ("grid=none", "choose one of models, slides"),
        ("hydra/launcher=slurm", "launchers: basic, joblib, ray, submitit_local, submitit_slurm"),
        ("hydra/sweeper=optuna", "python sweep.py sweep.search=12"),
        ("wandb.project=a,b", "trial wandb.project=b would have the folder of trial wandb.project=a"),
    ],
)
def test_a_wrong_grid_is_refused_before_the_first_trial(
    word: str, line: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "study"
    given = [*SMALL, f"data.root={images}", "data.draw=null", f"hydra.sweep.dir={folder}", word]
    with pytest.raises(SystemExit) as left:
        python_sweep(*given)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert line in said
    assert not list(folder.glob("*/status.json"))


@pytest.mark.parametrize("name", ["ray", "joblib", "submitit_local", "submitit_slurm"])
def test_a_missing_launcher_is_reported_with_the_command_that_installs_it(name: str) -> None:
    """With Hydra's own message, which appears only where the extra is missing."""
    error = HydraException(f"In 'sweep': Could not find 'hydra/launcher/{name}'")
    extra = name.split("_")[0]
    assert explain(error) == f"hydra/launcher={name} is not installed: python -m pip install -e '.[{extra}]'"


@pytest.mark.slow
def test_the_offline_dashboard_holds_the_whole_sweep(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back with wandb's own reader: one group, a run per trial, its settings, curves and grids."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = [w for w in words if not w.startswith(("hydra.", "data.batch_size", "wandb.", "sample."))]
    own += [
        "wandb.mode=offline",
        "data.batch_size=2",
        "sample.every_n_epochs=1",
        "sample.num_inference_steps=2",
    ]
    python_sweep(*own, f"hydra.sweep.dir={tmp_path / 'watched'}")
    trials = read_trials(tmp_path / "watched")
    assert len(trials) == 2
    groups, names, rates = set(), set(), set()
    for trial in trials:
        records = offline_records(trial.run.path)
        (start,) = [record["run"] for record in records if "run" in record]
        groups.add(start["run_group"])
        names.add(start["display_name"])
        settings = start["config"]["update"]
        rates.add(settings["optimizer"]["lr"])
        assert settings["lora"]["rank"] == 4 and settings["data"]["batch_size"] == 2
        text = json.dumps(records)
        assert all(word in text for word in ("train/loss", "probe/val_gain", "probe/gain_curve", "samples"))
        assert list((trial.run.path / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert (
        groups == {"watched"} and names == {trial.run.path.name for trial in trials} and rates == {1e-4, 1e-3}
    )


@pytest.mark.slow
def test_the_same_study_again_trains_only_what_failed(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = without_training(monkeypatch)
    before = rows_of(folder)
    python_sweep(*words)
    assert len(started) == 2 and all("500" in name for name in started)
    after = rows_of(folder)
    assert [row["gain"] for row in after[:2]] == [row["gain"] for row in before[:2]]


def test_two_studies_in_one_folder(folder: Path, words: list[str], capsys: pytest.CaptureFixture) -> None:
    """Another process holds the folder: this one refuses."""
    hold = (
        "import sys, pathlib; from ghibli.runs.folder import RunDir; "
        "lock = RunDir(pathlib.Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    )
    for held in grid.studies:
        held.lock.close()
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)],
        cwd=REPO, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SystemExit):
        python_sweep(*words, "sweep.report_only=true")
    assert "another process is at work" in capsys.readouterr().err
    holder.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "count"), [([], 32), (["lora.rank=4,8,16", "loss.guidance=1,7.5"], 6), (["lora.rank=4"], 16)]
)
def test_a_grid_on_the_command_line_replaces_the_one_of_conf(
    given: list[str], count: int, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(train, "main", lambda cfg: started.append(cfg.loss.guidance) or 0.0)
    monkeypatch.setattr(sweep, "report", lambda folder: None)
    python_sweep(f"data.root={images}", "data.draw=null", f"hydra.sweep.dir={tmp_path}", *given)
    assert len(started) == len(grid.studies[0].plan) == count
