"""Time train.py against another trainer's command, alternately, both started as a user would."""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
FEW, MANY = 12, 42  # optimiser steps; their difference excludes start-up and loading


class Ratio(NamedTuple):
    """How many times faster than its peer train.py is, over the rounds."""

    value: float
    spread: float  # standard deviation between rounds
    ours: float  # seconds per step
    peers: float  # seconds per step


def run_seconds(command: list[str]) -> float:
    """Run a command and measure its wall time in seconds.

    Raises:
        SystemExit: it failed; the message holds the end of its output.
    """
    start = time.perf_counter()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - start


def step_seconds(template: str) -> float:
    """Measure the seconds per step of a command that contains {steps} and {out}."""
    with tempfile.TemporaryDirectory() as out:
        few, many = (
            run_seconds(shlex.split(template.format(steps=steps, out=f"{out}/{steps}")))
            for steps in (FEW, MANY)
        )
    return (many - few) / (MANY - FEW)


def time_against_peer(overrides: list[str], peer: str, rounds: int) -> Ratio:
    """Time train.py and its peer alternately; a first round, not counted, fills their caches.

    Args:
        overrides: of train.py; they must match the peer's settings.
        peer: the other command, with the placeholders {steps} and {out}.
    """
    ours = shlex.join([
        sys.executable, "train.py", *overrides, "wandb.mode=disabled", "sample.every_n_epochs=0",
        "validation.max_images=1", "validation.items_per_image=1",
        "+trainer.max_steps={steps}", "hydra.run.dir={out}",
    ])  # fmt: skip
    pairs = [(step_seconds(ours), step_seconds(peer)) for _ in range(rounds + 1)][1:]
    ratios = [theirs / own for own, theirs in pairs]
    spread = stdev(ratios) if rounds > 1 else 0.0
    return Ratio(mean(ratios), spread, mean(own for own, _ in pairs), mean(theirs for _, theirs in pairs))
