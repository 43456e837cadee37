"""Time train.py against another trainer's script: both are alive at once and step in turns on one machine."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ratios import Ratio, ratio

REPO = Path(__file__).resolve().parents[1]
TURN = 5  # steps that one makes while the other is stopped
FIRST = 2  # turns of each that are not counted: allocators and caches settle


class Comparison(NamedTuple):
    """How many times faster than its peer train.py is, over pairs of turns, and their steps' medians."""

    ratio: Ratio
    ours: float  # seconds per step
    peers: float
    steps: int  # of each


class Trainer:
    """A training process that runs only in its turns."""

    def __init__(self, command: list[str], folder: Path):
        """Start `python SCRIPT ARGS...` under stamped.py; it runs until its first turn is over."""
        folder.mkdir()
        self.stamps, self.log = folder / "stamps", folder / "log"
        script = [
            sys.executable,
            str(REPO / "benchmarks" / "stamped.py"),
            str(self.stamps),
            str(TURN),
            *command,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(script, cwd=REPO, stdout=log, stderr=log)
        self.is_alive = self.waits_for_its_turn()

    def waits_for_its_turn(self) -> bool:
        """Wait until a turn is over; return False if the process has ended."""
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return False

    def take_turn(self) -> None:
        """Let it make TURN steps."""
        if self.is_alive:
            os.kill(self.process.pid, signal.SIGCONT)
            self.is_alive = self.waits_for_its_turn()

    def turns(self) -> list[list[float]]:
        """Return the seconds of each step, by turn.

        Raises:
            SystemExit: it failed; the message holds the end of its output.
        """
        if not self.is_alive and self.process.returncode:
            raise SystemExit(f"{shlex.join(self.process.args)}:\n{self.log.read_text()[-2000:]}")
        seconds = [float(line) for line in self.stamps.read_text().split()]
        return [seconds[start : start + TURN] for start in range(0, len(seconds) - TURN + 1, TURN)]

    def end(self) -> None:
        """Kill it."""
        if self.is_alive:
            self.process.kill()
            self.process.wait()


def time_against_peer(overrides: list[str], peer: str, steps: int) -> Comparison:
    """Let train.py and its peer make this many steps each, in turns, and compare the steps' times.

    A step lasts from the end of one to the end of the next: loader, logging and callbacks included, start,
    encoding and the probe not, as long as the steps fit into one epoch.

    Args:
        overrides: of train.py; they must match the peer's settings.
        peer: the other command, `SCRIPT ARGS...`, with the placeholders {steps} and {out}.
    """
    count = steps + (FIRST + 1) * TURN
    ours = [
        "train.py", *overrides, "wandb.mode=disabled", "sample.every_n_epochs=0",
        "validation.max_images=1", "validation.items_per_image=1", f"+trainer.max_steps={count}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        words = shlex.split(peer.format(steps=count, out=f"{out}/peer/out"))
        pair = [
            Trainer([*ours, f"hydra.run.dir={out}/ours/run"], Path(out) / "ours"),
            Trainer(words, Path(out) / "peer"),
        ]
        try:
            for _ in range(FIRST + steps // TURN - 1):
                for trainer in pair:
                    trainer.take_turn()
            own, theirs = ([median(turn) for turn in trainer.turns()][FIRST:] for trainer in pair)
        finally:
            for trainer in pair:
                trainer.end()
    pairs = min(len(own), len(theirs))
    found = ratio(theirs[:pairs], own[:pairs])
    return Comparison(found, median(own), median(theirs), pairs * TURN)
