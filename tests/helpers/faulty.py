"""Runs train.py with a fault in one process of a run on several devices.

    FAULT=WHAT:RANK:CALL python tests/helpers/faulty.py OVERRIDES...

At the CALL-th training step of process RANK, WHAT happens: nan (the second image's latents turn to
nan), kill (SIGKILL), raise (a fault of ours), stuck (it waits for ever, and process 1 - RANK raises),
or sigint or sigterm (the process gets that signal).
"""

import os
import signal
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))


def main() -> None:
    what, rank, call = os.environ["FAULT"].split(":")
    here = int(os.environ.get("LOCAL_RANK", 0)) == int(rank)
    import train
    from ghibli.runs import distributed
    from ghibli.training.module import GhibliModule

    original, seen = GhibliModule.training_step, 0

    def step(module: object, batch: dict, batch_idx: int) -> dict:
        nonlocal seen
        seen += 1
        if seen == int(call):
            if here and what == "nan":
                print(f"broken: {batch['name'][1]}", flush=True)
                batch["latents"][1] = float("nan")
            elif here and what.startswith("sig"):
                os.kill(os.getpid(), getattr(signal, what.upper()))
            elif here and what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif here and what == "stuck":
                time.sleep(1000)
            elif (here and what == "raise") or what == "stuck":
                raise ZeroDivisionError("a fault of ours")
        return original(module, batch, batch_idx)

    GhibliModule.training_step = step
    distributed.GRACE = 2
    train.SCRIPT = Path(__file__)  # the further processes run this file too
    train.start()


if __name__ == "__main__":
    main()
