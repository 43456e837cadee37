"""The images that data.exclude=FILE leaves out, of a split that does not depend on them."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ghibli.config.schema import DataConfig
from ghibli.data.folder import CaptionedImage, ImageFolder
from ghibli.data.split import Split, split_apart
from ghibli.runs.folder import LARGEST_LIST, RunDir
from ghibli.runs.status import read_json
from ghibli.runtime.commands import path_setting
from ghibli.runtime.errors import UserError, did_you_mean
from ghibli.runtime.files import read_plain, write_atomically
from ghibli.runtime.home import expanded

logger = logging.getLogger(__name__)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def split_without_excluded(
    folder: ImageFolder, thumbnails: dict[Path, np.ndarray], data: DataConfig, run: RunDir | None
) -> tuple[ImageFolder, Split]:
    """Split all images, then leave out those that data.exclude names: so no other one changes its side.

    Args:
        thumbnails: of every image, by file; what duplicates.near_duplicates compares.
        run: whose images these are; None = of no run.

    Returns:
        The folder and the split without them.

    Raises:
        UserError: the list cannot be read, names an image that is not there, or leaves no image to train on
            or none held out.
    """
    split = split_apart(folder.images, thumbnails, data.val_fraction)
    if data.exclude is None:
        return folder, split
    names = names_left_out(data.exclude, folder, run)

    def kept(images: list[CaptionedImage]) -> list[CaptionedImage]:
        return [image for image in images if image.name not in names]

    moved = {image: other for image, other in split.moved.items() if image.name not in names}
    left = Split(kept(split.train), kept(split.held_out), moved)
    for images, what in ((left.train, "to train on"), (left.held_out, "held out")):
        if not images:
            raise UserError(
                f"{path_setting('data.exclude', data.exclude)} leaves no image {what}: shorten it"
            )
    return replace(folder, images=kept(folder.images)), left


def names_left_out(file: str, folder: ImageFolder, run: RunDir | None) -> set[str]:
    """Return the names in a list, but of a started run those that it noted: its images never change.

    The list may have been edited, written anew or deleted since the start; then that is said.

    Raises:
        UserError: as excluded_names, of a run that has not started.
    """
    noted = None if run is None else noted_names(run)
    if noted is None:
        return excluded_names(file, folder)
    try:
        is_same = excluded_names(file, folder) - folder.unusable.keys() == noted - folder.unusable.keys()
    except UserError:
        is_same = False
    if not is_same:
        logger.warning(
            f"{path_setting('data.exclude', file)} is not as it was when the run was started, or gone: the "
            f"{len(noted)} images that its split.json names stay left out"
        )
    return noted


def noted_names(run: RunDir) -> set[str] | None:
    """Return the images that a run left out when it was started, from its split.json; None before that."""
    split = read_json(run.split)
    if "data_hash" not in run.status.read() or not isinstance(split, dict) or "train" not in split:
        return None
    names = split.get("excluded", [])
    return {str(name) for name in names} if isinstance(names, list) else None


def excluded_names(file: str, folder: ImageFolder) -> set[str]:
    """Read the names in a list, which has one a line, as split.json names images; empty lines count for none.

    Raises:
        UserError: the file cannot be read, or a line names no image of the folder.
    """
    what = path_setting("data.exclude", file)
    try:
        content = read_plain(expanded(file), LARGEST_LIST)
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from error
    known = {image.name for image in folder.images} | folder.unusable.keys()
    found: set[str] = set()
    unknown: list[tuple[int, str]] = []
    for number, line in enumerate(content.removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        name = os.fsdecode(line.removesuffix(b"\r"))
        if name not in known:
            name = name.strip()
        if name in known:
            found.add(name)
        elif name:
            unknown.append((number, name))
    if unknown:
        number, name = unknown[0]
        lines = ", ".join(str(line) for line, _ in unknown[1:6]) + (", ..." if len(unknown) > 6 else "")
        more = f"; nor do lines {lines} name one" if lines else ""
        hint = did_you_mean(name, known)
        raise UserError(f"{what} line {number}: the image set has no image {name[:200]}{hint}{more}")
    return found


def set_in_words(data: DataConfig) -> str:
    """Name what an image set depends on: `data.root=DIR`, or `data.root=DIR without data.exclude=FILE`."""
    root = f"data.root={data.root}"
    return root if data.exclude is None else f"{root} without {path_setting('data.exclude', data.exclude)}"


def write_names(file: Path, names: list[str]) -> None:
    """Write a list for data.exclude atomically; names that are not UTF-8 keep their bytes."""
    write_atomically(file, lambda opened: opened.write(as_list(names)))


def as_list(names: list[str]) -> bytes:
    """Return the content of a list for data.exclude."""
    return b"".join(os.fsencode(name) + b"\n" for name in names)
