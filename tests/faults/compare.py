"""Are two run folders the same run? Weights, optimiser, rows and images, bit for bit."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

RESULT = ("state", "step", "epoch", "gain", "gain_se", "best_epoch", "findings", "base_hash", "data_hash")


def differences(left: Any, right: Any, name: str) -> Iterator[str]:
    """The names of everything that is not bit-equal in two nested containers of tensors."""
    if isinstance(left, dict):
        if left.keys() != right.keys():
            yield f"{name}: keys {left.keys() ^ right.keys()}"
            return
        for key in left:
            yield from differences(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            yield f"{name}: {len(left)} entries and {len(right)}"
        for index, pair in enumerate(zip(left, right, strict=False)):
            yield from differences(*pair, f"{name}.{index}")
    elif not (torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right):
        yield name


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint without the callbacks' states, which hold the folder's path."""
    content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return {key: value for key, value in content.items() if key != "callbacks"}


def rows_of(file: Path) -> list[dict[str, str]]:
    """A CSV file's rows without the columns that measure time."""
    with open(file, newline="") as opened:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(opened)]


def image(file: Path) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))


def different_parts(left: Path, right: Path) -> list[str]:
    """The names of all results in which two finished run folders differ; empty when they are the same."""
    found: list[str] = []
    for name in ("last", "best"):  # weights, optimiser, schedule, probe scores, position
        found += differences(checkpoint(left, name), checkpoint(right, name), name)
    for name in ("metrics.csv", "probe.csv"):
        if rows_of(left / name) != rows_of(right / name):
            found.append(name)
    if (left / "split.json").read_bytes() != (right / "split.json").read_bytes():
        found.append("split.json")
    statuses = [json.loads((folder / "status.json").read_text()) for folder in (left, right)]
    found += [f"status.json {key}" for key in RESULT if statuses[0].get(key) != statuses[1].get(key)]
    adapter = "pytorch_lora_weights.safetensors"
    for name in (f"adapter/{adapter}", f"adapter_last/{adapter}"):
        if (left / name).read_bytes() != (right / name).read_bytes():
            found.append(name)
    grids = [sorted(file.name for file in (folder / "samples").glob("*")) for folder in (left, right)]
    if grids[0] != grids[1]:
        return [*found, f"samples/ {grids[0]} and {grids[1]}"]
    for name in grids[0]:
        if not np.array_equal(image(left / "samples" / name), image(right / "samples" / name)):
            found.append(f"samples/{name}")
    return found
