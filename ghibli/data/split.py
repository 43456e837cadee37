"""Split images by content into training and held-out set; near-duplicates stay on one side."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghibli.data.folder import CaptionedImage
from ghibli.images.duplicates import DUPLICATE, Copies, near_duplicates
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
    if not train:
        return Split([], held_out, {})
    ours, theirs = (np.stack([thumbnails[image.path] for image in side]) for side in (train, held_out))
    copies = {place: train[one] for one, place, _ in near_duplicates(ours, theirs)}
    moved: dict[int, CaptionedImage] = {}  # place in held_out -> its near-duplicate in training
    known = Copies(theirs) if copies else None
    while known and copies and len(moved) + len(copies) < len(held_out):  # something must be held out
        moved |= copies
        copies = {place: held_out[one] for place, one in copies_of(sorted(copies), known, moved).items()}
    pairs = {held_out[place]: image for place, image in moved.items()}
    in_training = {*train, *pairs}
    return Split([p for p in images if p in in_training], [p for p in held_out if p not in pairs], pairs)


def copies_of(new: list[int], known: Copies, moved: Container[int]) -> dict[int, int]:
    """Return held-out image -> the one of `new` that it is a near-duplicate of, all as places; no moved one.

    Every image is in `new` at most once in a split, so all of it takes time by the number of images.
    """
    best: dict[int, tuple[float, int]] = {}
    for one, (places, similarity) in zip(new, known.of(known.thumbnails[new]), strict=True):
        near = similarity >= DUPLICATE
        for place, value in zip(places[near].tolist(), similarity[near].tolist(), strict=True):
            if place not in moved and value > best.get(place, (0.0, 0))[0]:
                best[place] = (value, one)
    return {place: best[place][1] for place in sorted(best)}


def first_by_content(images: list[CaptionedImage], count: int) -> list[CaptionedImage]:
    """Return the `count` images with the lowest content hashes, lowest first, whatever the folder's order.

    Of files with the same bytes only the first by name counts.
    """
    by_content = {p.content_hash: p for p in sorted(images, key=lambda p: str(p.path), reverse=True)}
    return [by_content[content] for content in sorted(by_content)[:count]]
