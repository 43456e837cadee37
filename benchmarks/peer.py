"""Times train.py beside another trainer's command, both as a user starts them, in turns."""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
FEW, MANY = 12, 42  # optimiser steps; the difference leaves start and loading out


class Ratio(NamedTuple):
    """How many times as fast as the peer train.py is, over the rounds."""

    value: float
    spread: float  # standard deviation between rounds
    ours: float  # seconds a step
    peers: float


def run_seconds(command: list[str]) -> float:
    """Wall seconds of a command.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    start = time.perf_counter()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - start


def step_seconds(template: str) -> float:
    """Seconds of one step of a command with {steps} and {out} in it."""
    with tempfile.TemporaryDirectory() as out:
        few, many = (
            run_seconds(shlex.split(template.format(steps=steps, out=f"{out}/{steps}")))
            for steps in (FEW, MANY)
        )
    return (many - few) / (MANY - FEW)


def compare(words: list[str], peer: str, rounds: int) -> Ratio:
    """Runs both in turns; the first round only fills their caches.

    Args:
        words: overrides of train.py, which must fit the peer's settings.
        peer: the other command, with {steps} and {out} where those belong.
    """
    ours = shlex.join([
        sys.executable, "train.py", *words, "wandb.mode=disabled", "sample.every_n_epochs=0",
        "validation.max_images=1", "validation.items_per_image=1",
        "+trainer.max_steps={steps}", "hydra.run.dir={out}",
    ])  # fmt: skip
    pairs = [(step_seconds(ours), step_seconds(peer)) for _ in range(rounds + 1)][1:]
    ratios = [theirs / own for own, theirs in pairs]
    spread = stdev(ratios) if rounds > 1 else 0.0
    return Ratio(mean(ratios), spread, mean(own for own, _ in pairs), mean(theirs for _, theirs in pairs))
