"""Tensors that are slow to make and always the same: made once, then read from the cache folder."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ghibli.runtime.files import is_whole, write_with_checksum
from ghibli.runtime.provenance import processor_name

SHARD = 512  # rows in a file of cached_rows


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
    write_with_checksum(file, lambda opened: torch.save(tensors, opened))
    return tensors


def file_of(folder: Path, key: dict[str, Any]) -> Path:
    """Where `cached` keeps what belongs to a key."""
    place = {"processor": processor_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    full = key | place
    name = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{name}.pt"


def cached_rows(
    folder: Path,
    key: dict[str, Any],
    names: list[str],
    make: Callable[[list[str], int, int], dict[str, Sequence[torch.Tensor]]],
) -> dict[str, Sequence[torch.Tensor]]:
    """Tensors with a row for each name, as `cached`, but a new name costs no more than its own row.

    Rows lie in shards of at most SHARD, written as soon as they are made: what is killed goes on there.

    Args:
        key: all that a row depends on beside its name.
        make: (names, rows made before, rows to make in all) -> the rows of these names.
    """
    place = file_of(folder, key)
    shards = []
    for file in sorted(folder.glob(f"{place.stem}-*.pt")):
        if is_whole(file):
            shards.append(torch.load(file, weights_only=True))
    known = {name for shard in shards for name in shard["names"]}
    missing = [name for name in dict.fromkeys(names) if name not in known]
    for start in range(0, len(missing), SHARD):
        part = missing[start : start + SHARD]
        shard = {"names": part, **make(part, start, len(missing))}
        suffix = hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]
        write_with_checksum(
            place.with_name(f"{place.stem}-{suffix}.pt"),
            lambda opened, shard=shard: torch.save(shard, opened),
        )
        shards.append(shard)
    rows = {name: (shard, row) for shard in shards for row, name in enumerate(shard["names"])}
    found = [rows[name] for name in names]
    fields = [field for field in shards[0] if field != "names"]
    return {field: stacked([shard[field][row] for shard, row in found]) for field in fields}


def stacked(rows: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor of rows of one shape; the rows themselves where their shapes differ."""
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows
