"""Runs train.py and kills its own process with SIGKILL at the n-th call of one function.

    python tests/helpers/killed.py WHERE N OVERRIDES...

WHERE is training_step, validation_step, sample or save_checkpoint (killed before the rename).
"""

import os
import signal
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))


def kill_at_call(owner: object, name: str, call: int) -> None:
    """Replaces owner.name by a version that kills the process when called for the `call`-th time."""
    original, seen = getattr(owner, name), 0

    def counting(*arguments: object, **options: object) -> object:
        nonlocal seen
        seen += 1
        if seen == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counting)


def main() -> None:
    where, call = sys.argv[1], int(sys.argv[2])
    sys.argv[1:3] = []
    from ghibli.diffusion import samplers
    from ghibli.runs.launch import hydra_entry
    from ghibli.training.callbacks import checkpoints, samples
    from ghibli.training.module import GhibliModule

    owners = {
        "training_step": (GhibliModule, "training_step"),
        "validation_step": (GhibliModule, "validation_step"),
        "sample": (samplers, "sample"),
        "grid": (samples, "compose_grid"),
        "save_checkpoint": (checkpoints.torch, "save"),
    }
    kill_at_call(*owners[where], call)
    import train

    hydra_entry(REPO / "conf", "train", train.main)


if __name__ == "__main__":
    main()
