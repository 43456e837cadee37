"""Image folders of every supported layout -> a list of (image file, caption), and reading one."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from PIL import Image

from ghibli.data.caption_tables import find_tables, read_table
from ghibli.images.read import IMAGE_ENDINGS, Unusable, check_image
from ghibli.runtime.errors import UserError, require_folder

NO_CAPTION = "it has no caption"
SUBFOLDERS = ("images", "trainB_ghibli", "dataset/trainB_ghibli")  # the last two: the Kaggle set
LAYOUTS = (
    "images/ beside captions.txt (lines `file|caption`), metadata.jsonl or metadata.csv; images with a "
    ".txt beside each; docs/data.md shows them"
)


@dataclass(frozen=True)
class CaptionedImage:
    """One usable image."""

    path: Path
    caption: str  # with the style suffix
    content_hash: str  # sha256 of the file's bytes, hex


@dataclass(frozen=True)
class ImageFolder:
    """What was found in a folder."""

    images: list[CaptionedImage]
    unusable: dict[str, str]  # path inside the image folder -> why it is skipped


def read_folder(
    root: Path,
    *,
    style: str,
    default_caption: str | None,
    min_side: int,
    key: str = "data.root",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_image: Callable[[Path, Image.Image], None] = lambda path, image: None,
) -> ImageFolder:
    """Reads every caption and checks every image of a folder, in the order of their names.

    Args:
        root: a folder in one of the supported layouts; `~` is the home folder.
        style: text appended to every caption, such as ", Studio Ghibli style".
        default_caption: stands in for a missing caption; None makes such an image unusable.
        min_side: px; an image whose shorter side is smaller is unusable.
        key: the setting that names the folder.
        on_progress: called with (images checked, images in all).
        on_image: called with each readable image, whose sides may be reduced to `min_side`.

    Raises:
        UserError: no such folder, no images, or fewer than two of them usable.
    """
    require_folder(key, root)
    images: list[CaptionedImage] = []
    unusable: dict[str, str] = {}
    listed = list_images(root.expanduser(), key)
    for done, (name, path, caption) in enumerate(listed, start=1):
        try:
            caption = (read_beside(path) if caption is None else caption) or default_caption
            on_image(path, check_image(path, min_side))
            if not caption:
                raise Unusable(f"{NO_CAPTION} (data.caption=TEXT gives one)")
            content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
            images.append(CaptionedImage(path, f"{caption}{style}", content_hash))
        except (Unusable, OSError) as reason:
            unusable[name] = str(reason)
        on_progress(done, len(listed))
    if not listed:
        raise UserError(f"{key}={root}: no images found; supported layouts: {LAYOUTS}")
    if len(images) < 2:
        raise UserError(
            f"{key}={root}: {len(images) or 'no'} usable image{'' if len(images) == 1 else 's'}, "
            f"at least 2 are needed (one to train on, one to hold out); {summarise(unusable, elsewhere='')}"
        )
    return ImageFolder(images, unusable)


def list_images(root: Path, key: str = "data.root") -> list[tuple[str, Path, str | None]]:
    """(name, image file, caption of the table or None) in the order of names.

    The name is the path inside the image folder. Files that a table names need not exist;
    images that it does not name are listed too, hidden files are not. A name may be spelled with
    other bytes than the file's, as macOS does with accents.
    """
    folder = image_folder(root)
    captions: dict[str, str] = {}
    try:
        tables = find_tables(root, folder)
        for table in reversed(tables):  # the first has the last word
            captions |= {name: words for name, words in read_table(table, folder).items() if words}
        found = {path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS}
    except OSError as error:
        raise UserError(f"{key}={root} cannot be read: {error}") from error
    found = {name for name in found if not name.startswith(".")}
    spelled = {normalize("NFC", name): name for name in found}
    named = {spelled.get(normalize("NFC", name), name): caption for name, caption in captions.items()}
    return [(name, folder / name, named.get(name)) for name in sorted(found | set(named))]


def recognised(root: Path) -> str:
    """What kind of image set a folder is, in words: `images/ with captions.txt`."""
    folder = image_folder(root)
    tables = find_tables(root, folder)
    where = "images" if folder == root else f"{folder.relative_to(root)}/"
    if tables:
        return f"{where} with {', then '.join(table.name for table in tables)}"
    beside = any(path.with_suffix(".txt").is_file() for _, path, _ in list_images(root))
    return f"{where} with a .txt beside each" if beside else f"{where} without captions"


def image_folder(root: Path) -> Path:
    """Where the images of a set lie: in one of SUBFOLDERS, or in the folder itself."""
    return next((root / name for name in SUBFOLDERS if (root / name).is_dir()), root)


def read_beside(path: Path) -> str | None:
    """The caption in the .txt file beside an image, in one line; None without such a file."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        return " ".join(beside.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise Unusable(f"{beside.name} is not UTF-8 text: save it as UTF-8") from None


def summarise(unusable: dict[str, str], most: int = 5, elsewhere: str = ", all in split.json") -> str:
    """`2 skipped: a.jpg (the file is missing), b.png (...)` in one line; empty if there are none."""
    if not unusable:
        return ""
    named = [f"{name} ({why})" for name, why in list(unusable.items())[:most]]
    more = f" and {len(unusable) - most} more{elsewhere}" if len(unusable) > most else ""
    return f"{len(unusable)} skipped: {', '.join(named)}{more}"
