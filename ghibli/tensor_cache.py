"""Tensors that are slow to make and always the same: made once, then read from the cache folder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ghibli.run_dir import is_whole, processor_name, write_sealed


def cached(
    folder: Path, key: dict[str, Any], make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What `make` gives, or gave before under this key. A damaged file is made anew.

    Args:
        folder: of one kind of content; safe to delete. Runs may share it: a file is called after its
            key and never changes.
        key: all that the tensors depend on; the processor, the version of torch and the number of
            threads, on which rounding depends, are added here.
    """
    file = file_of(folder, key)
    if is_whole(file):
        return torch.load(file, weights_only=True)
    tensors = make()
    write_sealed(file, lambda opened: torch.save(tensors, opened))
    return tensors


def file_of(folder: Path, key: dict[str, Any]) -> Path:
    """Where `cached` keeps what belongs to a key."""
    place = {"processor": processor_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    full = key | place
    name = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{name}.pt"
