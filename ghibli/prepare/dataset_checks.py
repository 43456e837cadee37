"""Checks of an image set: images and captions in, findings out. Nothing is changed."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ghibli.data.folder import NO_CAPTION, CaptionedImage, ImageFolder, summarise
from ghibli.evaluation.diagnosis import Finding
from ghibli.images.duplicates import near_duplicates
from ghibli.runtime.wording import number_of

STUTTER = re.compile(r"\b(\w+(?: \w+){0,3})(?:\W+\1\b){2,}", re.IGNORECASE)  # a phrase three times in a row
MAX_SHARED_CAPTIONS = 0.5  # share of images with another image's caption above which captions teach little
MAX_EXAMPLES = 3  # in one sentence


def check_dataset(
    folder: ImageFolder,
    train: list[CaptionedImage],
    held_out: list[CaptionedImage],
    thumbnails: dict[Path, np.ndarray],
    moved: dict[CaptionedImage, CaptionedImage],
) -> list[Finding]:
    """Return every finding that does not need the base model.

    Args:
        train, held_out: the split of folder.images.
        thumbnails: of every image, by file.
        moved: image that was moved from the held-out set to training -> its near-duplicate there.
    """
    found = [
        image_counts(train, held_out),
        unusable_images(folder),
        files_not_read(folder),
        missing_captions(folder),
        shared_captions(folder.images),
        stuttering_captions(folder.images),
        moved_to_training(moved),
        duplicates_across_split(train, held_out, thumbnails),
    ]
    return [finding for finding in found if finding is not None]


def first_few(examples: Iterable[str]) -> str:
    """Join the first MAX_EXAMPLES examples, and count the rest."""
    examples = list(examples)
    more = f" and {len(examples) - MAX_EXAMPLES} more" if len(examples) > MAX_EXAMPLES else ""
    return f"{', '.join(examples[:MAX_EXAMPLES])}{more}"


def image_counts(train: list[CaptionedImage], held_out: list[CaptionedImage]) -> Finding:
    """Report how many images are trained on and how many are held out."""
    return Finding(
        "images",
        f"{len(train) + len(held_out)} usable: {len(train)} to train on, {len(held_out)} held out by content",
        "note",
    )


def unusable_images(folder: ImageFolder) -> Finding | None:
    """Report images that are skipped for any reason other than a missing caption."""
    skipped = {name: why for name, why in folder.unusable.items() if not why.startswith(NO_CAPTION)}
    if not skipped:
        return None
    total = len(folder.images) + len(folder.unusable)
    return Finding(
        "unusable images",
        f"of {total} images {summarise(skipped, elsewhere='')}: fix or remove them",
    )


def files_not_read(folder: ImageFolder) -> Finding | None:
    """Report what lies in the folder and is not read: other formats, images in subfolders."""
    if not folder.not_read:
        return None
    return Finding(
        "not read",
        f"beside the {len(folder.images) + len(folder.unusable)} images there are {folder.not_read}, which "
        "are not read: convert images or move them to the others, and name captions as docs/data.md shows",
    )


def missing_captions(folder: ImageFolder) -> Finding | None:
    """Report images that are skipped because they have no caption."""
    names = [name for name, why in folder.unusable.items() if why.startswith(NO_CAPTION)]
    if not names:
        return None
    return Finding(
        "missing captions",
        f"{len(names)} of {len(folder.images) + len(folder.unusable)} images have no caption and are "
        f"skipped: {first_few(names)}; write captions, or give all of them the same with data.caption=TEXT",
    )


def shared_captions(images: list[CaptionedImage]) -> Finding | None:
    """Report images with the caption of another image; a few are normal."""
    counts = Counter(image.caption for image in images)
    shared = sum(count for count in counts.values() if count > 1)
    if not shared:
        return None
    caption, count = counts.most_common(1)[0]
    is_many = shared > MAX_SHARED_CAPTIONS * len(images)
    advice = "a run learns the style but hardly what the words mean; give each image its own caption"
    return Finding(
        "duplicate captions",
        f"{shared} of {len(images)} images share their caption with another, {count} of them "
        f"`{caption}`: {advice if is_many else 'too few to matter'}",
        "warning" if is_many else "note",
    )


def stuttering_captions(images: list[CaptionedImage]) -> Finding | None:
    """Report captions that repeat a phrase three times in a row, as captioning models do when they fail."""
    found = [(image, match) for image in images if (match := STUTTER.search(image.caption))]
    if not found:
        return None
    examples = first_few(f"{image.name} (`{truncate(match[0])}`)" for image, match in found)
    return Finding(
        "stuttering captions",
        f"{len(found)} of {len(images)} captions repeat a word three times or more, as captioning models "
        f"do when they fail: {examples}; rewrite these by hand, or remove the images",
    )


def long_captions(images: list[CaptionedImage], tokenizer: Any) -> Finding | None:
    """Report captions longer than the text encoder's context, with the words that it never sees."""
    limit = tokenizer.model_max_length
    token_ids = tokenizer([image.caption for image in images], verbose=False).input_ids
    lost = [
        (image, tokenizer.decode(ids[limit - 1 : -1]).strip())  # the end token takes the last position
        for image, ids in zip(images, token_ids, strict=True)
        if len(ids) > limit
    ]
    if not lost:
        return None
    examples = first_few(f"{image.name} loses `{truncate(text, 100)}`" for image, text in lost)
    return Finding(
        "long captions",
        f"{len(lost)} of {len(images)} captions have more than the {limit - 2} tokens that the text encoder "
        f"reads, and data.style comes last: {examples}; shorten them",
    )


def truncate(text: str, length: int = 40) -> str:
    """Cut a text to a length, ending in ` ...` where something was cut."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def moved_to_training(moved: dict[CaptionedImage, CaptionedImage]) -> Finding | None:
    """Report images that would be held out by their hash but are trained on."""
    if not moved:
        return None
    examples = first_few(f"{image.name} like {other.name}" for image, other in moved.items())
    return Finding(
        "near-duplicates",
        f"{number_of(len(moved), 'image')} trained on, not held out, as near-duplicates of a training image: "
        f"{examples}",
        "note",
    )


def duplicates_across_split(
    train: list[CaptionedImage], held_out: list[CaptionedImage], thumbnails: dict[Path, np.ndarray]
) -> Finding | None:
    """Report held-out images that are also trained on, saved again or at another size."""

    def rows(images: list[CaptionedImage]) -> np.ndarray:
        return np.stack([thumbnails[image.path] for image in images])

    pairs = near_duplicates(rows(train), rows(held_out))
    if not pairs:
        return None
    pairs.sort(key=lambda pair: -pair[2])
    examples = first_few(f"{held_out[v].name} like {train[t].name}" for t, v, _ in pairs)
    return Finding(
        "near-duplicates",
        f"{len(pairs)} of {len(held_out)} held-out images are near-duplicates of a training image: "
        f"{examples}; on these the gain measures memorisation; remove one of each pair",
    )
