"""The untouched base's scores on the probe's items: computed once, then read from the cache."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ghibli.data.folder import CaptionedImage
from ghibli.runtime.files import write_json


def cached_scores(
    folder: Path,
    settings: dict[str, Any],
    images: list[CaptionedImage],
    score: Callable[[list[int]], torch.Tensor],
) -> torch.Tensor:
    """Return the scores of all images, (P, ...) float32; compute only those not in the cache.

    Args:
        folder: holds one file per set of scores computed together, named after settings and images;
            safe to delete. Runs may share it: none changes another's file, and a score depends on
            nothing but the settings and the image.
        settings: everything a score depends on, such as base, guidance, device.
        score: returns the scores of some images, (their number, ...), by their indices.
    """
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    known: dict[str, list[float]] = {}
    for file in sorted(folder.glob(f"{name[:32]}-*.json")):
        known |= read_scores(file, settings)
    keys = [hashlib.sha256(f"{p.content_hash}\n{p.caption}".encode()).hexdigest()[:32] for p in images]
    missing = [index for index, key in enumerate(keys) if key not in known]
    new = {}
    if missing:
        found = score(missing).cpu().double().tolist()
        new = {keys[index]: scores for index, scores in zip(missing, found, strict=True)}
        file = folder / f"{name[:32]}-{hashlib.sha256(repr(sorted(new)).encode()).hexdigest()[:16]}.json"
        write_json(file, {"settings": settings, "scores": new, "sha256": checksum(new)})
    return torch.tensor([(known | new)[key] for key in keys], dtype=torch.float32)


def read_scores(file: Path, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Read the scores of a cache file; empty when it is missing, damaged or of other settings."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("settings") != settings:
        return {}
    scores = content.get("scores", {})
    return scores if content.get("sha256") == checksum(scores) else {}


def checksum(scores: dict[str, list[float]]) -> str:
    """Return sha256 of the scores, which reveals a single flipped byte on disk."""
    return hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest()
