"""Layouts of an image set: where its images are, and where their captions. One more is one entry here.

Every layout that recognises a folder lists its images, in the order below, and the first one that has a
caption for an image counts. An image that no layout has a caption for may still have a .txt beside it.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

from ghibli.data.caption_tables import RowReader, bar_rows, csv_rows, json_rows, read_table
from ghibli.data.inside import require_inside
from ghibli.images.read import HEIF_ENDINGS, Unusable, heif_advice, is_image_name
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import LONGEST_NAME
from ghibli.runtime.registry import Registry
from ghibli.runtime.terminal import one_line
from ghibli.runtime.wording import number_of

SUBFOLDERS = ("images", "trainB_ghibli", "dataset/trainB_ghibli")  # the last two: the Kaggle set
PHOTOGRAPHS = "trainA"  # of the Kaggle set, which are not trained on and not missed
REPEATED = re.compile(r"([1-9][0-9]{0,5})_(.*)", re.DOTALL)  # kohya's `10_name/`: 10 times in an epoch
IMAGE_FILES = "image files"  # the layout that every folder has
COMPANIONS = {  # endings of what lies beside images and is none
    ".md", ".toml", ".yaml", ".yml", ".npz", ".html", ".ini", ".db", ".log", ".py", ".sh",
}  # fmt: skip
CAPTION_ENDINGS = (".txt", ".caption")  # of the file beside an image; the first one that exists counts
NO_SET = ("checksums.txt", "README.txt", "LICENSE.txt")  # names of texts that hold no captions
MOST_ENTRIES = 100_000  # looked at for what is not read


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


def enter(root: Path) -> Path:
    """Descend into a folder that holds nothing but one other folder, as zip files often do.

    A folder of images, a caption table and a link stay where they are.
    """
    while not list_files(root) and not any(layout.recognise(root) for name, layout in tables()):
        inside = [path for path in sorted(root.iterdir()) if not is_hidden(path.name)]
        if len(inside) != 1 or inside[0].is_symlink() or not inside[0].is_dir():
            break
        root = inside[0]
    return root


def is_hidden(name: str) -> bool:
    """Tell the names that a user does not see: hidden ones, and what macOS adds to a zip file."""
    return name.startswith((".", "__MACOSX"))


def image_folder(root: Path) -> Path:
    """Return the folder that holds the images of a set: one of SUBFOLDERS, or root itself."""
    return next((root / name for name in SUBFOLDERS if (root / name).is_dir()), root)


def image_folders(root: Path) -> list[Path]:
    """Return the image folder and those below it that are named as kohya's trainer names them, `10_name`."""
    folder = image_folder(root)
    numbered = [path for path in folder.iterdir() if REPEATED.fullmatch(path.name) and path.is_dir()]
    return [folder, *sorted(numbered)]


def repeats_of(name: str) -> int:
    """Return how many times an epoch has an image, by its name: 10 for `10_name/a.png`, else 1."""
    match = REPEATED.fullmatch(name.partition("/")[0]) if "/" in name else None
    return int(match[1]) if match else 1


def words_of(name: str) -> str:
    """Return the caption that kohya's trainer gives to an image without one: `name` of `10_name/a.png`."""
    match = REPEATED.fullmatch(name.partition("/")[0]) if "/" in name else None
    return " ".join(match[2].split()) if match and match[2].isprintable() else ""


def list_files(root: Path) -> list[str]:
    """Return the image files of a set as paths inside its image folder, hidden ones left out."""
    top = image_folder(root)
    found = (path for folder in image_folders(root) for path in folder.iterdir() if is_image_name(path))
    return [path.relative_to(top).as_posix() for path in found if not path.name.startswith(".")]


def texts_beside(image: Path) -> list[Path]:
    """Return the files that may hold an image's caption, whether or not they exist; the first one counts."""
    is_name = image.name not in ("", ".", "..")
    found = [image.with_suffix(ending) for ending in CAPTION_ENDINGS] if is_name else []
    return [file for file in found if len(os.fsencode(file.name)) <= LONGEST_NAME]  # no other can exist


def files_in(root: Path) -> list[ListedImage]:
    """List the image files of a set, without captions."""
    folder = image_folder(root)
    return [ListedImage(name, folder / name, None) for name in list_files(root)]


def tables_in(root: Path, table_name: str) -> list[Path]:
    """Return the caption tables of one name: in root and in its image folders, the first one counts most."""
    folders = dict.fromkeys((root, *image_folders(root)))
    return [folder / table_name for folder in folders if (folder / table_name).is_file()]


def rows_in(root: Path, table_name: str, read_rows: RowReader) -> list[ListedImage]:
    """List the images that a caption table has words for, whether or not the files exist.

    A table may spell a name with other bytes than the file's, as macOS does with accents, or with spaces
    around it.

    Raises:
        UserError: a table that cannot be read, or a link to one outside of the set.
    """
    folder = image_folder(root)
    captions: dict[str, str] = {}
    for table in reversed(tables_in(root, table_name)):
        try:
            require_inside(table, root)
        except Unusable as reason:
            raise UserError(f"{table} cannot be used: {reason}") from None
        found = read_table(table, folder, read_rows)
        captions |= {name: caption for name, caption in found.items() if caption}
    spelling = {normalize("NFC", name): name for name in list_files(root)}

    def as_on_disk(name: str) -> str:
        known = (spelling.get(normalize("NFC", way)) for way in (name, name.strip()))
        return next((name for name in known if name), name.strip())

    named = {as_on_disk(name): caption for name, caption in captions.items()}
    return [ListedImage(name, folder / name, caption) for name, caption in named.items()]


def table_layout(table_name: str, description: str, read_rows: RowReader) -> Layout:
    """Return the layout of images with a caption table of this name and format."""
    return Layout(
        description,
        recognise=lambda root: bool(tables_in(root, table_name)),
        list_images=lambda root: rows_in(root, table_name, read_rows),
    )


def tables() -> list[tuple[str, Layout]]:
    """Return the layouts that have a caption table, with their names."""
    return [(name, layout) for name, layout in LAYOUTS.items() if name != IMAGE_FILES]


def supported_layouts() -> str:
    """Return all layouts in words, for a message."""
    return "; ".join([*(layout.description for _, layout in LAYOUTS.items()), "docs/data.md shows them"])


def not_read(root: Path, listed: Iterable[ListedImage], several: Collection[Path] = ()) -> str:
    """Return what lies in a set and is not read, in words and one line: counts by ending and by folder.

    `3 .heic (pip install -e '.[heif]' reads them), 2 .mp4, 12 images in old/ (12)`; else empty.

    Args:
        listed: the images that are read.
        several: those of their files that hold several images, of which the first is read.
    """
    images = list(listed)
    entered, known = {root, *image_folders(root)}, {image.path for image in images}
    known |= {file for image in images for file in texts_beside(image.path)}
    known |= {path for name, _ in tables() for path in tables_in(root, name)}
    known |= {folder / name for folder in entered for name in NO_SET}
    endings: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    links: list[str] = []
    for path in files_below(root):
        if path.is_dir():
            links += [f"{path.relative_to(root).as_posix()}/"] if path not in entered else []
        elif is_image_name(path):
            if path not in known:
                folders[f"{path.parent.relative_to(root).as_posix()}/".removeprefix("./")] += 1
        elif path.parent in entered and path not in known and path.suffix.lower() not in COMPANIONS:
            endings[path.suffix.lower()] += 1
    parts = [described(ending, count) for ending, count in sorted(endings.items())]
    if folders:
        most = [f"{name or 'the top folder'} ({count})" for name, count in sorted(folders.items())]
        more = f" and {len(most) - 5} more folders" if len(most) > 5 else ""
        parts.append(f"{number_of(sum(folders.values()), 'image')} in {', '.join(most[:5])}{more}")
    if links:
        parts.append(f"{number_of(len(links), 'link')} to folders ({', '.join(links[:3])})")
    if several:
        names = sorted(path.name for path in several)
        parts.append(
            f"later images of {number_of(len(several), 'file')} with several ({', '.join(names[:3])})"
        )
    return one_line(", ".join(parts))


def described(ending: str, count: int) -> str:
    """Return the number of files of one ending that are not read, in words."""
    advice = f" ({heif_advice()})" if ending in HEIF_ENDINGS else ""
    advice = " (beside no image of that name)" if ending in CAPTION_ENDINGS else advice
    return f"{count} {ending or 'without an ending'}{advice}"


def files_below(root: Path) -> Iterator[Path]:
    """Iterate over the files of a folder and its subfolders, and links to folders; hidden ones are left out.

    The photographs of the Kaggle set are left out too; and of a huge tree, all beyond MOST_ENTRIES.
    """
    seen, kaggle = 0, image_folder(root).name == PurePosixPath(SUBFOLDERS[1]).name
    for parent, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        if kaggle and PHOTOGRAPHS in subfolders:
            subfolders.remove(PHOTOGRAPHS)
        seen += len(subfolders) + len(names)
        links = [name for name in subfolders if Path(parent, name).is_symlink()]
        yield from (Path(parent) / name for name in sorted([*names, *links]) if not is_hidden(name))
        if seen > MOST_ENTRIES:
            return


for name, words, reader in (
    ("captions.txt", "images/ beside captions.txt (lines `file|caption`)", bar_rows),
    ("metadata.jsonl", "images/ beside metadata.jsonl", json_rows),
    ("metadata.csv", "images/ beside metadata.csv", csv_rows),
):
    LAYOUTS.register(name, table_layout(name, words, reader))
alone = "images with a .txt beside each, perhaps in kohya's 10_name/"
LAYOUTS.register(IMAGE_FILES, Layout(alone, lambda root: True, files_in))
