"""What the untouched base scores on the probe's items: computed once, then read from the cache."""

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
    score: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """The scores of all images, (P, ...) float32; only those that are not in the cache are computed.

    Args:
        folder: holds a file for each set of scores that were computed together, called after the
            settings and the images; safe to delete. Runs may share it: none changes another's file,
            and a score depends on nothing but the settings and the image.
        settings: everything that changes a score, such as base, guidance, device.
        score: index of an image -> its scores.
    """
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    known: dict[str, list[float]] = {}
    for file in sorted(folder.glob(f"{name[:32]}-*.json")):
        known |= read_scores(file, settings)
    keys = [hashlib.sha256(f"{p.content_hash}\n{p.caption}".encode()).hexdigest()[:32] for p in images]
    missing = [index for index, key in enumerate(keys) if key not in known]
    new = {keys[index]: score(index).cpu().double().tolist() for index in missing}
    if new:
        file = folder / f"{name[:32]}-{hashlib.sha256(repr(sorted(new)).encode()).hexdigest()[:16]}.json"
        write_json(file, {"settings": settings, "scores": new, "sha256": checksum(new)})
    return torch.tensor([(known | new)[key] for key in keys], dtype=torch.float32)


def read_scores(file: Path, settings: dict[str, Any]) -> dict[str, list[float]]:
    """The scores in a cache file; none when it is missing, damaged or of other settings."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("settings") != settings:
        return {}
    scores = content.get("scores", {})
    return scores if content.get("sha256") == checksum(scores) else {}


def checksum(scores: dict[str, list[float]]) -> str:
    """sha256 of the scores, so that one flipped byte on the disk is noticed."""
    return hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest()
