"""The main job end to end, as a user starts it: what it prints, writes and learns."""

import csv
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.commands import GRIDS
from lightning.pytorch.callbacks import EarlyStopping
from PIL import Image
from safetensors.torch import load_file

import train
from ghibli.runs.folder import RunDir
from ghibli.training.callbacks.checkpoints import CleanStop
from ghibli.training.module import GhibliModule
from ghibli.training.trainer import make_callbacks

ONE_CELL = (*GRIDS, "sample.samplers=[ddpm]", "sample.guidance=[7.5]", "sample.prompts=[A panda]")
FEW_STEPS = ("data.batch_size=8", "lora.rank=4", "trainer.max_epochs=1")  # one step an epoch


@pytest.fixture
def trained(make_config: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Trains in this process, which saves the start of another one; returns the run's folder."""

    def run(*words: str, name: str = "run") -> Path:
        train.run(make_config(*words), RunDir(tmp_path / name))
        return tmp_path / name

    return run


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def metric_rows(folder: Path) -> list[dict[str, str]]:
    return rows_of(folder / "metrics.csv")


def probe_rows(folder: Path) -> list[dict[str, str]]:
    return rows_of(folder / "probe.csv")


def said(done: CompletedProcess) -> str:
    """What was printed, lines joined again that the terminal's width broke."""
    return " ".join(done.stdout.split())


@pytest.mark.slow
def test_guided_run(train_py: Callable, tmp_path: Path) -> None:
    """The design's own example: rank 16, guidance 7.5, with every file and closing line."""
    done = train_py("lora.rank=16", "loss.guidance=7.5", *GRIDS, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("trained  LoRA rank 16, training guidance 7.5", "gain", "grid", "adapter", "run", "next"):
        assert f"\n{word}" in done.stdout
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["epoch"]) == ("finished", 10, 2)
    weights = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert {t.shape[0] for name, t in weights.items() if "lora.down" in name or "lora_A" in name} == {16}
    rows = metric_rows(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    probes = probe_rows(tmp_path)
    assert [(int(row["step"]), int(row["epoch"])) for row in probes] == [(0, 0), (5, 1), (10, 2)]
    assert float(probes[0]["probe/val_gain"]) < -0.3  # the base at guidance 7.5 predicts no noise
    assert "start    at guidance 7.5 the untouched base scores" in done.stdout
    assert [finding["name"] for finding in status["findings"]] == ["sampling scale"]
    assert "doctor: sampling scale: trained with loss.guidance=7.5, the images are mush" in said(done)
    assert "sample at about 15, the last column of the grids" in said(done)
    last = load_file(tmp_path / "adapter_last" / "pytorch_lora_weights.safetensors")
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    scaled = [value * (2 if ".lora_B." in name else 1) for name, value in stored.items()]  # alpha / rank
    assert sorted(t.norm().item() for t in last.values()) == sorted(t.norm().item() for t in scaled)
    grid = Image.open(tmp_path / "samples" / "adapter.png")
    narrow = Image.open(tmp_path / "samples" / "epoch_001.png")
    assert grid.size == narrow.size
    split = json.loads((tmp_path / "split.json").read_text())
    assert len(split["train"]) + len(split["val"]) == 24
    assert not set(split["train"].values()) & set(split["val"].values())


def test_learning_lowers_the_validation_loss(trained: Callable) -> None:
    """A few large steps at guidance 1: the gain over the base is far above its standard error."""
    folder = trained("optimizer.lr=1e-3", "data.batch_size=4", "lora.text_encoder=false")
    scored = probe_rows(folder)[1:]
    losses = [float(row["probe/val_loss"]) for row in scored]
    assert min(losses[1:]) < losses[0]
    best = max(scored, key=lambda row: float(row["probe/val_gain"]))
    assert float(best["probe/val_gain"]) > 3 * float(best["probe/val_gain_se"]) > 0
    assert not (folder / "samples").exists()


@pytest.mark.slow
def test_untouched_base_gains_exactly_nothing(train_py: Callable, tmp_path: Path) -> None:
    done = train_py("experiment=baseline", *ONE_CELL, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "nothing was trained" in done.stdout
    (row,) = probe_rows(tmp_path)
    assert float(row["probe/val_gain"]) == float(row["probe/train_gain"]) == 0
    assert (tmp_path / "samples" / "base.png").exists()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_full_finetuning_writes_a_unet(train_py: Callable, tmp_path: Path, base: object) -> None:
    done = train_py("experiment=full_finetune", *FEW_STEPS, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    before, after = base.unet.conv_in.weight, unet.conv_in.weight
    assert not torch.equal(before, after)
    assert (after - before).abs().max() < 0.01


@pytest.mark.slow
def test_a_diverged_run_says_so(train_py: Callable, tmp_path: Path) -> None:
    """A learning rate that ruins the model ends in one line that names it."""
    done = train_py(
        "optimizer.lr=0.9", "trainer.max_epochs=9", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not finite" in done.stderr
    assert "lower optimizer.lr (it is 0.9)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_early_stopping_watches_the_probe(make_config: Callable, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    callbacks = make_callbacks(make_config(), run, CleanStop(run)).ordered
    (stopping,) = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
    assert (stopping.monitor, stopping.mode, stopping.patience) == ("probe/significant_best", "max", 3)
    none = make_callbacks(make_config("early_stopping.patience=null"), run, CleanStop(run)).ordered
    assert not [callback for callback in none if isinstance(callback, EarlyStopping)]


def test_a_run_without_progress_stops_early(trained: Callable) -> None:
    """Patience 1 and weights that do not move: the second epoch is the last."""
    words = ("optimizer.lr=1e-30", "trainer.max_epochs=6", "early_stopping.patience=1")
    folder = trained(*FEW_STEPS, *words)
    assert [int(row["epoch"]) for row in probe_rows(folder)] == [0, 1, 2]


@pytest.mark.slow
def test_early_stopping_can_watch_the_training_loss(trained: Callable) -> None:
    """The reference study's way: chance alone decides when the mean loss of an epoch first fails to fall."""
    words = ("optimizer.lr=1e-30", "trainer.max_epochs=8", "early_stopping.patience=1")
    words += ("early_stopping.watch=train_loss", "loss.timesteps=independent", "lora.text_encoder=false")
    folder = trained(*words)
    rows = probe_rows(folder)[1:]
    losses = [float(row["train/epoch_loss"]) for row in rows]
    falls = [later < earlier for earlier, later in itertools.pairwise(losses)]
    assert len(losses) < 8 and not falls[-1] and all(falls[:-1])
    steps = [float(row["train/loss"]) for row in metric_rows(folder)]
    assert losses[0] == pytest.approx(sum(steps[:5]) / 5, rel=1e-6)


@pytest.mark.slow
def test_the_normalised_loss_is_about_1_without_learning(trained: Callable) -> None:
    """The step's loss over what the base scores at its timesteps: far steadier than the loss."""
    words = (
        "optimizer.lr=1e-30",
        "early_stopping.patience=null",
        "lora.dropout=0",
        "lora.text_encoder=false",
    )
    words += ("validation.items_per_image=12", "loss.caption_dropout=0")
    rows = metric_rows(trained(*words))
    normalised = np.array([float(row["train/loss_normalised"]) for row in rows])
    plain = np.array([float(row["train/loss"]) for row in rows])
    assert normalised.mean() == pytest.approx(1, abs=0.2)
    assert normalised.std() / normalised.mean() < plain.std() / plain.mean()


@pytest.mark.slow
def test_nothing_depends_on_global_generators(make_config: Callable, tmp_path: Path) -> None:
    """Scrambled between all steps, with dropout of weights and of captions: the same weights to the bit."""
    step = GhibliModule.training_step

    def scrambled(module: GhibliModule, batch: dict, batch_idx: int) -> dict:
        number = random.SystemRandom().randrange(2**32)
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        return step(module, batch, batch_idx)

    settings = (*ONE_CELL, "trainer.max_epochs=1", "lora.dropout=0.3", "loss.caption_dropout=0.5")
    settings += ("data.flip=true",)
    for name, replacement in (("plain", step), ("scrambled", scrambled)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GhibliModule, "training_step", replacement)
            train.run(make_config(*settings), RunDir(tmp_path / name))
    left, right = (torch.load(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("plain", "scrambled"))
    assert all(torch.equal(value, right["state_dict"][key]) for key, value in left["state_dict"].items())
    grids = [(tmp_path / n / "samples" / "adapter.png").read_bytes() for n in ("plain", "scrambled")]
    assert grids[0] == grids[1]


@pytest.fixture(scope="module")
def plain_losses(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The losses of a short run without any option."""
    folder = tmp_path_factory.mktemp("plain")
    train.run(make_config(*FEW_STEPS), RunDir(folder))
    return [row["train/loss"] for row in metric_rows(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["loss.snr_gamma=5", "loss.noise_offset=0.1", "data.flip=true", "loss.timesteps=independent"]
)
def test_options_change_the_loss(trained: Callable, plain_losses: list[str], option: str) -> None:
    """An option that is accepted has an effect."""
    losses = [row["train/loss"] for row in metric_rows(trained(*FEW_STEPS, option))]
    assert len(losses) == len(plain_losses) == 1 and losses != plain_losses


@pytest.mark.slow
def test_weights_stay_fp32_in_mixed_precision(trained: Callable) -> None:
    folder = trained("trainer.precision=bf16-mixed", *FEW_STEPS)
    state = torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    start, end = (float(row["probe/val_gain"]) for row in probe_rows(folder))
    assert start == 0 != end
