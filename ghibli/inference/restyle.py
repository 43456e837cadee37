"""`ghibli restyle`: photos redrawn in the trained style."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ghibli.images.grid import to_image
from ghibli.images.read import Unusable, read_image
from ghibli.inference.control import ControlOf, load_control
from ghibli.inference.generate import enough_memory, model_metadata, note, write_png
from ghibli.inference.img2img import kept_outside, redraw
from ghibli.inference.inversion import redraw_inverted
from ghibli.inference.load import LoadedModel
from ghibli.inference.photos import Photo
from ghibli.inference.request import RestyleOptions
from ghibli.runtime.commands import quoted
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)

SHORTEST, LONGEST = 64, 8192  # px of a side of the result
SHEET_PAIRS = 12  # photos on the sheet
SHEET = "before_after.png"


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
    control_of: ControlOf | None = None,
) -> Image.Image:
    """Redraw one photo at about options.resolution squared px, in the photo's shape.

    Args:
        on_step: called after every denoising step.
        mask: in grey, of the photo's shape, white where it is redrawn; None = everywhere.
        control_of: makes what steers of the photo in the result's size; None = nothing steers.

    Raises:
        UserError: out of memory, or an image that is not finite.
    """

    size = size_like(photo.size, options.resolution)
    small = photo.resize(size, Image.Resampling.LANCZOS)
    with enough_memory():
        control = None if control_of is None else control_of(small)
        if options.way == "img2img":
            base = model.at(options.scale)
            return to_image(redraw(base, small, prompt, options, on_step, mask, control))
        pixels = redraw_inverted(model, small, prompt, options, on_step, control)
    return to_image(pixels if mask is None else kept_outside(small, pixels, mask))


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
    control = None if options.control is None else load_control(options.control, model.base)
    try:
        with counted("restyling") as on_progress:
            for done, (photo, file) in enumerate(zip(photos, files, strict=True), start=1):
                own = None if photo.control is None else read_image(photo.control)[0]
                control_of = None if control is None else control(own)
                pair = restyle_file(model, photo, options, file, control_of)
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
    model: LoadedModel,
    photo: Photo,
    options: RestyleOptions,
    file: Path,
    control_of: ControlOf | None = None,
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
    if before.info["frames"] > 1:
        logger.warning(f"{photo.path.name}: only the first of its images is restyled")
    mask = None if photo.mask is None else read_image(photo.mask)[0]
    after = restyle_photo(model, before, photo.prompt, options, mask=mask, control_of=control_of)
    settings = asdict(options) | {"prompt": photo.prompt, "photo": readable(photo.path.name)}
    settings |= {} if photo.mask is None else {"mask": readable(photo.mask.name)}
    settings |= {} if photo.control is None else {"control_image": readable(photo.control.name)}
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
