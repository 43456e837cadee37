"""Read an image set of any supported layout: its usable images with captions, and why others are not."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ghibli.data.layouts import IMAGE_FILES, LAYOUTS, ListedImage, image_folder, supported_layouts
from ghibli.images.read import Unusable, check_image
from ghibli.runtime.errors import UserError, require_folder

NO_CAPTION = "it has no caption"


@dataclass(frozen=True)
class CaptionedImage:
    """One usable image."""

    path: Path
    caption: str  # with the style suffix
    content_hash: str  # sha256 of the file's bytes, hex


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder."""

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
    """Read every caption and check every image of a folder, in the order of their names.

    Args:
        root: a folder in one of the supported layouts; `~` is the home folder.
        style: text appended to every caption, such as ", Studio Ghibli style".
        default_caption: replaces a missing caption; None makes such an image unusable.
        min_side: px; an image whose shorter side is smaller is unusable.
        key: the setting that names the folder.
        on_progress: called with (images checked, images in all).
        on_image: called with each readable image, which may be downscaled to `min_side`.

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
        raise UserError(f"{key}={root}: no images found; supported layouts: {supported_layouts()}")
    if len(images) < 2:
        raise UserError(
            f"{key}={root}: {len(images) or 'no'} usable image{'' if len(images) == 1 else 's'}, "
            f"at least 2 are needed (one to train on, one to hold out); {summarise(unusable, elsewhere='')}"
        )
    return ImageFolder(images, unusable)


def list_images(root: Path, key: str = "data.root") -> list[ListedImage]:
    """Return the images of every layout that recognises the folder, in the order of their names.

    Files that a caption table names need not exist; images that it does not name are listed too, hidden
    files are not.

    Raises:
        UserError: the folder or a caption table cannot be read.
    """
    listed: dict[Path, ListedImage] = {}
    try:
        for _, layout in LAYOUTS.items():
            for image in layout.list_images(root) if layout.recognise(root) else []:
                if image.path not in listed or listed[image.path].caption is None:
                    listed[image.path] = image
    except OSError as error:
        raise UserError(f"{key}={root} cannot be read: {error}") from error
    return sorted(listed.values(), key=lambda image: image.name)


def recognised(root: Path) -> str:
    """Return what kind of image set a folder is, in words: `images/ with captions.txt`."""
    folder = image_folder(root)
    where = "images" if folder == root else f"{folder.relative_to(root)}/"
    found = [name for name, layout in LAYOUTS.items() if name != IMAGE_FILES and layout.recognise(root)]
    if found:
        return f"{where} with {', then '.join(found)}"
    beside = any(image.path.with_suffix(".txt").is_file() for image in list_images(root))
    return f"{where} with a .txt beside each" if beside else f"{where} without captions"


def read_beside(path: Path) -> str | None:
    """Return the caption in the .txt file beside an image, in one line; None without such a file.

    Raises:
        Unusable: the file is not UTF-8.
    """
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        return " ".join(beside.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise Unusable(f"{beside.name} is not UTF-8 text: save it as UTF-8") from None


def summarise(unusable: dict[str, str], most: int = 5, elsewhere: str = ", all in split.json") -> str:
    """Return `2 skipped: a.jpg (the file is missing), b.png (...)`, in one line; empty if there are none."""
    if not unusable:
        return ""
    named = [f"{name} ({why})" for name, why in list(unusable.items())[:most]]
    more = f" and {len(unusable) - most} more{elsewhere}" if len(unusable) > most else ""
    return f"{len(unusable)} skipped: {', '.join(named)}{more}"
