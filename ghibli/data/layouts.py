"""Layouts of an image set: where its images are, and where their captions. One more is one entry here.

Every layout that recognises a folder lists its images, in the order below, and the first one that has a
caption for an image counts. An image that no layout has a caption for may still have a .txt beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from ghibli.data.caption_tables import RowReader, bar_rows, csv_rows, json_rows, read_table
from ghibli.images.read import IMAGE_ENDINGS
from ghibli.runtime.registry import Registry

SUBFOLDERS = ("images", "trainB_ghibli", "dataset/trainB_ghibli")  # the last two: the Kaggle set
IMAGE_FILES = "image files"  # the layout that every folder has


class ListedImage(NamedTuple):
    """An image that an image set has or claims to have."""

    name: str  # path inside the image folder, which messages and split.json name it by
    path: Path  # need not exist
    caption: str | None  # one line; None = this layout has none


@dataclass(frozen=True)
class Layout:
    """A way to keep images and captions in a folder."""

    description: str  # for the message about a folder without images
    recognise: Callable[[Path], bool]  # root -> does it apply?
    list_images: Callable[[Path], list[ListedImage]]  # root -> images, in any order


LAYOUTS: Registry[Layout] = Registry("layout")


def image_folder(root: Path) -> Path:
    """Return the folder that holds the images of a set: one of SUBFOLDERS, or root itself."""
    return next((root / name for name in SUBFOLDERS if (root / name).is_dir()), root)


def image_names(folder: Path) -> list[str]:
    """Return the names of the image files in a folder, hidden ones left out."""
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    return [name for name in names if not name.startswith(".")]


def files_in(root: Path) -> list[ListedImage]:
    """List the image files of a set, without captions."""
    folder = image_folder(root)
    return [ListedImage(name, folder / name, None) for name in image_names(folder)]


def tables_in(root: Path, table_name: str) -> list[Path]:
    """Return the caption tables of one name: in root and in its image folder, the first one counts most."""
    folders = dict.fromkeys((root, image_folder(root)))
    return [folder / table_name for folder in folders if (folder / table_name).is_file()]


def rows_in(root: Path, table_name: str, read_rows: RowReader) -> list[ListedImage]:
    """List the images that a caption table has words for, whether or not the files exist.

    A table may spell a name with other bytes than the file's, as macOS does with accents.
    """
    folder = image_folder(root)
    captions: dict[str, str] = {}
    for table in reversed(tables_in(root, table_name)):
        found = read_table(table, folder, read_rows)
        captions |= {name: caption for name, caption in found.items() if caption}
    spelling = {normalize("NFC", name): name for name in image_names(folder)}
    named = {spelling.get(normalize("NFC", name), name): caption for name, caption in captions.items()}
    return [ListedImage(name, folder / name, caption) for name, caption in named.items()]


def table_layout(table_name: str, description: str, read_rows: RowReader) -> Layout:
    """Return the layout of images with a caption table of this name and format."""
    return Layout(
        description,
        recognise=lambda root: bool(tables_in(root, table_name)),
        list_images=lambda root: rows_in(root, table_name, read_rows),
    )


def supported_layouts() -> str:
    """Return all layouts in words, for a message."""
    return "; ".join([*(layout.description for _, layout in LAYOUTS.items()), "docs/data.md shows them"])


for name, words, reader in (
    ("captions.txt", "images/ beside captions.txt (lines `file|caption`)", bar_rows),
    ("metadata.jsonl", "images/ beside metadata.jsonl", json_rows),
    ("metadata.csv", "images/ beside metadata.csv", csv_rows),
):
    LAYOUTS.register(name, table_layout(name, words, reader))
LAYOUTS.register(IMAGE_FILES, Layout("images with a .txt beside each", lambda root: True, files_in))
