"""Killed with SIGKILL and resumed equals never stopped: weights, optimiser, metrics, grids, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from faults.compare import checkpoint, different_parts
from helpers.commands import CHECKPOINTS, GRIDS, REPO, SMALL, run_python

pytestmark = pytest.mark.slow

EXTRA = (
    *GRIDS, *CHECKPOINTS, "sample.samplers=[ddpm]", "sample.guidance=[7.5]", "sample.prompts=[A panda]",
    "lora.dropout=0.1", "loss.caption_dropout=0.5", "validation.price_images=3", "loss.keep=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_python(str(REPO / "train.py"), *overrides(images, folder))
    assert done.returncode == 0, done.stderr
    return folder


def overrides(images: Path, folder: Path) -> list[str]:
    return [*SMALL, f"data.root={images}", "data.draw=null", *EXTRA, f"hydra.run.dir={folder}"]


# Of the 2 epochs with 5 optimiser steps of 2 batches each, one validation and one grid an epoch.
MOMENTS = [
    ("training_step", 8),  # in the middle of an accumulation, in the first epoch
    ("grid", 1),  # after the first validation, before the epoch's checkpoint
    ("validation_step", 2),  # in the second epoch's validation, of one pass
    ("save_checkpoint", 4),  # while the first epoch's checkpoint is written
    ("training_step", 17),  # in the second epoch
]


@pytest.mark.parametrize(("where", "call"), MOMENTS)
def test_killed_and_resumed_equals_undisturbed(
    undisturbed: Path, images: Path, tmp_path: Path, where: str, call: int
) -> None:
    killed = run_python(
        str(REPO / "tests" / "helpers" / "killed.py"), where, str(call), *overrides(images, tmp_path)
    )
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "adapter").exists()
    resumed = run_python(str(REPO / "train.py"), f"resume={tmp_path}")
    assert resumed.returncode == 0, resumed.stderr
    assert not different_parts(undisturbed, tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ("lora.variant=loha", "lora.targets=all", "lora.dropout=0.2"),
        ("lora.variant=lokr", "lora.targets=all", "lora.dropout=0.2"),
        ("lora.variant=oft", "lora.rank=4", "lora.dropout=0.2"),
    ],
    ids=lambda words: words[0],
)
def test_every_kind_of_adapter_too(images: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Killed in the middle of an accumulation, in the only epoch."""
    words = (*words, "trainer.max_epochs=1")
    whole, half = tmp_path / "whole", tmp_path / "half"
    done = run_python(str(REPO / "train.py"), *overrides(images, whole), *words)
    assert done.returncode == 0, done.stderr
    killed = run_python(
        str(REPO / "tests" / "helpers" / "killed.py"), "training_step", "8", *overrides(images, half), *words
    )
    assert killed.returncode == -9, killed.stderr
    assert run_python(str(REPO / "train.py"), f"resume={half}").returncode == 0
    assert not different_parts(whole, half)


SCHEDULE_FREE = ("optimizer.name=adamw_schedulefree", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def averaged(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of a schedule-free optimiser, which has two sets of weights."""
    pytest.importorskip("schedulefree", reason="extra of this project")
    folder = tmp_path_factory.mktemp("averaged")
    done = run_python(str(REPO / "train.py"), *overrides(images, folder), *SCHEDULE_FREE)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("where", "call"), [("save_checkpoint", 4), ("training_step", 17)])
def test_averaged_weights_too(averaged: Path, images: Path, tmp_path: Path, where: str, call: int) -> None:
    """Both sets go on where they were."""
    words = (where, str(call), *overrides(images, tmp_path), *SCHEDULE_FREE)
    killed = run_python(str(REPO / "tests" / "helpers" / "killed.py"), *words)
    assert killed.returncode == -9, killed.stderr
    assert run_python(str(REPO / "train.py"), f"resume={tmp_path}").returncode == 0
    assert not different_parts(averaged, tmp_path)
    kept = checkpoint(averaged, "last")
    assert not any(group["train_mode"] for group in kept["optimizer_states"][0]["param_groups"])


def test_an_average_of_the_weights_too(images: Path, tmp_path: Path) -> None:
    """Killed in the second epoch, in the middle of an accumulation, with both sets of weights in a file."""
    words, whole, half = ("optimizer.ema_decay=0.8",), tmp_path / "whole", tmp_path / "half"
    done = run_python(str(REPO / "train.py"), *overrides(images, whole), *words)
    assert done.returncode == 0, done.stderr
    killed = run_python(
        str(REPO / "tests" / "helpers" / "killed.py"), "training_step", "12", *overrides(images, half), *words
    )
    assert killed.returncode == -9, killed.stderr
    assert run_python(str(REPO / "train.py"), f"resume={half}").returncode == 0
    assert not different_parts(whole, half)


def test_the_same_command_twice_is_bit_equal(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    again = run_python(str(REPO / "train.py"), *overrides(images, tmp_path))
    assert again.returncode == 0, again.stderr
    assert not different_parts(undisturbed, tmp_path)


def test_a_checkpoint_holds_no_frozen_weights(undisturbed: Path, train_py: Callable) -> None:
    content = checkpoint(undisturbed, "last")
    assert all("lora_" in name for name in content["state_dict"])
    assert (undisturbed / "checkpoints" / "last.ckpt").stat().st_size < 20e6


def test_a_finished_run_resumes_to_the_same_end(undisturbed: Path) -> None:
    before = (undisturbed / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    done = run_python(str(REPO / "train.py"), f"resume={undisturbed}")
    assert done.returncode == 0, done.stderr
    assert (undisturbed / "adapter" / "pytorch_lora_weights.safetensors").read_bytes() == before
