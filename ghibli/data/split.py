"""Split images by content into training and held-out set; near-duplicates stay on one side."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghibli.data.folder import CaptionedImage
from ghibli.images.duplicates import near_duplicates
from ghibli.runtime.seeding import hash_fraction


@dataclass(frozen=True)
class Split:
    """A training set and a held-out set."""

    train: list[CaptionedImage]
    held_out: list[CaptionedImage]
    moved: dict[CaptionedImage, CaptionedImage]  # to training -> the near-duplicate there


def split_by_content(
    images: list[CaptionedImage], val_fraction: float
) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Return (training images, held-out images), by file hash alone: adding images moves none.

    A very small set may have no hash below the threshold; then the lowest one is held out.
    """
    held_out = {p.content_hash for p in images if hash_fraction(p.content_hash) < val_fraction}
    if not held_out:
        held_out = {min(p.content_hash for p in images)}
    train = [p for p in images if p.content_hash not in held_out]
    val = [p for p in images if p.content_hash in held_out]
    return train, val


def split_apart(
    images: list[CaptionedImage], thumbnails: dict[Path, np.ndarray], val_fraction: float
) -> Split:
    """Split by content, but keep near-duplicates of training images in training.

    The gain on a held-out copy of a training image would be memory.

    Args:
        thumbnails: of every image, by file; what duplicates.near_duplicates compares.
        val_fraction: share of images held out, 0 .. 1.
    """
    train, held_out = split_by_content(images, val_fraction)
    moved: dict[CaptionedImage, CaptionedImage] = {}
    new = train  # what the held-out images have not been compared with
    while new and held_out:
        pairs = near_duplicates(*(np.stack([thumbnails[p.path] for p in side]) for side in (new, held_out)))
        if not pairs or len(pairs) == len(held_out):  # something must be held out
            break
        copies = {held_out[v]: new[t] for t, v, _ in pairs}
        moved |= copies
        held_out = [p for p in held_out if p not in copies]
        new = [p for p in images if p in copies]
    in_training = {*train, *moved}
    return Split([p for p in images if p in in_training], held_out, moved)


def first_by_content(images: list[CaptionedImage], count: int) -> list[CaptionedImage]:
    """Return the `count` images with the lowest content hashes, lowest first, whatever the folder's order.

    Of files with the same bytes only the first by name counts.
    """
    by_content = {p.content_hash: p for p in sorted(images, key=lambda p: str(p.path), reverse=True)}
    return [by_content[content] for content in sorted(by_content)[:count]]
