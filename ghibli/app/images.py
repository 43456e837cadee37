"""Images on the page: uploaded photos and sample grids, reduced within bounded memory; the safety checker."""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ghibli.images.read import Unusable, open_file, read_image
from ghibli.inference.load import LoadedModel
from ghibli.inference.safety import SafetyChecker
from ghibli.runs.folder import RunDir

DECODED = 300 * 10**6  # bytes of a decoded photo: 100 megapixels in RGB
DECODER = ThreadPoolExecutor(1, "photo")  # one photo at a time; each thread would keep memory of its own
WIDTH = 1200  # px, of photos and sample grids on the page


def read_small(photo: Path, what: str = "photo") -> Image.Image:
    """Read a photo, reduced to at most WIDTH px on its longer side; one at a time, which bounds the memory.

    Args:
        what: the file is, for a message.

    Raises:
        Unusable: not an image, damaged, one that takes more memory than DECODED, or no longer there.
    """
    if not photo.exists():  # page.UPLOAD_CLEANUP
        raise Unusable(f"the {what} was removed after an hour: choose it again")
    return DECODER.submit(decode_small, photo).result()


def decode_small(photo: Path) -> Image.Image:
    """Do what read_small does, in this thread."""
    check_decoded_size(photo)
    image = read_image(photo, at_least=WIDTH)[0]
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return image


def check_decoded_size(photo: Path) -> None:
    """Raise Unusable for an image whose pixels, as its header tells, would take too much memory.

    A JPEG is decoded at the size that is needed; what is no image is left to read_image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large size: that is what is checked here
            with open_file(photo) as file:
                file.draft("RGB", (WIDTH, WIDTH))
                width, height = file.size
                size = width * height * max(3, len(file.getbands()))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    if size > DECODED:
        raise Unusable(f"it has {width}x{height} px, more than this page decodes: make it smaller")


def sample_grids(names: list[str], most: int | None = None) -> list[tuple[Image.Image, str]]:
    """Return the sample grids of some runs with captions, the newest of each run first.

    Args:
        most: of each run; None = all.
    """
    grids = []
    for name in names:
        files = sorted(RunDir(Path(name)).samples.glob("*.png"), key=lambda file: file.stat().st_mtime)
        for file in files[::-1][:most]:
            image = read_image(file)[0]
            image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
            grids.append((image, f"{name}: {file.stem}"))
    return grids


def checked(images: list[Image.Image], model: LoadedModel, safe: bool) -> tuple[list[Image.Image], list[str]]:
    """Apply the safety checker if asked to; also return a sentence if it blacked some images out."""
    if not safe:
        return images, []
    images, blacked_out = safety_checker(model.config.model.path).black_out(images)
    note = f"The safety checker blacked out {blacked_out} of {len(images)}."
    return images, [note] if blacked_out else []


@functools.lru_cache(maxsize=1)
def safety_checker(base: str) -> SafetyChecker:
    """Load the safety checker of a base, once."""
    return SafetyChecker(base)
