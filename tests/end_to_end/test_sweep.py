"""`python sweep.py`: a grid with trials that fail, twice; its table, effects and plot; what it refuses."""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import REPO, SMALL, python_sweep
from helpers.wandb_files import offline_records
from hydra import compose
from hydra.errors import HydraException
from PIL import Image
from rich.console import Console

import sweep
import train
from ghibli.config.hydra_errors import explain
from ghibli.config.keys import affects_result, all_keys
from ghibli.config.schema import Command
from ghibli.evaluation.gain import Gain, Probe, paired_gain
from ghibli.runs import launch
from ghibli.runs.folder import RunDir
from ghibli.sweeps import effects, grid, plots, ranking, trials
from ghibli.sweeps.trials import read_trials, varied

ONE_EPOCH = ("trainer.max_epochs=1", "sample.every_n_epochs=0", "lora.text_encoder=false")


@pytest.fixture(scope="module")
def words(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four trials, of which the two with a batch larger than the image set fail."""
    folder = tmp_path_factory.mktemp("study")
    return [
        *SMALL, f"data.root={images}", "data.draw=null", *ONE_EPOCH, f"hydra.sweep.dir={folder}",
        "optimizer.lr=1e-4,1e-3", "data.batch_size=2,500",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(words: list[str]) -> Path:
    """The study's folder after it ran."""
    with pytest.raises(SystemExit) as left:
        python_sweep(*words)
    assert left.value.code == 1  # as two failed
    return grid.studies[0].folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "study.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_failing_trials_stop_no_other_and_are_told(folder: Path) -> None:
    rows = rows_of(folder)
    assert [row["verdict"].split(":")[0] for row in rows[2:]] == ["failed", "failed"]
    assert all("data.batch_size=500" in row["verdict"] for row in rows[2:])
    assert [float(row["gain"]) for row in rows[:2]] == sorted(
        (float(r["gain"]) for r in rows[:2]), reverse=True
    )
    assert {row["optimizer.lr"] for row in rows[:2]} == {"0.0001", "0.001"}
    assert np.asarray(Image.open(folder / "study.png")).std() > 5


def test_a_trial_is_the_single_run_with_its_settings(folder: Path, words: list[str], tmp_path: Path) -> None:
    single = [w for w in words if not w.startswith(("hydra.", "optimizer.lr", "data.batch_size"))]
    with pytest.MonkeyPatch.context() as patch:
        more = ["optimizer.lr=1e-3", "data.batch_size=2", f"hydra.run.dir={tmp_path / 'run'}"]
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


def test_no_folder_is_called_after_what_changes_no_result() -> None:
    """Else `sweep.py` and then `sweep.py sweep.repeats=3` would train everything twice."""
    with grid.hydra_on_conf():
        hydra = compose("train", return_hydra_config=True).hydra
    free = {key for key in all_keys(Command) if not affects_result(key) or key.startswith("sweep.")}
    assert free <= set(hydra.job.config.override_dirname.exclude_keys)


def test_a_refused_trial_is_not_ranked(
    folder: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is of other code. With report_only, which asks for nothing, it is what is there."""
    monkeypatch.setattr(train, "train", lambda *_: 0.0)
    copy = tmp_path / "study"
    shutil.copytree(folder, copy)
    first, second = trials.read_trials(copy)[:2]
    first.run.update_status(code_hash="0" * 64)
    with pytest.raises(SystemExit) as left:
        python_sweep(*words, f"hydra.sweep.dir={copy}")
    assert left.value.code == 1
    rows = rows_of(copy)
    assert [row["trial"] for row in rows] == [second.run.path.name, first.run.path.name]
    assert rows[1]["gain"] == ""
    assert rows[1]["verdict"].startswith("failed: already holds this run, made by other code")
    python_sweep(*words, f"hydra.sweep.dir={copy}", "sweep.report_only=true")
    assert [row["trial"] for row in rows_of(copy)] == [first.run.path.name, second.run.path.name]


def test_repeats_have_their_own_name_and_a_failing_one_keeps_the_report(
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


def test_a_trial_under_way_is_no_result(folder: Path, tmp_path: Path) -> None:
    """Its best epoch so far would make its settings look bad."""
    copy = tmp_path / "study"
    shutil.copytree(folder, copy)
    first = trials.read_trials(copy)[0]
    first.run.update_status(state="interrupted", reason="Ctrl-C")
    again = trials.read_trial(first.run)
    assert again.gain is None and again.verdict == "interrupted: Ctrl-C"
    assert trials.read_trials(copy)[0].run.path != first.run.path
    assert effects.effects(trials.read_trials(copy)) == []


def made(path: Path, rank: int, dropout: float, losses: torch.Tensor, base: torch.Tensor) -> trials.Trial:
    probe = Probe(val=losses, val_g1=losses, train=losses, base_val=base, base_train=base)
    settings = {"lora.rank": rank, "lora.alpha": 2.0 * rank, "lora.dropout": dropout}
    return trials.Trial(RunDir(path), settings, {}, probe)


def test_effects_of_a_grid_are_what_was_put_in(tmp_path: Path) -> None:
    """Rank 32 lowers every loss by 0.1, dropout changes nothing: one matters, the other does not."""
    draws = torch.Generator().manual_seed(0)
    base = 1 + 0.2 * torch.rand(40, 4, generator=draws)
    trials = [
        made(
            tmp_path, rank, dropout,
            base - (0.3 if rank == 32 else 0.2) + 0.01 * torch.randn(40, 4, generator=draws), base,
        )
        for rank in (16, 32)
        for dropout in (0, 0.1)
    ]  # fmt: skip
    first, second = effects.effects(trials)
    assert (first.key, first.pairs, first.matters) == ("lora.rank", 2, True)  # alpha follows: not named
    assert first.difference.value == pytest.approx(0.1 / 1.1, abs=3 * first.difference.standard_error)
    assert second.key == "lora.dropout"
    assert second.difference.value == pytest.approx(0, abs=4 * second.difference.standard_error)
    nothing = effects.Effect("lora.dropout", 0, 0.1, 1, Gain(0.01, 0.02))
    assert not nothing.matters
    assert str(nothing).endswith("95 % -2.92 .. +4.92, 1 pair (indistinguishable from zero)")
    (line, *_) = csv.DictReader(io.StringIO(ranking.effects_csv(trials)))
    assert (line["key"], line["low"], line["high"], line["pairs"]) == ("lora.rank", "16", "32", "2")
    assert float(line["low95"]) == pytest.approx(100 * first.difference.low, abs=1e-4)
    one = paired_gain(trials[2].best.val, base).value - paired_gain(trials[0].best.val, base).value
    two = paired_gain(trials[3].best.val, base).value - paired_gain(trials[1].best.val, base).value
    assert first.difference.value == pytest.approx((one + two) / 2)


def with_settings(one: trials.Trial, **settings: object) -> trials.Trial:
    """A made trial with further settings; `lora_alpha` is lora.alpha."""
    more = {key.replace("_", ".", 1): value for key, value in settings.items()}
    return replace(one, settings=one.settings | more)


def test_alpha_that_is_chosen_apart_from_rank_is_a_setting(tmp_path: Path) -> None:
    base = torch.ones(3, 2)
    trials = [made(tmp_path, rank, 0, base - 0.01 * rank, base) for rank in (4, 8)]
    assert varied(trials) == ["lora.rank"]
    free = [with_settings(trial, lora_alpha=alpha) for trial in trials for alpha in (8.0, 16.0)]
    assert varied(free) == ["lora.rank", "lora.alpha"]
    assert {effect.key: effect.pairs for effect in effects.effects(free)} == {"lora.rank": 2, "lora.alpha": 2}


def test_the_same_trial_in_two_folders_is_one(tmp_path: Path) -> None:
    base = torch.ones(3, 2)
    first, again, other = (
        with_settings(made(tmp_path, rank, 0, base - gain, base), seed=0)
        for rank, gain in ((4, 0.1), (4, 0.3), (8, 0.2))
    )
    assert effects.seed_noise([first, again, other]) is None
    (effect,) = effects.effects([first, again, other])
    assert effect.pairs == 1 and effect.difference.value == pytest.approx(0.1)


def test_an_effect_over_two_bases_and_over_lists(tmp_path: Path) -> None:
    """One base is scored on two items, the other on four: the mean of what each gives, 0.1 and 0.3."""
    trials = [
        with_settings(
            made(tmp_path, 4, 0, base * (1 - (len(targets) == 1) * share), base),
            lora_targets=targets, validation_items_per_image=base.shape[1],
        )
        for base, share in ((torch.ones(3, 2), 0.1), (2 * torch.ones(3, 4), 0.3))
        for targets in (["to_q"], ["to_q", "to_k"])
    ]  # fmt: skip
    (effect,) = effects.effects(trials)
    both, one = ["to_q", "to_k"], ["to_q"]
    assert (effect.key, effect.low, effect.high, effect.pairs) == ("lora.targets", both, one, 2)
    assert effect.difference.value == pytest.approx(0.2)
    assert plots.write_plot(tmp_path, trials).exists()


def test_a_resumed_trial_does_not_say_minutes(tmp_path: Path) -> None:
    times = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:00:00+00:00"}
    once = trials.Trial(RunDir(tmp_path), {}, times | {"starts": [{}]}, None)
    assert once.minutes == 60
    assert replace(once, status=times | {"starts": [{}, {}]}).minutes is None


def test_the_table_is_whole_in_a_pipe(tmp_path: Path) -> None:
    """Rich takes 80 columns where there is no terminal."""
    base = torch.ones(3, 2)
    trials = [
        with_settings(made(tmp_path, rank, 0, base, base), **{f"model_{k}{'x' * 20}": rank for k in range(8)})
        for rank in (4, 8)
    ]
    RunDir(tmp_path).update_status(state="failed", reason="the disk is full")
    told = io.StringIO()
    failed = replace(trials[0], status=RunDir(tmp_path).read_status())
    Console(file=told, width=80, soft_wrap=True).print(ranking.ranking_table([failed, trials[1]]))
    assert all(f"model.{k}{'x' * 20}" in told.getvalue().splitlines()[0] for k in range(8))
    assert "failed: the disk is full" in told.getvalue().splitlines()[1]


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
    place = tmp_path / "study"
    given = [*SMALL, f"data.root={images}", "data.draw=null", f"hydra.sweep.dir={place}", word]
    with pytest.raises(SystemExit) as left:
        python_sweep(*given)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert line in said
    assert not list(place.glob("*/status.json"))


@pytest.mark.parametrize("name", ["ray", "joblib", "submitit_local", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_is_said_with_the_command(name: str) -> None:
    """As Hydra words it, which only happens where the extra is missing."""
    error = HydraException(f"In 'sweep': Could not find 'hydra/launcher/{name}'")
    extra = name.split("_")[0]
    assert explain(error) == f'hydra/launcher={name} is not installed: pip install -e ".[{extra}]"'


def test_the_offline_dashboard_holds_the_whole_sweep(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back by wandb's own reader: one group, a run for each trial, its settings, curves and grids."""
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
        assert settings["lora"]["rank"] == 32 and settings["data"]["batch_size"] == 2
        text = json.dumps(records)
        assert all(word in text for word in ("train/loss", "probe/val_gain", "probe/gain_curve", "samples"))
        assert list((trial.run.path / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert (
        groups == {"watched"} and names == {trial.run.path.name for trial in trials} and rates == {1e-4, 1e-3}
    )


def test_the_same_study_again_trains_only_what_failed(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(train, "train", lambda config, run, resumes: started.append(run.path.name) or 0.0)
    before = rows_of(folder)
    python_sweep(*words)
    assert len(started) == 2 and all("500" in name for name in started)
    after = rows_of(folder)
    assert [row["gain"] for row in after[:2]] == [row["gain"] for row in before[:2]]


def test_two_studies_in_one_folder(folder: Path, words: list[str], capsys: pytest.CaptureFixture) -> None:
    """Another process holds the folder: this one says so."""
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


@pytest.mark.parametrize(
    ("given", "count"), [([], 32), (["lora.rank=4,8,16", "loss.guidance=1,7.5"], 6), (["lora.rank=4"], 16)]
)
def test_a_grid_on_the_command_line_replaces_the_slides_grid(
    given: list[str], count: int, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(train, "main", lambda cfg: started.append(cfg.loss.guidance) or 0.0)
    monkeypatch.setattr(sweep, "report", lambda folder: None)
    python_sweep(f"data.root={images}", "data.draw=null", f"hydra.sweep.dir={tmp_path}", *given)
    assert len(started) == grid.studies[0].trials == count
