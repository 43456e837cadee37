"""Small image folders, and reading them with `read_folder`."""

import os
from pathlib import Path
from zlib import crc32

from PIL import Image

from ghibli.data.folder import ImageFolder, read_folder

RED = (200, 30, 40)


def write_image(path: Path, size: tuple[int, int] = (64, 48), colour: tuple[int, int, int] = RED) -> Path:
    """Write an image of one colour, made unique by its name, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    if min(size) > 8:
        image.paste(crc32(os.fsencode(path.name)) % 2**24, (0, 0, 4, 4))
    image.save(path)
    return path


def read(root: Path, caption: str | None = None, min_side: int = 32) -> ImageFolder:
    return read_folder(root, style=", in ink", default_caption=caption, min_side=min_side)


def captions_of(folder: ImageFolder) -> dict[str, str]:
    return {p.path.name: p.caption for p in folder.images}
