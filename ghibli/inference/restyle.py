"""`ghibli restyle`: photos redrawn in the trained style."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from ghibli.data.folder import enter_and_list, list_images, read_beside, require_inside
from ghibli.data.layouts import IMAGE_FILES, LAYOUTS, SUBFOLDERS, not_read
from ghibli.images.grid import to_image
from ghibli.images.read import (
    HEIF_ENDINGS,
    Unusable,
    heif_advice,
    image_endings,
    is_image_name,
    read_image,
)
from ghibli.inference.generate import enough_memory, model_metadata, note, write_png
from ghibli.inference.img2img import kept_outside, redraw
from ghibli.inference.inversion import denoise_inverted, invert, photo_latents
from ghibli.inference.load import LoadedModel
from ghibli.inference.request import RestyleOptions
from ghibli.models.prompt_syntax import escaped
from ghibli.runtime.commands import command_here, quoted
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded

logger = logging.getLogger(__name__)

SHORTEST, LONGEST = 64, 8192  # px of a side of the result
SHEET_PAIRS = 12  # photos on the sheet
SHEET = "before_after.png"


@dataclass(frozen=True)
class Photo:
    """A photo and what it shows."""

    path: Path
    prompt: str
    mask: Path | None = None  # white where the photo is redrawn; None = everywhere


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
        UserError: no such file, none of a photo's name, or a mask of another shape than its photo.
    """
    if mask is None:
        return photos
    found = []
    for photo in photos:
        file = mask
        if mask.is_dir():
            names = sorted(p for p in mask.iterdir() if p.stem == photo.path.stem and is_image_name(p))
            if not names:
                raise UserError(f"--mask {mask}: no image called {photo.path.stem} there, as {photo.path}")
            file = names[0]
        try:
            size, wanted = read_image(file)[0].size, read_image(photo.path)[0].size
        except (Unusable, OSError) as reason:
            raise UserError(f"--mask {mask} with {photo.path.name}: {reason}") from reason
        if size != wanted:
            raise UserError(
                f"--mask {file} has {size[0]}x{size[1]} px and {photo.path.name} {wanted[0]}x{wanted[1]}: "
                "a mask has its photo's size"
            )
        found.append(replace(photo, mask=file))
    return found


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
        found.append((file, caption or caption_beside(file, top)))
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


def size_like(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Scale (width, height) to about `resolution` squared px, each side a multiple of 8 and at least 64.

    The aspect ratio is kept: a long strip comes out larger, so that its short side has the 64.

    Raises:
        UserError: a strip whose long side would exceed LONGEST.
    """
    factor = max(resolution / (size[0] * size[1]) ** 0.5, SHORTEST / min(size))
    if max(size) * factor > LONGEST:
        raise UserError(f"{size[0]}x{size[1]} px is too long a strip to redraw whole: crop it")
    return round(size[0] * factor / 8) * 8, round(size[1] * factor / 8) * 8


def restyle_photo(
    model: LoadedModel,
    photo: Image.Image,
    prompt: str,
    options: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
    mask: Image.Image | None = None,
) -> Image.Image:
    """Redraw one photo at about options.resolution squared px, in the photo's shape.

    Args:
        on_step: called after every denoising step.
        mask: in grey, of the photo's shape, white where it is redrawn; None = everywhere.

    Raises:
        UserError: out of memory, or an image that is not finite.
    """

    size = size_like(photo.size, options.resolution)
    with enough_memory():
        if options.way == "img2img":
            return to_image(redraw(model.at(options.scale), photo, prompt, size, options, on_step, mask))
        base = model.at(0.0)
        latents = photo_latents(base, photo, size, options)
        noisy = invert(base, latents, prompt, options, on_step)
        pixels = denoise_inverted(model.at(options.scale), noisy, prompt, options, on_step)
    if mask is not None:
        pixels = kept_outside(photo.resize(size, Image.Resampling.LANCZOS), pixels, mask)
    return to_image(pixels)


def restyle_all(
    model: LoadedModel, photos: list[Photo], options: RestyleOptions, folder: Path
) -> tuple[int, list[tuple[Image.Image, Image.Image]]]:
    """Write a PNG for each photo as soon as it is done; one that cannot be read is reported and skipped.

    Returns:
        The number of files written, and (before, after) of the first SHEET_PAIRS.

    Raises:
        UserError: a PNG would overwrite a photo, or no photo could be read.
    """
    written = 0
    pairs: list[tuple[Image.Image, Image.Image]] = []
    files = output_files([photo.path for photo in photos], folder)
    try:
        with counted("restyling") as on_progress:
            for done, (photo, file) in enumerate(zip(photos, files, strict=True), start=1):
                pair = restyle_file(model, photo, options, file)
                written += pair is not None
                if pair is not None and len(pairs) < SHEET_PAIRS:
                    pairs.append(pair)
                on_progress(done, len(photos))
    except BaseException:  # Ctrl-C, a full disk
        logger.warning(f"{written} of {len(photos)} are done and kept in {quoted(str(folder))}")
        raise
    if not pairs:
        raise UserError("none of the photos could be read")
    return written, pairs


def restyle_file(
    model: LoadedModel, photo: Photo, options: RestyleOptions, file: Path
) -> tuple[Image.Image, Image.Image] | None:
    """Restyle one photo into a PNG file, or the next free name; return before and after, of the same size.

    One that cannot be read is reported: None.
    """
    try:
        before = read_image(photo.path)[0]
        size_like(before.size, options.resolution)  # a strip is skipped, as is what cannot be read
    except (Unusable, UserError, OSError) as reason:
        logger.warning(f"{photo.path.name} is skipped: {reason}")
        return None
    mask = None if photo.mask is None else read_image(photo.mask)[0]
    after = restyle_photo(model, before, photo.prompt, options, mask=mask)
    settings = asdict(options) | {"prompt": photo.prompt, "photo": readable(photo.path.name)}
    settings |= {} if photo.mask is None else {"mask": readable(photo.mask.name)}
    write_png(file, after, note(settings | model_metadata(model)))
    return before.resize(after.size, Image.Resampling.LANCZOS), after


def readable(name: str) -> str:
    """Return a file name as UTF-8 text; bytes that are not UTF-8 are replaced."""
    return name.encode("utf-8", "replace").decode()


def output_files(photos: list[Path], folder: Path) -> list[Path]:
    """Name a PNG file for each photo after the photo; where two would collide, with its ending or numbered.

    Raises:
        UserError: one of the files is a photo.
    """
    names = [photo.stem for photo in photos]
    if collide(names):
        names = [photo.name for photo in photos]
    if collide(names):
        names = [f"{number:04d}-{name}" for number, name in enumerate(names)]
    files = [folder / f"{name}.png" for name in names]
    originals = {photo.resolve() for photo in photos}
    for file in [*files, folder / SHEET]:
        if file.resolve() in originals:
            raise UserError(f"--to {folder}: {file.name} there is one of the photos; name another folder")
    return files


def collide(names: list[str]) -> bool:
    """Tell whether two of these would be the same file on some system, or one would be the sheet."""
    return len({name.casefold() for name in [*names, Path(SHEET).stem]}) <= len(names)
