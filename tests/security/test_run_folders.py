"""A run folder from elsewhere, and a folder with files of others: what resume and lock may touch there."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import REPO, run_python
from typer.testing import CliRunner

import sweep
from ghibli.cli.main import app
from ghibli.config.files import from_yaml, to_yaml
from ghibli.config.schema import Config, DrawConfig
from ghibli.evaluation import evaluate
from ghibli.runs import launch, reuse
from ghibli.runs.folder import RunDir, read_checkpoint
from ghibli.runs.here import on_this_machine
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import temporary_beside, write_atomically, write_with_checksum
from ghibli.sweeps.repeats import repeat_best_trials
from ghibli.training.callbacks.checkpoints import (
    CleanStop,
    FolderCheckpoint,
    StopRequested,
    WholeCheckpoints,
)

KEPT = REPO / "tests" / "end_to_end" / "runs_of_73ce106"


def save(content: object, file: Path) -> None:
    write_with_checksum(file, lambda opened: torch.save(content, opened))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content, links not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# Checkpoints


def state(best: str, dirpath: str) -> dict[str, object]:
    score = torch.tensor(0.3)
    return {
        "best_model_score": score, "best_model_path": best, "dirpath": dirpath, "last_model_path": best,
        "best_k_models": {best: score}, "kth_best_model_path": best, "kth_value": score,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../../victim", "..", "", "sub/best.ckpt", "best.ckpt/../../../victim"])
@pytest.mark.parametrize("dirpath", ["/", "", "own", "elsewhere"])
def test_a_checkpoint_names_no_path(tmp_path: Path, name: str, dirpath: str) -> None:
    own = tmp_path / "run" / "checkpoints"
    named = {"own": str(own), "elsewhere": str(tmp_path / "victim")}.get(dirpath, dirpath)
    callback = FolderCheckpoint(own, monitor="gain", filename="best")
    for best in (f"{own}/{name}", f"file://{tmp_path}/victim", "https://example.com/x", f"/{name}"):
        callback.load_state_dict(state(best, named))
        known = {*callback.best_k_models, callback.best_model_path, callback.kth_best_model_path}
        assert known | {callback.last_model_path} <= {"", str(own / "best.ckpt")}
        assert callback.dirpath == str(own)


def test_no_checkpoint_is_ever_removed(tmp_path: Path) -> None:
    (tmp_path / "victim" / "deep").mkdir(parents=True)
    (tmp_path / "last.ckpt").touch()
    before = tree(tmp_path)
    for path in (tmp_path / "victim", tmp_path / "last.ckpt", tmp_path):
        WholeCheckpoints().remove_checkpoint(path)
    assert tree(tmp_path) == before


class RunsCode:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    [{"global_step": RunsCode()}, [1], {"global_step": "1"}, {"global_step": 1, "state_dict": []}, {}],
)
def test_a_checkpoint_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object) -> None:
    """Code in it is refused, not run; so is what has another layout. The checksum is the attacker's own."""
    monkeypatch.chdir(tmp_path)
    save(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_resumed_run_from_elsewhere_stays_in_its_folder(tmp_path: Path) -> None:
    """All at once: paths in last.ckpt, a cache and images to be drawn in folders of the user."""
    run, home = RunDir(tmp_path / "outputs" / "half"), tmp_path / "home"
    shutil.copytree(KEPT / "half", run.path)
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "thesis.txt").write_text("mine")
    content = read_checkpoint(run.last_checkpoint)
    for name, values in content["callbacks"].items():
        if "Checkpoint" in name:
            victim = f"{run.path}/checkpoints/../../../home/photos"
            values |= state(victim, str(run.path / "checkpoints")) | {"best_k_models": {}}
    save(content, run.last_checkpoint)
    config = from_yaml(run.config)
    config.cache_dir, config.data.root = str(home), str(home / "photos")
    config.data.reference = str(home / "reference")
    run.config.write_text(to_yaml(config))
    before = tree(home)
    done = run_python(str(REPO / "train.py"), "resume=outputs/half", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(home) == before
    assert run.status.state == "finished"
    assert "this machine's cache_dir=outputs/cache is used, not" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "home"}


# Settings


def test_a_stored_run_caches_and_draws_in_this_machines_cache(make_config: Callable[..., Config]) -> None:
    own = make_config()
    places = {"root": "/scenes/../etc", "reference": "/x/../etc"}
    draws = {"draw": DrawConfig("drawn", 24), "reference_draw": DrawConfig("drawn", 9)}
    stored = replace(own, cache_dir="/", data=replace(own.data, **places, **draws))
    here = on_this_machine(stored, "mine")
    assert here.cache_dir == "mine" and here.data.root == "mine/scenes-drawn-24"
    assert here.data.reference.startswith("mine/scenes-reference-")
    assert on_this_machine(stored, "mine", keep_root=True).data.root == "/scenes/../etc"
    # images of the user are read where they are, never drawn
    assert on_this_machine(own, "mine").data.root == own.data.root


@pytest.mark.parametrize(("words", "cache"), [([], "outputs/cache"), (["cache_dir=mine"], "mine")])
def test_evaluate_draws_in_the_cache_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], cache: str
) -> None:
    shutil.copytree(KEPT / "finished", tmp_path / "theirs")
    config = from_yaml(tmp_path / "theirs" / "config.yaml")
    config.data = replace(config.data, root="/etc/scenes", draw=DrawConfig("drawn", 24))
    (tmp_path / "theirs" / "config.yaml").write_text(to_yaml(replace(config, cache_dir="/etc")))
    seen: list[Config] = []

    def noted(run: RunDir, config: Config) -> None:
        seen.append(config)
        raise UserError("seen")

    monkeypatch.setattr(evaluate, "evaluate", noted)
    CliRunner().invoke(app, ["evaluate", str(tmp_path / "theirs"), *words])
    assert (seen[0].cache_dir, seen[0].data.root) == (cache, f"{cache}/scenes-drawn-24")


def test_a_sweep_repeats_and_evaluates_a_trial_in_the_cache_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study's folder from elsewhere may hold trials already."""
    shutil.copytree(KEPT / "finished", tmp_path / "trial")
    run = RunDir(tmp_path / "trial")
    config = from_yaml(run.config)
    config.data = replace(config.data, root="/etc/scenes", draw=DrawConfig("drawn", 24))
    run.config.write_text(to_yaml(replace(config, cache_dir="/etc")))
    seen: list[Config] = []

    def noted(run: RunDir, config: Config) -> None:
        seen.append(config)
        raise UserError("seen")

    monkeypatch.setattr(evaluate, "evaluate", noted)
    study = SimpleNamespace(evaluate=config.evaluate, cache_dir="mine", folder=tmp_path)
    study.settings = SimpleNamespace(best=1, repeats=1)
    repeat_best_trials(study, lambda config, run: seen.append(config) or 0.0)
    assert (seen[0].cache_dir, seen[0].data.root) == ("mine", "mine/scenes-drawn-24")
    seen.clear()
    with pytest.raises(UserError, match="seen"):
        sweep.evaluate_one(run, study)
    assert (seen[0].cache_dir, seen[0].data.root) == ("mine", "mine/scenes-drawn-24")
    shutil.rmtree(run.samples)
    run.samples.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="samples is a link to"):
        sweep.evaluate_one(run, study)


@pytest.mark.parametrize("word", ["data.workers=100000", "threads=100000", "trainer.devices=100000"])
def test_settings_start_no_crowd_of_processes(make_config: Callable[..., Config], word: str) -> None:
    with pytest.raises(UserError, match=f"{word.partition('=')[0]}.*at most"):
        make_config(word)


# Links


@pytest.mark.parametrize(
    "name",
    [
        "samples", "checkpoints", "adapter", "adapter_last", "unet", "export", ".hydra", "wandb", ".wandb",
        ".lock", "metrics.csv", "status.json", "checkpoints/last.ckpt", "adapter/new", "wandb/debug.log",
    ],
)  # fmt: skip
def test_a_link_out_of_a_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    run, outside = RunDir(tmp_path / "run"), tmp_path / "outside"
    link = run.path / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link to .*, and a run writes only into its own folder"):
        run.lock()
    assert not outside.exists() and not (run.path / ".lock").is_file()


def test_links_that_stay_inside_and_a_linked_run_folder_are_fine(tmp_path: Path) -> None:
    """W&B makes such links; the folder itself is named by the user."""
    (tmp_path / "real" / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "real" / "wandb" / "latest-run").symlink_to("offline-run-1")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    RunDir(tmp_path / "run").lock().close()


# Files of others


def test_locking_deletes_our_temporary_files_and_nothing_else(tmp_path: Path) -> None:
    foreign = [
        ".secret.tmp", ".backup.2024.tmp", ".thesis.docx.123.tmp", ".ghibli-1-xyz.tmp", "photos/.a.png.1.tmp",
        "photos/.ghibli-12-0123abcd.tmp", "samples/.mine.tmp", "checkpoints/deep/.ghibli-1-0123abcd.tmp",
    ]  # fmt: skip
    ours = [temporary_beside(tmp_path / "a"), temporary_beside(tmp_path / "checkpoints" / "last.ckpt")]
    for path in [*(tmp_path / name for name in foreign), *ours]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    RunDir(tmp_path).lock().close()
    assert not any(path.exists() for path in ours)
    assert all((tmp_path / name).exists() for name in foreign)


def test_a_temporary_file_is_ours_and_fits_beside_the_longest_name(tmp_path: Path) -> None:
    """It has a name that locking knows, whatever the file is called."""
    target, seen = tmp_path / ("ジ" * 85), []  # 255 bytes

    def write(file: object) -> None:
        seen.extend(path for path in tmp_path.iterdir())
        raise KeyboardInterrupt  # a kill would leave it

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, write)
    (temporary,) = seen
    temporary.touch()
    RunDir(tmp_path).lock().close()
    assert not temporary.exists()


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.csv", "split.json"])
def test_a_folder_with_files_of_another_program_is_refused(
    tmp_path: Path, make_config: Callable[..., Config], name: str
) -> None:
    (tmp_path / name).write_text('{"name": "mine"}')
    before = tree(tmp_path)
    for check in (reuse.require_same_trial, reuse.resume_or_restart):
        with pytest.raises(UserError, match=f"{name} is there already and belongs to no run"):
            check(make_config(), RunDir(tmp_path))
    assert tree(tmp_path) == before


# A terminal that closes


@pytest.mark.slow
def test_a_closed_terminal_saves_as_sigterm_does(tmp_path: Path) -> None:
    """Shell and kernel both send SIGHUP: the second one does not stop at once; SIGTERM still does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with CleanStop(RunDir(tmp_path)) as stop:
            stop.in_training = True
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
            with pytest.raises(StopRequested, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with CleanStop(RunDir(tmp_path)):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # under nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_launch_resumes_on_this_machine() -> None:
    """Every way into a stored run of train.py goes through one function."""
    source = Path(launch.__file__).read_text()
    assert source.count("resumed_config(") == 1 and source.count("resumed_here(") == 3
