"""Run a script in turns and time its optimiser steps: stamped.py FILE TURN SCRIPT ARGS...

After every TURN steps the process stops itself, as Ctrl-Z would, until it is sent SIGCONT. FILE gets a line a
step: seconds since the last step's end, or since the process was woken.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Stamps:
    """Writes the seconds of each step; called when an optimiser has stepped, whoever trains."""

    def __init__(self, file: Path, turn: int):
        self.file, self.turn = file, turn
        self.steps, self.since = 0, time.perf_counter()

    def __call__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, self.steps = time.perf_counter() - self.since, self.steps + 1
        with self.file.open("a") as file:
            file.write(f"{seconds!r}\n")
        if self.steps % self.turn == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.since = time.perf_counter()


def main() -> None:
    """Run the script as __main__, as Python would."""
    file, turn, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    register_optimizer_step_post_hook(Stamps(file, turn))
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
