"""Rank of this process among those of a run."""

import os

RANKS = ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")  # set by launchers


def is_first() -> bool:
    """Return whether this is the only process of a run or the first of several, which writes and prints."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANKS)
