"""Reading an image file as 8-bit sRGB, whatever its orientation, transparency, palette, profile or bit depth.

All image files are opened by `open_file`, which lets Pillow try the formats in FORMATS and no other: some of
the rest start other programs (EPS starts Ghostscript), whatever the file's name says.
"""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features

from ghibli.images.jpeg import has_too_many_scans
from ghibli.runtime.commands import install_command
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import require_plain
from ghibli.runtime.terminal import one_line

Size = tuple[int, int]  # width, height in px

FORMATS = {  # Pillow's name -> endings of its files
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
}
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # what a build of Pillow may lack
HEIF_ENDINGS = (".heic", ".heif", ".hif")

LARGE = 2**24  # px from which on only one image is decoded at a time
NEAR = 2  # levels of 255: a profile this near to sRGB is taken as sRGB
READING = "sRGB"  # in the keys of caches: another word when a file's pixels come out differently

logger = logging.getLogger(__name__)
_one_large = threading.Lock()


def heif_advice() -> str:
    """Say how to make .heic files readable."""
    return f"{install_command('heif')} reads them"


class Unusable(Exception):
    """An image that cannot be trained on; the message says why."""


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that are read: those in FORMATS that Pillow was built with, and perhaps HEIF."""
    Image.init()
    can = {name: name not in OPTIONAL or features.check(OPTIONAL[name]) for name in FORMATS}
    found = [name for name in FORMATS if can[name] and name in Image.OPEN]
    try:
        import pillow_heif
    except ImportError:
        return tuple(found)
    pillow_heif.register_heif_opener()
    return (*found, "HEIF")


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of files that can be read, in lower case."""
    return frozenset(ending for name in formats() for ending in FORMATS.get(name, HEIF_ENDINGS))


def is_image_name(path: PurePath) -> bool:
    """Return whether a file has the ending of an image that can be read."""
    return path.suffix.lower() in image_endings()


def open_file(file: Path | BinaryIO) -> Image.Image:
    """Open an image file without decoding it: `Image.open` for the formats that are read here.

    Raises:
        OSError: it is missing, no plain file, or no image.
    """
    if isinstance(file, Path):
        require_plain(file)
    return Image.open(file, formats=formats())


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence what Pillow says about images that are used all the same: large ones, damaged EXIF.

    Twice the size it warns of is still an error. Python keeps warning filters per process: threads that read
    images are started and ended inside.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_image(path: Path, min_side: int) -> tuple[Image.Image, Size]:
    """Read a whole image file, perhaps at reduced size, to see whether it can be trained on.

    Args:
        min_side: px; a smaller image is unusable.

    Returns:
        As `decode`.

    Raises:
        Unusable: with the reason.
    """
    if not path.is_file():
        raise Unusable("that is a folder" if path.is_dir() else "the file is missing")
    if path.stat().st_size == 0:
        raise Unusable("the file is empty")
    image, size = decode(path, at_least=min_side)
    if min(size) < min_side:
        raise Unusable(f"it is too small: {size[0]}x{size[1]} px, data.min_side={min_side}")
    return image, size


def open_image(path: Path) -> Image.Image:
    """Open an image that passed check_image, at full size, as `read_image` does.

    Raises:
        UserError: the file has changed since.
    """
    try:
        return read_image(path)[0]
    except (Unusable, OSError) as reason:
        raise UserError(f"{path} was readable a moment ago and no longer is: {reason}") from reason


def read_image(path: Path, at_least: int | None = None) -> tuple[Image.Image, Size]:
    """Read an image as 8-bit sRGB, EXIF orientation applied, transparency on white; see `decode`."""
    with without_warnings():
        return decode(path, at_least)


def decode(path: Path, at_least: int | None = None) -> tuple[Image.Image, Size]:
    """Read an image as `read_image` does, but from any thread, inside of `without_warnings`.

    Args:
        at_least: px; a JPEG may be decoded as small as that, which is faster. None = at full size.

    Returns:
        The image, with the number of `frames` in the file by frames_in in its info (the first one is read),
        and the size of the whole image, upright: what `resize.size_for` chooses the shape from.

    Raises:
        Unusable: Pillow cannot read the file or convert it to RGB.
    """
    try:
        with open_file(path) as file:
            if file.format in ("JPEG", "MPO") and has_too_many_scans(path):
                raise Unusable("it is a JPEG of hundreds of passes and would take minutes: save it anew")
            size, frames = file.size, frames_in(file)
            if at_least is not None:
                file.draft("RGB", (at_least, at_least))
            with _one_large if size[0] * size[1] > LARGE else nullcontext():
                file.load()
                size = upright_size(size, file)
                ImageOps.exif_transpose(file, in_place=True)
                image = to_rgb(file, path.name)
                image.info["frames"] = frames
                return image, size
    except UnidentifiedImageError:
        raise Unusable("it is not an image, despite its name") from None
    except Image.DecompressionBombError:
        assert Image.MAX_IMAGE_PIXELS is not None, "Pillow raises this error only if there is a limit"
        raise Unusable(f"it has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None
    except (MemoryError, Unusable):
        raise
    except Exception as error:  # Pillow raises many types on broken files
        raise Unusable(f"it is damaged or of an unknown format: {error}") from error


def frames_in(file: Image.Image) -> int:
    """Return how many images a file has; 1 for a photo with a small copy or a depth map of itself (MPO).

    Of a TIFF at most 2: Pillow compares each with all before it, and a photo's size holds a million.
    """
    if file.format == "MPO":
        return 1
    try:
        return tiff_frames(file) if file.format == "TIFF" else getattr(file, "n_frames", 1)
    except Exception:  # a later one is damaged: it is not read anyway
        return 1


def tiff_frames(file: Image.Image) -> int:
    """Return 1 for a TIFF of one image and 2 for one of several; it stays at the first."""
    try:
        file.seek(1)
        return 2
    except EOFError:
        return 1
    finally:
        file.seek(0)


def upright_size(stored: Size, loaded: Image.Image) -> Size:
    """Return the size that the EXIF orientation turns a stored size into.

    Args:
        loaded: the image, not yet turned: Pillow finds a PNG's EXIF only as it loads the file, and turns a
            TIFF itself, which then has no orientation left.
    """
    turned = loaded.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return stored[::-1] if turned else stored


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Convert to 8-bit sRGB by the image's profile; transparency becomes white, 16 bits are scaled to 8.

    Args:
        name: of the image, for a message.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):
        image = sixteen_to_eight_bit(image)
    if not image.has_transparency_data:
        return by_profile(image, profile, name) if profile else image.convert("RGB")
    opaque = Image.new("RGB", image.size, "white")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    if profile:
        colours = layer.getchannel("R") if image.mode in ("L", "LA") else layer.convert("RGB")
        opaque.paste(by_profile(colours, profile, name), mask=layer)
    else:
        opaque.paste(layer, mask=layer)
    return opaque


def sixteen_to_eight_bit(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grey image (0 .. 65535) to 8 bits; Pillow's own conversion clips at 255."""
    grey = np.asarray(image).astype(np.float32)
    np.clip(grey, 0, 65535, out=grey)
    grey /= 257  # in place: a large scan is many megabytes
    return Image.fromarray(np.rint(grey, out=grey).astype(np.uint8))


def by_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """Convert an image to sRGB by its ICC profile; one that cannot be used is named and ignored."""
    if image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    try:
        transform = transform_to_srgb(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        say_once(f"{name}: its colour profile cannot be used and is ignored: {error}")
        return image.convert("RGB")
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "it returns None only when working in place"
    return converted


@lru_cache(maxsize=64)
def transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform of a profile to sRGB, perceptual; None if the profile is sRGB, within NEAR levels.

    Args:
        mode: of the image: L, RGB or CMYK.

    Raises:
        ValueError: the profile is for images of another kind.
        PyCMSError, OSError: it is damaged.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != {"L": "GRAY"}.get(mode, mode):
        raise ValueError(f"it is for {space} images and this one is {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    lattice = np.stack(np.meshgrid(*[levels] * (1 if mode == "L" else 3)), axis=-1).reshape(1, -1, len(mode))
    probe = Image.fromarray(lattice[..., 0] if mode == "L" else lattice)
    converted = ImageCms.applyTransform(probe, transform)
    difference = np.asarray(converted, dtype=int) - np.asarray(probe.convert("RGB"), dtype=int)
    return None if np.abs(difference).max() <= NEAR else transform


@cache
def say_once(text: str) -> None:
    """Log a warning, the first time only: an image is read more than once."""
    logger.warning(one_line(text))
