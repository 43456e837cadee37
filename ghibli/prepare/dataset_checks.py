"""What is odd about an image set: images and captions in, findings out. Nothing is changed."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ghibli.data.folder import NO_CAPTION, CaptionedImage, ImageFolder, summarise
from ghibli.evaluation.diagnosis import Finding
from ghibli.images.duplicates import near_duplicates

STUTTER = re.compile(r"\b(\w+(?: \w+){0,3})(?:\W+\1\b){2,}", re.IGNORECASE)  # a phrase three times in a row
SHARED = 0.5  # share of the images with another one's caption from which the words teach little
NAMED = 3  # examples in one sentence


def lint(
    folder: ImageFolder,
    train: list[CaptionedImage],
    held_out: list[CaptionedImage],
    thumbnails: dict[Path, np.ndarray],
    moved: dict[CaptionedImage, CaptionedImage],
) -> list[Finding]:
    """All that can be said without the base.

    Args:
        train, held_out, moved: the split of folder.images.
        thumbnails: of every image, by file.
    """
    found = [
        images(train, held_out),
        unusable(folder),
        missing_captions(folder),
        shared_captions(folder.images),
        stuttering_captions(folder.images),
        moved_to_training(moved),
        across_the_split(train, held_out, thumbnails),
    ]
    return [finding for finding in found if finding is not None]


def some(examples: Iterable[str]) -> str:
    """The first NAMED examples and how many more there are."""
    examples = list(examples)
    more = f" and {len(examples) - NAMED} more" if len(examples) > NAMED else ""
    return f"{', '.join(examples[:NAMED])}{more}"


def images(train: list[CaptionedImage], held_out: list[CaptionedImage]) -> Finding:
    return Finding(
        "images",
        f"{len(train) + len(held_out)} usable: {len(train)} to train on, {len(held_out)} held out by content",
        "note",
    )


def unusable(folder: ImageFolder) -> Finding | None:
    """Images that are skipped for another reason than a missing caption."""
    skipped = {name: why for name, why in folder.unusable.items() if not why.startswith(NO_CAPTION)}
    if not skipped:
        return None
    total = len(folder.images) + len(folder.unusable)
    return Finding(
        "unusable images",
        f"of {total} images {summarise(skipped, elsewhere='')}: mend or remove them",
    )


def missing_captions(folder: ImageFolder) -> Finding | None:
    """Images that are skipped because nothing says what is on them."""
    names = [name for name, why in folder.unusable.items() if why.startswith(NO_CAPTION)]
    if not names:
        return None
    return Finding(
        "missing captions",
        f"{len(names)} of {len(folder.images) + len(folder.unusable)} images have no caption and are "
        f"skipped: {some(names)}; write one, or give all of them the same with data.caption=TEXT",
    )


def shared_captions(images: list[CaptionedImage]) -> Finding | None:
    """Images with the caption of another image; a few are normal."""
    counts = Counter(image.caption for image in images)
    shared = sum(count for count in counts.values() if count > 1)
    if not shared:
        return None
    caption, count = counts.most_common(1)[0]
    much = shared > SHARED * len(images)
    advice = "a run learns the look and hardly what the words mean; captions of their own help"
    return Finding(
        "duplicate captions",
        f"{shared} of {len(images)} images share their caption with another, {count} of them "
        f"`{caption}`: {advice if much else 'few enough to do no harm'}",
        "warning" if much else "note",
    )


def stuttering_captions(images: list[CaptionedImage]) -> Finding | None:
    """Captions in which words repeat three times in a row, as captioning models do when they fail."""
    found = [(image, match) for image in images if (match := STUTTER.search(image.caption))]
    if not found:
        return None
    examples = some(f"{image.path.name} (`{shortened(match[0])}`)" for image, match in found)
    return Finding(
        "stuttering captions",
        f"{len(found)} of {len(images)} captions repeat a word three times or more, as captioning models "
        f"do when they fail: {examples}; write these by hand, or take the images out",
    )


def too_long(images: list[CaptionedImage], tokenizer: Any) -> Finding | None:
    """Captions of more tokens than the text encoder takes, with the words it never sees."""
    limit = tokenizer.model_max_length
    rows = tokenizer([image.caption for image in images], verbose=False).input_ids
    lost = [
        (image, tokenizer.decode(row[limit - 1 : -1]).strip())  # the end token keeps the last place
        for image, row in zip(images, rows, strict=True)
        if len(row) > limit
    ]
    if not lost:
        return None
    examples = some(f"{image.path.name} loses `{shortened(words, 100)}`" for image, words in lost)
    return Finding(
        "long captions",
        f"{len(lost)} of {len(images)} captions have more than the {limit - 2} tokens the text encoder "
        f"reads, and data.style comes last: {examples}; shorten them",
    )


def shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def moved_to_training(moved: dict[CaptionedImage, CaptionedImage]) -> Finding | None:
    """Images that are not held out although their hash says so."""
    if not moved:
        return None
    examples = some(f"{image.path.name} like {other.path.name}" for image, other in moved.items())
    return Finding(
        "near-duplicates",
        f"{len(moved)} images that would be held out are nearly the same as a training image and train "
        f"with it: {examples}",
        "note",
    )


def across_the_split(
    train: list[CaptionedImage], held_out: list[CaptionedImage], thumbnails: dict[Path, np.ndarray]
) -> Finding | None:
    """Held-out images that are also trained on, saved anew or in another size."""

    def rows(images: list[CaptionedImage]) -> np.ndarray:
        return np.stack([thumbnails[image.path] for image in images])

    pairs = near_duplicates(rows(train), rows(held_out))
    if not pairs:
        return None
    pairs.sort(key=lambda pair: -pair[2])
    examples = some(f"{held_out[v].path.name} like {train[t].path.name}" for t, v, _ in pairs)
    return Finding(
        "near-duplicates",
        f"{len(pairs)} of {len(held_out)} held-out images are nearly the same as a training image: "
        f"{examples}; on these the gain is memory; remove one of each pair",
    )
