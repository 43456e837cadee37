"""Read an image set of any supported layout: its usable images with captions, and why others are not."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ghibli.data.caption_tables import one_line
from ghibli.data.inside import require_inside
from ghibli.data.layouts import (
    LAYOUTS,
    ListedImage,
    enter,
    image_folder,
    not_read,
    repeats_of,
    supported_layouts,
    tables,
    texts_beside,
    words_of,
)
from ghibli.images.read import Size, Unusable, check_image, say_once, without_warnings
from ghibli.runtime.errors import UserError, require_folder
from ghibli.runtime.home import expanded
from ghibli.runtime.terminal import one_line as one_line_of
from ghibli.runtime.wording import number_of

NO_CAPTION = "it has no caption"
LONGEST_CAPTION = 2**20  # bytes of such a file
MOST_THREADS = 8  # that read images at once


@dataclass(frozen=True)
class CaptionedImage:
    """One usable image."""

    path: Path
    caption: str  # with the style suffix
    content_hash: str  # sha256 of the file's bytes, hex
    name: str = ""  # path inside the image folder; left out, the file's name
    repeats: int = 1  # times that an epoch has it

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.name)


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder."""

    images: list[CaptionedImage]
    unusable: dict[str, str]  # path inside the image folder -> why it is skipped
    not_read: str = ""  # what else lies there, in words: `2 .mp4, 12 images in old/ (12)`


@dataclass(frozen=True)
class ReadOptions:
    """How the images of a folder are read."""

    style: str
    default_caption: str | None
    min_side: int
    on_image: Callable[[Path, Image.Image], None]
    on_size: Callable[[Path, Size], None]


def read_folder(
    root: Path,
    *,
    style: str,
    default_caption: str | None,
    min_side: int,
    key: str = "data.root",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_image: Callable[[Path, Image.Image], None] = lambda path, image: None,
    on_size: Callable[[Path, Size], None] = lambda path, size: None,
) -> ImageFolder:
    """Read every caption and check every image of a folder, in the order of their names, on all cores.

    Args:
        root: a folder in one of the supported layouts; `~` is the home folder.
        style: text appended to every caption, such as ", Studio Ghibli style".
        default_caption: replaces a missing caption; None makes such an image unusable.
        min_side: px; an image whose shorter side is smaller is unusable.
        key: the setting that names the folder.
        on_progress: called with (images checked, images in all).
        on_image: called, in any thread and order, with each readable image, which may be downscaled to
            `min_side`.
        on_size: called likewise with the size of the whole image, upright.

    Raises:
        UserError: no such folder, no images, or fewer than two of them usable.
    """
    require_folder(key, root)
    top, listed = enter_and_list(expanded(root), key)
    images: list[CaptionedImage] = []
    unusable: dict[str, str] = {}
    several: set[Path] = set()  # files of more than one image

    def note_frames(path: Path, image: Image.Image) -> None:
        if image.info["frames"] > 1:
            several.add(path)
        on_image(path, image)

    read_one = partial(
        read_or_reason, top=top, options=ReadOptions(style, default_caption, min_side, note_frames, on_size)
    )
    with without_warnings(), reading_threads() as pool:
        for done, (image, found) in enumerate(zip(listed, pool.map(read_one, listed), strict=True), start=1):
            if isinstance(found, CaptionedImage):
                images.append(found)
            else:
                unusable[image.name] = found
            on_progress(done, len(listed))
    others = not_read(top, listed, several)
    if not listed:
        instead = f" (but {others})" if others else ""
        raise UserError(f"{key}={root}: no images found{instead}; supported layouts: {supported_layouts()}")
    if len(images) < 2:
        reasons = summarise(unusable, elsewhere="") + (f"; not read: {others}" if others else "")
        raise UserError(
            f"{key}={root}: {number_of(len(images), 'usable image') if images else 'no usable images'}, "
            f"at least 2 are needed (one to train on, one to hold out); {reasons}"
        )
    return ImageFolder(images, unusable, others)


@contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Start a thread per core to read images, as Pillow decodes outside of Python's lock; Ctrl-C ends all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(cores, MOST_THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def read_or_reason(listed: ListedImage, top: Path, options: ReadOptions) -> CaptionedImage | str:
    """Read one image and its caption; return why it cannot be used instead.

    Args:
        top: the folder of the set, which no name leads out of.
    """
    try:
        require_inside(listed.path, top)
        caption = read_beside(listed.path, top) if listed.caption is None else listed.caption
        image, size = check_image(listed.path, options.min_side)
        options.on_image(listed.path, image)
        options.on_size(listed.path, size)
        caption = caption or options.default_caption or words_of(listed.name)
        if not caption:
            raise Unusable(f"{NO_CAPTION} (data.caption=TEXT gives one)")
        content_hash = hashlib.sha256(listed.path.read_bytes()).hexdigest()
        repeats = repeats_of(listed.name)
        return CaptionedImage(listed.path, f"{caption}{options.style}", content_hash, listed.name, repeats)
    except (Unusable, OSError) as reason:
        return str(reason)


def enter_and_list(root: Path, key: str = "data.root") -> tuple[Path, list[ListedImage]]:
    """Return the folder that holds the set, root or the only folder in it, and its images by name.

    They are the images of every layout that recognises the folder. Files that a caption table names need not
    exist; images that it does not name are listed too, hidden files are not.

    Raises:
        UserError: the folder or a caption table cannot be read.
    """
    listed: dict[Path, ListedImage] = {}
    try:
        root = enter(root)
        for name, layout in LAYOUTS.items():
            unused: list[str] = []
            for image in layout.list_images(root) if layout.recognise(root) else []:
                first = listed.setdefault(image.path, image)
                if first.caption is None:
                    listed[image.path] = image
                elif image.caption not in (None, first.caption):
                    unused.append(image.name)
            if unused:
                more = " and others" if len(unused) > 3 else ""
                say_once(
                    f"{root}: {number_of(len(unused), 'caption')} of {name} left unused, as another table "
                    f"has others for {', '.join(unused[:3])}{more} (docs/data.md)"
                )
    except OSError as error:
        raise UserError(f"{key}={root} cannot be read: {error}") from error
    return root, sorted(listed.values(), key=lambda image: image.name)


def list_images(root: Path, key: str = "data.root") -> list[ListedImage]:
    """Return the images of a set in the order of their names; see `enter_and_list`."""
    return enter_and_list(root, key)[1]


def recognised(root: Path) -> str:
    """Return what kind of image set a folder is, in words: `images/ with captions.txt`."""
    top, listed = enter_and_list(root)
    folder = image_folder(top)
    where = "images" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    found = [name for name, layout in tables() if layout.recognise(top)]
    if found:
        kind = f"{where} with {', then '.join(found)}"
    else:
        beside = any(caption_file(image.path) for image in listed)
        kind = f"{where} with a .txt beside each" if beside else f"{where} without captions"
    repeated = repeated_folders([image.name for image in listed])
    return f"{kind}, {repeated}" if repeated else kind


def repeated_folders(names: list[str]) -> str:
    """Return kohya's folders among images in words: `10_name/ (12 images, each 10 times in an epoch)`."""
    counts = Counter(name.partition("/")[0] for name in names if repeats_of(name) > 1)
    folders = [
        f"{folder}/ ({number_of(count, 'image')}, each {repeats_of(f'{folder}/')} times in an epoch)"
        for folder, count in sorted(counts.items())
    ]
    return ", ".join(folders[:5]) + (f" and {len(folders) - 5} more" if len(folders) > 5 else "")


def caption_file(path: Path) -> Path | None:
    """Return the file with the caption beside an image, None without one."""
    return next((file for file in texts_beside(path) if file.is_file()), None)


def read_beside(path: Path, top: Path | None = None) -> str | None:
    """Return the caption in the .txt file beside an image, in one line; None without such a file.

    Args:
        top: the folder of the set; None = the image's own.

    Raises:
        Unusable: the file is not UTF-8, is too large, or is a link that leads out of `top`.
    """
    beside = caption_file(path)
    if beside is None:
        return None
    try:
        require_inside(beside, top or path.parent)
    except Unusable as reason:
        raise Unusable(f"{beside.name}: {reason}") from None
    if beside.stat().st_size > LONGEST_CAPTION:
        raise Unusable(f"{beside.name} is larger than {LONGEST_CAPTION >> 20} MiB: it is no caption")
    try:
        return one_line(beside.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable(f"{beside.name} is not UTF-8 text: save it as UTF-8") from None


def summarise(unusable: dict[str, str], most: int = 5, elsewhere: str = ", all in split.json") -> str:
    """Return `2 skipped: a.jpg (the file is missing), b.png (...)`, in one line; empty if there are none."""
    if not unusable:
        return ""
    named = [one_line_of(f"{name} ({why})") for name, why in list(unusable.items())[:most]]
    more = f" and {len(unusable) - most} more{elsewhere}" if len(unusable) > most else ""
    return f"{len(unusable)} skipped: {', '.join(named)}{more}"
