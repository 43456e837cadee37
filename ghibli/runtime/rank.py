"""Which of the processes of a run this one is."""

import os

RANKS = ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")  # what launchers set


def is_first() -> bool:
    """True for the only process of a run, or the first of several: the one that writes and speaks."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANKS)
