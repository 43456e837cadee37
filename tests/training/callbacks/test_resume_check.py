"""A resumed run makes no step with other weights, base or settings; only more epochs may be asked for."""

import copy
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from faults.compare import different_parts, rows_of
from helpers.commands import CHECKPOINTS, REPO, SMALL
from helpers.stand_in import QUICK, StandIn, stop_at

import train
from ghibli.config import files
from ghibli.config.schema import LATER_KEYS, Config
from ghibli.runs import launch
from ghibli.runs.folder import RunDir, check_unchanged, step_of
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_with_checksum
from ghibli.training.callbacks import checkpoints
from ghibli.training.callbacks.resume_check import ResumeCheck
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import lr_factor


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(*QUICK, *CHECKPOINTS)


@pytest.fixture(scope="module")
def stopped(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs with 5 steps each that ended after step 8."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 18)
        with pytest.raises(StandIn):
            train.run(config, RunDir(folder))
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> RunDir:
    """A copy of the stopped run."""
    return RunDir(Path(shutil.copytree(stopped, tmp_path / "run")))


def edit(run: RunDir, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the content of last.ckpt and seals it again."""
    content = torch.load(run.last_checkpoint, weights_only=True)
    change(content)
    write_with_checksum(run.last_checkpoint, lambda file: torch.save(content, file))


def test_a_checkpoint_says_what_its_weights_are_and_score(run: RunDir) -> None:
    content = torch.load(run.last_checkpoint, weights_only=True)
    assert content["global_step"] == 8
    assert len(content["identity"]["weights"]) == 64
    assert content["identity"]["scores"].shape == (2, 2, 2)  # images, guidance and conditional, items
    best = torch.load(run.best_checkpoint, weights_only=True)  # written after a validation: the same scores
    probe, scores = best["probe"][-1], best["identity"]["scores"]  # which scored more images at once
    torch.testing.assert_close(scores[:, 0], probe["val"][:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(scores[:, 1], probe["val_g1"][:2], rtol=1e-5, atol=0)


def change_a_weight(content: dict[str, Any]) -> None:
    next(iter(content["state_dict"].values()))[0, 0] += 1e-3


def test_an_edited_weight_is_refused(run: RunDir, config: Config) -> None:
    edit(run, change_a_weight)
    with pytest.raises(UserError, match="the weights in the networks are not those of the checkpoint"):
        train.run(config, run, resumes=True)
    assert run.status.state == "failed"


def test_an_adapter_that_is_never_loaded_is_refused(
    run: RunDir, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug of other trainers: training silently starts again from an untrained adapter."""
    monkeypatch.setattr(GhibliModule, "load_state_dict", lambda *_, **__: None)
    with pytest.raises(UserError, match="or its adapter was not loaded"):
        train.run(config, run, resumes=True)


def test_settings_edited_in_the_folder_are_refused(run: RunDir, config: Config) -> None:
    """The same weights at another strength: only what they score tells."""
    edited = replace(config, lora=replace(config.lora, alpha=2 * config.lora.alpha))
    with pytest.raises(UserError, match="the checkpoint's weights now score .* or an edited config.yaml"):
        train.run(edited, run, resumes=True)


def test_edited_captions_are_refused(
    run: RunDir, config: Config, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = Path(shutil.copytree(images, tmp_path / "images"))
    text = (other / "captions.txt").read_text()
    (other / "captions.txt").write_text(text.replace("|", "|edited ", 1))
    moved = replace(config, data=replace(config.data, root=str(other)))
    with pytest.raises(UserError, match="is not the same as when the run was started"):
        train.run(moved, run, resumes=True)
    run.status.path.write_text("damaged")  # the checkpoint knows, too
    with pytest.raises(UserError, match="the image set is not the same as when the checkpoint was written"):
        train.run(moved, run, resumes=True)
    assert "status.json is damaged or missing: earlier starts are forgotten" in capsys.readouterr().out


def test_another_base_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    check_unchanged(run, "base_hash", "a" * 64, "the base model.path=x")
    check_unchanged(run, "base_hash", "a" * 64, "the base model.path=x")
    with pytest.raises(
        UserError, match=r"the base model.path=x is not the same .* \(base_hash b{12}, was a{12}\)"
    ):
        check_unchanged(run, "base_hash", "b" * 64, "the base model.path=x")
    assert run.status.read()["base_hash"] == "a" * 64


def test_the_step_is_the_checkpoints_and_not_that_of_status(run: RunDir) -> None:
    """Killed between the two, a run has a status ahead of what it can go on from."""
    run.status.update(step=9)
    assert step_of(run.last_checkpoint) == 8


def test_settings_from_before_the_later_keys(config: Config, tmp_path: Path) -> None:
    """A config.yaml without them is read with what runs had then."""
    content = yaml.safe_load(files.to_yaml(config))
    for key, values in LATER_KEYS.items():
        for name in values if isinstance(values, dict) else ():
            del content[key][name]
        if not isinstance(values, dict):
            del content[key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    read = files.from_yaml(tmp_path / "config.yaml")
    assert (read.threads, read.data.grid_epochs, read.early_stopping.min_improvement) == (None, "", 0)
    others = {name: getattr(config, name) for name in ("data", "early_stopping", "evaluate", "threads")}
    assert (read.model.made_for, read.validation.price_images) == ("samples", 0)  # never measured
    others["model"] = replace(read.model, made_for=config.model.made_for)
    assert replace(read, **others) == config


def test_a_refused_resume_leaves_a_finished_run_as_it_was(
    run: RunDir, config: Config, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether other images are found, or Ctrl-C comes before the first step."""
    train.run(config, run, resumes=True)
    files = (run.config, run.status.path, run.split)
    before = [file.read_bytes() for file in files]
    other = Path(shutil.copytree(images, tmp_path / "images"))
    next((other / "images").glob("*")).unlink()
    more = replace(config, trainer=config.trainer | {"max_epochs": 20})
    with pytest.raises(UserError, match="is not the same as when the run was started"):
        train.run(replace(more, data=replace(config.data, root=str(other))), run, resumes=True)
    assert [file.read_bytes() for file in files] == before
    monkeypatch.setattr(ResumeCheck, "on_train_start", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        train.run(more, run, resumes=True)
    assert [file.read_bytes() for file in files] == before


def weights(folder: Path) -> bytes:
    return (folder / "adapter_last" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.slow
def test_rounding_of_another_machine_is_allowed_and_no_more(run: RunDir, config: Config) -> None:
    def elsewhere(content: dict[str, Any], relative: float) -> None:
        content["identity"]["place"] = "another processor"
        content["identity"]["scores"] *= 1 + relative

    far = RunDir(Path(shutil.copytree(run.path, run.path.with_name("far"))))
    edit(far, lambda content: elsewhere(content, 3e-3))
    with pytest.raises(UserError, match="the checkpoint's weights now score"):
        train.run(config, far, resumes=True)
    edit(run, lambda content: elsewhere(content, 3e-4))
    train.run(config, run, resumes=True)
    assert run.status.state == "finished"


def test_a_checkpoint_from_before_the_check_goes_on_and_says_so(
    run: RunDir, config: Config, capsys: pytest.CaptureFixture
) -> None:
    def older(content: dict[str, Any]) -> None:
        del content["identity"], content["max_epochs"]

    edit(run, older)
    status = {k: v for k, v in run.status.read().items() if k not in ("config_version", "code_hash")}
    run.status.path.write_text(json.dumps(status))
    train.run(config, run, resumes=True)
    said = capsys.readouterr().out
    assert (
        "this checkpoint was written before hashes and scores were stored in it: resuming unchecked" in said
    )
    assert "this run has settings of version 0, this code of version 2" in said
    assert run.status.state == "finished"


def test_a_moved_folder_keeps_its_best_epoch(run: RunDir, config: Config) -> None:
    """Lightning forgets the best score of a folder that has another name, and would overwrite best.ckpt."""

    def unbeatable(content: dict[str, Any]) -> None:
        (state,) = (s for s in content["callbacks"].values() if s.get("monitor") == "probe/val_gain")
        state["best_model_score"] = torch.tensor(0.99)
        state["best_k_models"] = {path: torch.tensor(0.99) for path in state["best_k_models"]}

    edit(run, unbeatable)
    before = run.best_checkpoint.read_bytes()
    train.run(config, run, resumes=True)
    assert run.best_checkpoint.read_bytes() == before


def test_weights_of_another_epoch_than_the_best_are_named(run: RunDir, capsys: pytest.CaptureFixture) -> None:
    stored = torch.load(run.best_checkpoint, weights_only=True)["state_dict"]  # after the first epoch
    module = SimpleNamespace(trainable={name: torch.zeros_like(weight) for name, weight in stored.items()})
    checkpoints.load_weights(module, run.best_checkpoint, 1)
    assert capsys.readouterr().out == ""
    checkpoints.load_weights(module, run.best_checkpoint, 2)
    assert "best.ckpt is of epoch 1, not of the best one, 2" in capsys.readouterr().out
    assert all(torch.equal(module.trainable[name], weight) for name, weight in stored.items())


# More epochs


@pytest.fixture
def command(
    images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., str]:
    """train.py with these words in this process; returns what it printed, or its one line on stderr."""

    def run(*words: str) -> str:
        small = [] if words[0].startswith("resume=") else [*SMALL, f"data.root={images}", *QUICK]
        monkeypatch.setattr(sys, "argv", ["train.py", *small, *words])
        code = 0
        try:
            launch.hydra_entry(REPO / "conf", "train", train.main)
        except SystemExit as leave:
            code = leave.code
        said = capfd.readouterr()
        assert (code, said.err.count("\n")) in ((0, 0), (2, 1)), said.err
        return said.err if code else said.out

    return run


@pytest.mark.slow
def test_grown_at_a_constant_rate_equals_planned_so(command: Callable[..., str], tmp_path: Path) -> None:
    """A finished run of 1 epoch that gets a second one is a run of 2 epochs, row for row and bit for bit."""
    planned, grown = tmp_path / "planned", tmp_path / "grown"
    constant = "optimizer.schedule=constant"
    command(constant, f"hydra.run.dir={planned}")
    command(constant, "data.epochs=1", "trainer.max_epochs=1", f"hydra.run.dir={grown}")
    said = command(f"resume={grown}", "data.epochs=2")
    assert "1 of 1 epochs done; now 2 planned, so 1 to do" in said
    assert "the learning rate stays at 0.0005" in said
    assert different_parts(planned, grown) == []
    assert files.from_yaml(grown / "config.yaml").trainer["max_epochs"] == 2
    assert "epochs were raised on resume" in command(constant, f"hydra.run.dir={grown}")  # so another run


@pytest.mark.slow
def test_a_stretched_schedule_says_its_jump_and_takes_it(run: RunDir, command: Callable[..., str]) -> None:
    """Stopped in the second of 2 epochs; with 4 planned the rate is that of 4 epochs from there on."""
    before = rows_of(run.metrics)
    said = command(f"resume={run.path}", "trainer.max_epochs=4", "lora.rank=4", "wandb.project=other")
    old, new = (5e-4 * lr_factor(8, steps_per_epoch=5, epochs=n, **COSINE) for n in (2, 4))
    assert "1 of 2 epochs done; now 4 planned, so 3 to do" in said
    assert f"jumps from {old:g} to {new:g} at the next step" in said
    rows = rows_of(run.metrics)
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert rows[:8] == before[:8]
    for step, row in enumerate(rows[8:], start=9):
        rate = 5e-4 * lr_factor(step, steps_per_epoch=5, epochs=4, **COSINE)
        assert float(row["lr"]) == pytest.approx(rate, rel=1e-12)
    assert [int(row["epoch"]) for row in rows_of(run.probe)] == [0, 1, 2, 3, 4]
    assert run.status.read()["grown"] == [[8, 2, 4]]


COSINE = {"schedule": "cosine_epochs", "warmup_steps": 0}


@pytest.mark.slow
def test_no_epoch_more_after_an_early_stop(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Killed while the last grid was drawn, a run that had stopped early ends as it would have; asked
    for more epochs it goes on."""
    words = ("optimizer.lr=1e-30", "trainer.max_epochs=5", "early_stopping.patience=1")
    config, run = make_config(*QUICK, *words), RunDir(tmp_path)
    train.run(config, run)
    before = weights(tmp_path)
    assert run.status.read()["epoch"] == 2
    run.status.update(state="running")
    train.run(config, run, resumes=True)
    assert (run.status.read()["epoch"], run.status.read()["step"]) == (2, 10)
    assert weights(tmp_path) == before
    more = copy.deepcopy(config)
    more.trainer["max_epochs"] = 6
    train.run(more, run, resumes=True)
    said = capsys.readouterr().out
    assert "2 of 5 epochs done; now 6 planned, so 4 to do, unless early stopping ends it" in said
    why = "after epoch {}: the held-out gain did not improve in the last epoch (early_stopping.patience)"
    assert said.count(f"early stopping ended the run {why.format(2)}") == 2
    assert f"early stopping ended the run {why.format(run.status.read()['epoch'])}" in said
    assert f"{tmp_path.name} trainer.max_epochs=12; a new run with early_stopping.patience=null" in said
    assert run.status.read()["epoch"] > 2


@pytest.mark.slow
def test_images_and_base_that_only_moved(
    run: RunDir, config: Config, command: Callable[..., str], images: Path, tmp_path: Path
) -> None:
    """The same content elsewhere is the same run, bit for bit; other content there is refused in one line."""
    straight = RunDir(Path(shutil.copytree(run.path, tmp_path / "straight")))
    train.run(config, straight, resumes=True)
    moved, base = tmp_path / "moved (1)", tmp_path / "a base, elsewhere"
    shutil.copytree(images, moved)
    others = shutil.ignore_patterns("*.py", "scenes", "pretrain", "near", "clip", "__pycache__")
    shutil.copytree(REPO / "ghibli" / "demo", base, ignore=others)
    (moved / "captions.txt").write_text((moved / "captions.txt").read_text().replace("a ", "no ", 1))
    places = (f"data.root={moved}", f"model.path={base}")
    refused = command(f"resume={run.path}", *places)
    assert "the image set" in refused and "is not the same as when the run was started" in refused
    (moved / "captions.txt").write_bytes((images / "captions.txt").read_bytes())
    assert run.status.state == "failed" and files.from_yaml(run.config).data.root == str(images)
    command(f"resume={run.path}", *places)
    assert run.status.state == "finished"
    assert files.from_yaml(run.config).data.root == str(moved)
    for name in ("probe.csv", "adapter/pytorch_lora_weights.safetensors"):
        assert (run.path / name).read_bytes() == (straight.path / name).read_bytes()


@pytest.mark.parametrize("refused_by", ["base", "images", "weights", "ctrl-c"])
def test_a_damaged_checkpoint_is_replaced_only_when_the_run_goes_on(
    refused_by: str, run: RunDir, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume that is refused, at whatever point, or stopped before its first step, renames nothing."""
    error, words = UserError, "is not the same as when the run was started"
    if refused_by == "base":
        run.status.update(base_hash="of another base")
    if refused_by == "images":
        run.status.update(data_hash="of other images")
    if refused_by == "weights":
        edit(run, change_a_weight)
        run.last_checkpoint.replace(run.previous_checkpoint)
        words = "the weights in the networks are not those of the checkpoint"
    if refused_by == "ctrl-c":
        monkeypatch.setattr(ResumeCheck, "on_train_start", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        error, words = SystemExit, "130"
    run.last_checkpoint.write_bytes(b"damaged")
    before = {file: file.read_bytes() for file in run.checkpoints.iterdir()}
    with pytest.raises(error, match=words):
        train.run(config, run, resumes=True)
    assert {file: file.read_bytes() for file in run.checkpoints.iterdir()} == before


def test_what_cannot_change_on_the_way(run: RunDir, command: Callable[..., str]) -> None:
    words = ("lora.rank=8", "optimizer.lr=1e-3", "loss.guidance=1")
    line = command(f"resume={run.path}", *words)
    assert f"resume={run.path}: lora.rank is 4 in this run, 8 requested; optimizer.lr is 0.0005 in" in line
    assert "loss.guidance" not in line
    assert "start a new run for other settings" in line
    assert "trainer.max_epochs is 2 in this run, 1 requested" in command(
        f"resume={run.path}", "trainer.max_epochs=1"
    )


def test_a_resumed_run_keeps_its_dashboard_id(config: Config, tmp_path: Path) -> None:
    """By W&B itself, offline: one id in two folders of its own, which `wandb sync` joins."""
    from ghibli.training.loggers import wandb_logger

    offline = replace(config, wandb=replace(config.wandb, mode="offline"))
    ids = []
    for _ in range(2):
        ids.append(wandb_logger.open_dashboard(offline, RunDir(tmp_path), "x").experiment.id)
        wandb_logger.close()
    assert ids[0] == ids[1] == RunDir(tmp_path).status.read()["wandb_id"]
    folders = [path.name.split("-")[3] for path in tmp_path.glob("wandb/offline-run-*")]
    assert folders == [ids[0], ids[0]]  # `-1` behind the second one if it came within the same second
