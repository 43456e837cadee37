"""Reading an image file as 8-bit RGB, whatever its orientation, transparency, palette or bit depth."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ghibli.runtime.errors import UserError

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Unusable(Exception):
    """An image that cannot be trained on; the message says why."""


def check_image(path: Path, min_side: int) -> Image.Image:
    """Read a whole image file, perhaps at reduced size, to see whether it can be trained on.

    Args:
        min_side: px; a smaller image is unusable.

    Raises:
        Unusable: with the reason.
    """
    if not path.is_file():
        raise Unusable("that is a folder" if path.is_dir() else "the file is missing")
    if path.stat().st_size == 0:
        raise Unusable("the file is empty")
    image, (width, height) = read_image(path, at_least=min_side)
    if min(width, height) < min_side:
        raise Unusable(f"it is too small: {width}x{height} px, data.min_side={min_side}")
    return image


def open_image(path: Path) -> Image.Image:
    """Open an image that passed check_image: 8-bit RGB at full size, EXIF orientation applied.

    Raises:
        UserError: the file has changed since.
    """
    try:
        return read_image(path)[0]
    except (Unusable, OSError) as reason:
        raise UserError(f"{path} was readable a moment ago and no longer is: {reason}") from reason


def read_image(path: Path, at_least: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Read an image as 8-bit RGB, EXIF orientation applied, transparency on white; also its stored size.

    Args:
        at_least: px; a JPEG may be decoded as small as that, which is faster. None = at full size.

    Raises:
        Unusable: Pillow cannot read the file or convert it to RGB.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large size, damaged EXIF; twice that size is still an error
            with Image.open(path) as file:
                size = file.size
                if at_least is not None:
                    file.draft("RGB", (at_least, at_least))
                file.load()
                ImageOps.exif_transpose(file, in_place=True)
                return to_rgb(file), size
    except UnidentifiedImageError:
        raise Unusable("it is not an image, despite its name") from None
    except Image.DecompressionBombError:
        assert Image.MAX_IMAGE_PIXELS is not None, "Pillow raises this error only if there is a limit"
        raise Unusable(f"it has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types on broken files
        raise Unusable(f"it is damaged or of an unknown format: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; transparency becomes white, 16 bits are scaled to 8."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):
        return sixteen_bit_to_rgb(image)
    if image.has_transparency_data:
        opaque = Image.new("RGB", image.size, "white")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        opaque.paste(image, mask=image)
        return opaque
    return image.convert("RGB")


def sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grey image (0 .. 65535) to 8-bit RGB; Pillow's own conversion clips at 255."""
    grey = np.asarray(image).astype(np.float32)
    np.clip(grey, 0, 65535, out=grey)
    grey /= 257  # in place: a large scan is many megabytes
    return Image.fromarray(np.rint(grey, out=grey).astype(np.uint8)).convert("RGB")
