"""The photos to be restyled, with their prompts, masks and control images."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ghibli.data.folder import enter_and_list, list_images, read_beside
from ghibli.data.inside import require_inside
from ghibli.data.layouts import IMAGE_FILES, LAYOUTS, SUBFOLDERS, not_read, words_of
from ghibli.images.read import (
    HEIF_ENDINGS,
    Unusable,
    heif_advice,
    image_endings,
    is_image_name,
    read_image,
)
from ghibli.models.prompt_syntax import escaped
from ghibli.runtime.commands import command_here
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded

logger = logging.getLogger(__name__)

SAME_SHAPE = 0.03  # difference of aspect ratios that rounding to whole px makes


@dataclass(frozen=True)
class Photo:
    """A photo and what it shows."""

    path: Path
    prompt: str
    mask: Path | None = None  # white where the photo is redrawn; None = everywhere
    control: Path | None = None  # what a ControlNet sees; None = what is computed of the photo, or nothing


def find_photos(paths: Iterable[Path], prompt: str | None, style: str) -> list[Photo]:
    """Collect the photos of files and folders, with their prompts.

    Args:
        prompt: for all photos, with weights; None = the caption that is stored with each, word for word.
        style: appended to every prompt, word for word.

    Raises:
        UserError: no such file or folder, no photo, or one without a caption.
    """
    found = [pair for path in paths for pair in captioned(expanded(path), prompt)]
    if not found:
        raise UserError("no images there: name files, or a folder that holds some")
    bare = [path for path, caption in found if not (prompt or caption)]
    if bare:
        command = command_here("ghibli", "caption", bare[0].parent)
        raise UserError(f"{bare[0].name} has no caption: give --prompt TEXT, or run `{command}`")
    return [Photo(path, (prompt or escaped(caption or "")) + escaped(style)) for path, caption in found]


def with_masks(photos: list[Photo], mask: Path | None) -> list[Photo]:
    """Give every photo its mask: the file itself, or the one of the photo's name in a folder.

    Raises:
        UserError: no such file, none of a photo's name, or a mask of another size than its photo.
    """
    if mask is None:
        return photos
    found = []
    for photo in photos:
        file = belonging(photo, mask, "--mask")
        size, wanted = sizes(photo, file, "--mask")
        if size != wanted:
            raise UserError(f"{named_sizes(photo, file, '--mask')}: a mask has its photo's size")
        found.append(replace(photo, mask=file))
    return found


def with_control_images(photos: list[Photo], place: Path) -> list[Photo]:
    """Give every photo what a ControlNet is to see, as with_masks does; here only the shape must be alike.

    Raises:
        UserError: no such file, none of a photo's name, or an image of another aspect ratio than its photo.
    """
    found = []
    for photo in photos:
        file = belonging(photo, place, "--control")
        size, wanted = sizes(photo, file, "--control")
        if abs(size[0] * wanted[1] / (size[1] * wanted[0]) - 1) > SAME_SHAPE:
            raise UserError(f"{named_sizes(photo, file, '--control')}: a control image has its photo's shape")
        found.append(replace(photo, control=file))
    return found


def belonging(photo: Photo, place: Path, option: str) -> Path:
    """Return the image of the photo's name in a folder, or `place` itself if it is a file."""
    if not place.is_dir():
        return place
    names = sorted(p for p in place.iterdir() if p.stem == photo.path.stem and is_image_name(p))
    if not names:
        raise UserError(f"{option} {place}: no image called {photo.path.stem} there, as {photo.path}")
    return names[0]


def sizes(photo: Photo, file: Path, option: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) of an image that belongs to a photo, and of the photo."""
    try:
        return read_image(file)[0].size, read_image(photo.path)[0].size
    except (Unusable, OSError) as reason:
        raise UserError(f"{option} {file} with {photo.path.name}: {reason}") from reason


def named_sizes(photo: Photo, file: Path, option: str) -> str:
    """Say of which sizes both are."""
    size, wanted = sizes(photo, file, option)
    return f"{option} {file} has {size[0]}x{size[1]} px and {photo.path.name} {wanted[0]}x{wanted[1]}"


def captioned(path: Path, prompt: str | None) -> list[tuple[Path, str | None]]:
    """List as with_captions does; with a prompt for all, a table that cannot be read is no obstacle."""
    try:
        return with_captions(path, search=prompt is None)
    except UserError as error:
        if prompt is None or not path.is_dir():
            raise
        logger.warning(f"the captions there are not used: {error}")
        return [(image.path, None) for image in sorted(LAYOUTS[IMAGE_FILES].list_images(path))]


def with_captions(path: Path, *, search: bool) -> list[tuple[Path, str | None]]:
    """List (file, caption or None) of one file or of a folder.

    Args:
        search: for one file, read the caption tables of its folder.
    """
    if path.is_dir():
        return photos_in(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if not is_image_name(path):
        is_heif = path.suffix.lower() in HEIF_ENDINGS
        advice = heif_advice() if is_heif else f"{', '.join(sorted(image_endings()))} can be read"
        raise UserError(f"{path.name} is not an image: {advice}")
    if not search:
        return [(path, None)]
    inside = path.resolve().parent
    root = inside.parent if inside.name in SUBFOLDERS else inside
    captions = {file.resolve(): caption for _, file, caption in list_images(root, "photo")}
    return [(path, captions.get(path.resolve()) or caption_beside(path))]


def photos_in(folder: Path) -> list[tuple[Path, str | None]]:
    """List (file, caption or None) of a folder; name what is not read, and what leads out of it."""
    top, listed = enter_and_list(folder, "photo")
    found: list[tuple[Path, str | None]] = []
    for name, file, caption in listed:
        try:
            require_inside(file, top)
        except Unusable as reason:
            logger.warning(f"{name} is skipped: {reason}")
            continue
        found.append((file, caption or caption_beside(file, top) or words_of(name)))
    if others := not_read(top, listed):
        logger.warning(f"{folder}: not read: {others}")
    return found


def caption_beside(file: Path, top: Path | None = None) -> str | None:
    """Read the caption in a .txt file beside a photo; None without one, and if it cannot be read, named.

    Args:
        top: the folder that it must not lead out of; None = the photo's own.
    """
    try:
        return read_beside(file, top)
    except (Unusable, OSError) as reason:
        logger.warning(f"the caption of {file.name} is not used: {reason}")
        return None
