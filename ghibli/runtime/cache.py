"""Cache of tensors on disk: computed once, then read from the cache folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ghibli.runtime.files import is_whole, write_with_checksum
from ghibli.runtime.provenance import processor_name

Rows = torch.Tensor | Sequence[torch.Tensor]  # one tensor where all rows have one shape
SHARD = 512  # rows per file of cached_rows


def cached(
    folder: Path, key: dict[str, Any], make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the tensors stored under a key; call `make` and store its result if there are none.

    A damaged file is recomputed.

    Args:
        folder: holds one kind of content; safe to delete. Runs may share it: a file is named after its
            key and never changes.
        key: everything the tensors depend on, JSON-serialisable. The processor, the torch version and the
            number of threads, on which rounding depends, are added here.
        make: computes the tensors, name -> tensor.
    """
    file = file_of(folder, key)
    if is_whole(file):
        return torch.load(file, weights_only=True)
    tensors = make()
    write_with_checksum(file, lambda opened: torch.save(tensors, opened))
    return tensors


def file_of(folder: Path, key: dict[str, Any]) -> Path:
    """Return the file in which `cached` stores the tensors of a key."""
    machine = {"processor": processor_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    name = hashlib.sha256(json.dumps(key | machine, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{name}.pt"


def cached_rows(
    folder: Path,
    key: dict[str, Any],
    names: list[str],
    make: Callable[[list[str], int, int], Mapping[str, Rows]],
) -> dict[str, Rows]:
    """Return tensors with one row per name, as `cached` does, computing only the rows that are missing.

    Rows are stored in shards of at most SHARD, each written as soon as it is computed, so that a killed
    process loses at most one shard.

    Args:
        folder, key: as for `cached`; the key holds everything a row depends on besides its name.
        names: of the rows to return, in this order; may repeat.
        make: (names, rows computed so far, rows to compute in total) -> the rows of these names.

    Returns:
        Field -> rows in the order of `names`: one tensor, or a list where the rows differ in shape.
    """
    stem = file_of(folder, key).stem
    shards = []
    for file in sorted(folder.glob(f"{stem}-*.pt")):
        if is_whole(file):
            shards.append(torch.load(file, weights_only=True))
    known = {name for shard in shards for name in shard["names"]}
    missing = [name for name in dict.fromkeys(names) if name not in known]
    for start in range(0, len(missing), SHARD):
        batch = missing[start : start + SHARD]
        shard = {"names": batch, **make(batch, start, len(missing))}
        suffix = hashlib.sha256(json.dumps(batch).encode()).hexdigest()[:16]
        write_with_checksum(folder / f"{stem}-{suffix}.pt", partial(torch.save, shard))
        shards.append(shard)
    rows = {name: (shard, row) for shard in shards for row, name in enumerate(shard["names"])}
    found = [rows[name] for name in names]
    fields = [field for field in shards[0] if field != "names"]
    return {field: stack_if_equal([shard[field][row] for shard, row in found]) for field in fields}


def stack_if_equal(rows: list[torch.Tensor]) -> Rows:
    """Stack rows of one shape into a tensor; return the rows themselves where their shapes differ."""
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows
