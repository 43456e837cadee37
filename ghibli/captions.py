"""Picture folders of every supported layout -> a list of (picture file, caption), and reading one."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ghibli.mistakes import UserMistake

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LAYOUTS = "images/ beside captions.txt (lines `file|caption`), or pictures with a .txt beside each"


@dataclass(frozen=True)
class CaptionedPicture:
    """One usable picture."""

    path: Path
    caption: str  # with the style suffix
    content_hash: str  # sha256 of the file's bytes, hex


@dataclass(frozen=True)
class PictureFolder:
    """What was found in a folder."""

    pictures: list[CaptionedPicture]
    unusable: dict[str, str]  # file name -> why it is skipped


def read_folder(
    root: Path,
    *,
    style: str,
    default_caption: str | None,
    min_side: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PictureFolder:
    """Reads every caption and checks every picture of a folder, in the order of their names.

    Args:
        root: a folder in one of the supported layouts.
        style: text appended to every caption, such as ", Studio Ghibli style".
        default_caption: stands in for a missing caption; None makes such a picture unusable.
        min_side: px; a picture whose shorter side is smaller is unusable.
        on_progress: called with (pictures checked, pictures in all).

    Raises:
        UserMistake: no such folder, no pictures, or none of them usable.
    """
    if not root.is_dir():
        raise UserMistake(f"data.root={root}: no such folder")
    pictures: list[CaptionedPicture] = []
    unusable: dict[str, str] = {}
    listed = list(list_pictures(root))
    for done, (path, caption) in enumerate(listed, start=1):
        caption = caption or default_caption
        trouble = (
            problem_with(path, min_side) if caption else "it has no caption (data.caption=TEXT gives one)"
        )
        if trouble:
            unusable[path.name] = trouble
        else:
            content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
            pictures.append(CaptionedPicture(path, f"{caption}{style}", content_hash))
        on_progress(done, len(listed))
    if not pictures and not unusable:
        raise UserMistake(f"data.root={root}: no pictures found; supported layouts: {LAYOUTS}")
    if len(pictures) < 2:
        raise UserMistake(
            f"data.root={root}: {len(pictures)} usable pictures, at least 2 are needed "
            f"(one to train on, one to hold out); {summarise(unusable)}"
        )
    return PictureFolder(pictures, unusable)


def list_pictures(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Yields (picture file, caption or None) in the order of names; the files need not exist."""
    table = root / "captions.txt"
    folder = root / "images" if (root / "images").is_dir() else root
    if table.is_file():
        captions = read_caption_table(table)
        yield from sorted((folder / name, caption) for name, caption in captions.items())
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURE_ENDINGS:
            beside = path.with_suffix(".txt")
            yield path, read_text(beside).strip() or None if beside.is_file() else None


def read_caption_table(table: Path) -> dict[str, str]:
    """captions.txt as file name -> caption; of several lines for one file the last counts.

    Raises:
        UserMistake: a line without `|`, named by its number.
    """
    captions = {}
    for number, line in enumerate(read_text(table).splitlines(), start=1):
        if not line.strip():
            continue
        name, bar, caption = line.partition("|")
        if not bar:
            raise UserMistake(f"{table} line {number}: expected `file|caption`, found `{line[:60]}`")
        captions[name.strip()] = caption.strip()
    return captions


def read_text(path: Path) -> str:
    """A UTF-8 text file's content, with or without a byte order mark.

    Raises:
        UserMistake: the file is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserMistake(f"{path} is not UTF-8 text: save it as UTF-8") from None


def problem_with(path: Path, min_side: int) -> str | None:
    """Why a picture cannot be used, or None. Reads the whole file, so a truncated one is found."""
    if not path.is_file():
        return "the file is missing"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                width, height = file.size
                file.draft("RGB", (min_side, min_side))  # JPEG: decode small, which is quick
                file.load()
    except Exception as error:  # Pillow raises many types on broken files; each becomes a line
        return f"it cannot be read ({error})"
    if min(width, height) < min_side:
        return f"it is too small: {width}x{height} px, data.min_side={min_side}"
    return None


def open_picture(path: Path) -> Image.Image:
    """The whole picture as 8-bit RGB, turned as its EXIF says, transparency on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that is still refused
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    if picture.mode.startswith("I") or picture.mode == "F":
        return sixteen_bit_to_rgb(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def sixteen_bit_to_rgb(picture: Image.Image) -> Image.Image:
    """A 16-bit grey picture (0 .. 65535) as 8-bit RGB; Pillow's own conversion clips at 255."""
    grey = np.asarray(picture, dtype=np.float64)
    eight_bit = np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8)
    return Image.fromarray(eight_bit).convert("RGB")


def summarise(unusable: dict[str, str], most: int = 5) -> str:
    """`2 skipped: a.jpg (the file is missing), b.png (...)` in one line; empty if there are none."""
    if not unusable:
        return ""
    named = [f"{name} ({why})" for name, why in list(unusable.items())[:most]]
    more = f" and {len(unusable) - most} more, all in split.json" if len(unusable) > most else ""
    return f"{len(unusable)} skipped: {', '.join(named)}{more}"
