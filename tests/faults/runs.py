"""The demo run that faults are done to, as processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
TINY = (  # the real thing in small: the demo at 64 px, rank 4
    "model=demo", "data=demo", "model.resolution=64", "lora.rank=4", "lora.dropout=0.1",
    "loss.caption_dropout=0.5", "early_stopping.patience=null", "trainer.log_every_n_steps=1",
    "validation.items_per_image=2", "validation.max_images=2", "wandb.mode=disabled",
    "sample.num_inference_steps=2", "sample.prompts=[A panda]",
)  # fmt: skip
EPOCHS, STEPS = 4, 10  # optimiser steps of an epoch
FORTY_STEPS = (  # 4 epochs of 10 optimiser steps of 4 forward passes, 4 probes, grids after epochs 2 and 4
    *TINY, "data.draw.count=48", "data.batch_size=1", "data.accumulate=4", "data.workers=2",
    f"trainer.max_epochs={EPOCHS}", "checkpoint.every_n_steps=3", "sample.every_n_epochs=2",
)  # fmt: skip
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def new_command(folder: Path, settings: tuple[str, ...], cache: Path) -> list[str]:
    """The command of a new run in this folder."""
    train = [sys.executable, str(REPO / "train.py")]
    return [*train, *settings, f"cache_dir={cache}", f"hydra.run.dir={folder}"]


def resume_command(folder: Path) -> list[str]:
    return [sys.executable, str(REPO / "train.py"), f"resume={folder}"]


def next_command(folder: Path, settings: tuple[str, ...], cache: Path) -> list[str]:
    """What a user types after a run has gone: resume it, or the same again where nothing was saved yet."""
    saved = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
    if any(file.exists() for file in saved):
        return resume_command(folder)
    return new_command(folder, settings, cache)


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Starts a command; what it prints is added to the log, so that no pipe can hold it up."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        environment = os.environ | ENVIRONMENT
        return subprocess.Popen(command, cwd=REPO, env=environment, stdout=file, stderr=file)
