"""Fetch an image set into a plain folder: from zip files, parquet shards, the hub, Kaggle."""

import errno
import hashlib
import io
import logging
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, snapshot_download

from ghibli.data.caption_tables import one_line
from ghibli.data.folder import list_images
from ghibli.data.inside import require_inside
from ghibli.data.layouts import enter, is_hidden
from ghibli.images.read import FORMATS, Unusable, image_endings, is_image_name, open_file
from ghibli.models.hub import HUB_FILES, hub_answers
from ghibli.models.load import is_here
from ghibli.prepare.request import require_images
from ghibli.runtime.commands import install_command
from ghibli.runtime.errors import UserError, disk_trouble, first_line
from ghibli.runtime.files import shortened
from ghibli.runtime.home import expanded
from ghibli.runtime.resources import free_disk

KAGGLE_SET = "shubham1921/real-to-ghibli-image-dataset-5k-paired-images"
KAGGLE_MANUALLY = (
    f"download the set {KAGGLE_SET} with a browser from kaggle.com, then: ghibli prepare --data archive.zip"
)
ENDINGS = {"MPO": ".jpg", "HEIF": ".heic"}  # of formats that have none of their own in FORMATS
TEXT_ENDINGS = {".txt", ".caption", ".jsonl", ".csv", ".parquet"}  # beside images, extracted from a zip
LARGEST_FILE = 2**28  # bytes of one file out of an archive
LEAST_TOTAL, MOST_GROWTH = 2**28, 100  # an archive may grow to so many bytes, or to so many times its size
ROWS = 4  # of a parquet file that are in memory at once
MIN_FREE_DISK = 2**30  # bytes that must stay free
BLOCK = 2**12  # bytes that a file or folder takes on a disk at least, however small it is
TEXT_COLUMNS = ("text", "caption", "prompt")
BY_HAND = "if you trust it, unpack it yourself and give the folder"
LONGEST_STEM = 200  # bytes of a folder's name, without its version and what it is called meanwhile
ENCRYPTED = 1  # bit of a zip member's flags
Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)


def fetch(data: str, into: Path, on_progress: Progress) -> Path:
    """Return the folder of images that `data` names; unpack or download it first if necessary.

    Args:
        data: a folder, a .zip or .parquet file, `kaggle`, or a hub dataset OWNER/NAME.
        into: where archives are unpacked, created if needed; what was unpacked before is reused.
        on_progress: called with (files or rows done, in total).

    Raises:
        UserError: no such thing, a damaged file, a full disk, no network or no account.
    """
    require_images(data)
    path = expanded(data)
    if data == "kaggle":
        return enter(download_kaggle())
    if path.is_dir():
        return unpack_shards(enter(path), into, path.resolve().name, on_progress)
    if path.is_file():
        target = into / versioned_name(path.stem, [path])
        if path.suffix.lower() == ".parquet":
            return unpack_parquet([path], target, on_progress)
        folder = enter(unpack_zip(path, target, on_progress))
        return unpack_shards(folder, into, f"{path.stem}-images", on_progress, path)
    return unpack_shards(download_dataset(data), into, data.replace("/", "--"), on_progress)


def versioned_name(stem: str, files: list[Path]) -> str:
    """Name the folder for what is in these files; other or changed files of the same name get another."""
    version = hashlib.sha256()
    for file in files:
        version.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return f"{shortened(stem, LONGEST_STEM)}-{version.hexdigest()[:8]}"


def unpack_shards(
    folder: Path, into: Path, name: str, on_progress: Progress, archive: Path | None = None
) -> Path:
    """Return the folder; where all its images are in parquet shards, unpack those below `into`.

    Args:
        archive: the zip file that the shards came out of, by whose size their growth is bounded.
    """
    shards = sorted(folder.rglob("*.parquet"))
    if not shards or list_images(folder):
        return folder
    for shard in shards:
        try:
            require_inside(shard, folder)
        except Unusable as reason:
            raise UserError(f"--data: {shard} cannot be used: {reason}") from None
    training = [shard for shard in shards if shard.name.startswith("train")]
    shards = training or shards
    return unpack_parquet(shards, into / versioned_name(name, shards), on_progress, archive)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which is renamed to `target` at the end; a failure removes it."""
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unpack_zip(file: Path, target: Path, on_progress: Progress) -> Path:
    """Extract images and captions from a zip file; nothing is written outside `target`.

    Raises:
        UserError: the file is damaged, encrypted, without images, larger than the free disk, or grows beyond
            all measure.
    """
    if target.is_dir():
        return target
    what = f"--data {file}"
    with refuse_damage(f"{what} is not a complete zip file"), zipfile.ZipFile(file) as archive:
        members = [info for info in archive.infolist() if is_wanted(info)]
        growth = Growth(what, file.stat().st_size)
        growth.add(*(info.file_size for info in members))
        growth.add_entries(sum(len(PurePosixPath(info.filename).parts) for info in members))
        check_free_disk(sum(info.file_size for info in members), target.parent, what)
        if not members:
            raise UserError(f"{what}: no images in it{left_in(archive)}")
        if any(info.flag_bits & ENCRYPTED for info in members):
            raise UserError(f"{what} is encrypted: unpack it yourself and give the folder")
        with atomic_folder(target) as folder:
            for done, info in enumerate(members, start=1):
                archive.extract(info, folder)  # the library drops .. and leading slashes
                on_progress(done, len(members))
        if others := left_in(archive):
            logger.warning(f"{what}{others}")
    return target


def left_in(archive: zipfile.ZipFile) -> str:
    """Return what stays in an archive in words, such as `; not unpacked: 2 .mp4`; empty if nothing does."""
    names = [PurePosixPath(info.filename) for info in archive.infolist() if not info.is_dir()]
    left = [name for name in names if not is_image_name(name) and name.suffix.lower() not in TEXT_ENDINGS]
    counts = Counter(name.suffix.lower() or "without an ending" for name in left if not is_metadata(name))
    words = [f"{count} {ending}" for ending, count in sorted(counts.items())]
    outside = sum(".." in name.parts for name in names)
    words += [f"{outside} whose names lead out of it"] if outside else []
    return f"; not unpacked: {', '.join(words)}" if words else ""


class Growth:
    """What comes out of an archive, in bytes, within limits."""

    def __init__(self, what: str, size: int):
        """Count for the option `what` and its archive of `size` bytes."""
        self.what, self.total, self.most = what, 0, max(LEAST_TOTAL, MOST_GROWTH * size)

    def add(self, *sizes: int) -> None:
        """Count files of these sizes.

        Raises:
            UserError: one of them is too large, or all together are.
        """
        if max(sizes, default=0) > LARGEST_FILE:
            raise UserError(
                f"{self.what}: a file in it has {max(sizes) >> 20} MiB, and at most {LARGEST_FILE >> 20} are "
                f"unpacked: {BY_HAND}"
            )
        self.total += sum(sizes)
        self.check(self.total)

    def add_entries(self, count: int) -> None:
        """Count so many files and folders: an archive of a few bytes can hold millions of empty ones.

        Raises:
            UserError: as add.
        """
        self.total += count * BLOCK
        self.check(self.total)

    def check(self, total: int) -> None:
        """Refuse a total beyond the limit.

        Raises:
            UserError: it is.
        """
        if total > self.most:
            raise UserError(
                f"{self.what} grows to more than {self.most >> 20} MiB, the larger of {LEAST_TOTAL >> 20} "
                f"MiB and {MOST_GROWTH} times its own size: {BY_HAND}"
            )


@contextmanager
def refuse_damage(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged archive into one line; trouble with the disk stays."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zipfile, its decompressors and pyarrow raise many types
        named_by_it = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        if disk_trouble(error) is not None and not named_by_it:
            raise
        raise UserError(f"{what}: {first_line(error)[:200]}; download it again") from error


def is_wanted(info: zipfile.ZipInfo) -> bool:
    """Return whether a member is an image or a caption file, and not macOS metadata."""
    path = PurePosixPath(info.filename)
    known = is_image_name(path) or path.suffix.lower() in TEXT_ENDINGS
    return not info.is_dir() and not is_metadata(path) and known


def is_metadata(path: PurePosixPath) -> bool:
    """Return whether a path in an archive is hidden, or what macOS adds."""
    return any(is_hidden(part) for part in path.parts)


def check_free_disk(needed: int, folder: Path, what: str, elsewhere: str = "--into another disk") -> None:
    """Require that the disk of a folder has room for `needed` bytes.

    Args:
        what: the option that needs them.
        elsewhere: how to choose another disk.

    Raises:
        UserError: there is less than that and MIN_FREE_DISK.
    """
    free = free_disk(folder)
    if needed + MIN_FREE_DISK > free:
        raise UserError(
            f"{what} needs {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} free: "
            f"free some space, or use {elsewhere}"
        )


def check_free_disk_for_base(hub_id: str) -> None:
    """Require that the hub cache has room for what is still to be downloaded of a base.

    Raises:
        UserError: it has not.
    """
    if is_here(hub_id) or not hub_answers():
        return
    try:
        files = snapshot_download(hub_id, **HUB_FILES, etag_timeout=5, dry_run=True)
    except (OSError, ValueError):  # loading reports what is wrong
        return
    needed = sum(file.file_size for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    check_free_disk(needed, cache, f"--base {hub_id}", "HF_HOME=FOLDER on another disk")


def unpack_parquet(
    shards: list[Path], target: Path, on_progress: Progress, archive: Path | None = None
) -> Path:
    """Write the images and captions of parquet shards as images/ and captions.txt below `target`.

    Args:
        archive: as for unpack_shards.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, or there is no image column.
    """
    if target.is_dir():
        return target
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"parquet files need pyarrow: {install_command('hub')}") from error
    with refuse_damage(f"--data: {shards[0].parent}: a parquet file is damaged"):
        files = [parquet.ParquetFile(shard) for shard in shards]
        came_as = shards if archive is None else [archive]
        growth = Growth(f"--data {came_as[0]}", sum(file.stat().st_size for file in came_as))
        groups = [file.metadata.row_group(n) for file in files for n in range(file.metadata.num_row_groups)]
        growth.check(sum(group.total_byte_size for group in groups))
        check_free_disk(sum(shard.stat().st_size for shard in shards), target.parent, growth.what)
        with atomic_folder(target) as folder:
            (folder / "images").mkdir()
            lines = list(unpacked_rows(files, shards[0], folder / "images", growth, on_progress))
            (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return target


def unpacked_rows(
    files: list[Any], shard: Path, folder: Path, growth: Growth, on_progress: Progress
) -> Iterator[str]:
    """Write the images of parquet files into a folder, and iterate over their lines for captions.txt.

    Args:
        shard: for messages.
    """
    total, number = sum(file.metadata.num_rows for file in files), 0
    for file in files:
        column, text = image_and_text_columns(file.schema_arrow, shard)
        for batch in file.iter_batches(batch_size=ROWS, columns=[column, *([text] if text else [])]):
            for row in batch.to_pylist():
                caption = caption_of(row.get(text), f"--data {shard} row {number + 1}")
                growth.add(len((row[column] or {}).get("bytes") or b""), len(caption))
                growth.add_entries(1)
                name = write_image_bytes(row[column] or {}, folder, number)
                number += 1
                on_progress(number, total)
                yield f"{name}|{caption}\n"


def caption_of(cell: Any, where: str) -> str:
    """Return the caption in a cell, in one line; of several the first, of none an empty one.

    Raises:
        UserError: it is not text.
    """
    first = (cell or [""])[0] if isinstance(cell, list) else cell or ""  # some sets have several
    if not isinstance(first, str | None):
        raise UserError(f"{where}: its caption is not text: `{str(first)[:60]}`")
    return one_line(first or "")


def image_and_text_columns(schema: Any, shard: Path) -> tuple[str, str | None]:
    """Return (image column, caption column or None) of a parquet file in the hub's image format.

    Raises:
        UserError: there is no image column.
    """
    found = next(
        (
            field.name
            for field in schema
            if str(field.type).startswith("struct<") and "bytes: binary" in str(field.type)
        ),
        None,
    )
    if found is None:
        raise UserError(f"--data {shard}: no image column among {', '.join(schema.names)}")
    return found, next((name for name in TEXT_COLUMNS if name in schema.names), None)


def write_image_bytes(cell: dict[str, Any], folder: Path, number: int) -> str:
    """Write the bytes of an image unchanged; return the file name, with the suffix of its format."""
    content = cell.get("bytes") or b""
    try:
        with open_file(io.BytesIO(content)) as file:
            ending = ENDINGS.get(file.format or "") or FORMATS[file.format or ""][0]
    except Exception:  # read_folder reports what is wrong with it, by name
        ending = ".png"
    name = f"{number:06d}{ending}"
    (folder / name).write_bytes(content)
    return name


def download_dataset(hub_id: str) -> Path:
    """Return the folder of a hub dataset in the hub cache; download what is missing.

    Raises:
        UserError: it is neither cached nor available from the hub.
    """
    online = hub_answers()
    wanted = [f"*{ending}" for ending in sorted(image_endings() | TEXT_ENDINGS)]
    try:
        return Path(snapshot_download(
            hub_id, repo_type="dataset", allow_patterns=wanted, etag_timeout=5, local_files_only=not online,
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        hub = f"does not provide it ({first_line(error)[:100]})" if online else "cannot be reached"
        raise UserError(
            f"--data {hub_id}: no such folder here, and the hub {hub}: give a folder or zip file instead"
        ) from error


def download_kaggle() -> Path:
    """Return the folder of the reference study's Kaggle set in kagglehub's cache; download it if missing.

    It holds dataset/trainA (photographs) and dataset/trainB_ghibli (drawings).

    Raises:
        UserError: kagglehub is not installed, Kaggle cannot be reached, or the download failed.
    """
    try:
        import kagglehub
    except ImportError as error:
        raise UserError(
            f"--data kaggle needs kagglehub: {install_command('hub')}; or {KAGGLE_MANUALLY}"
        ) from error
    if not hub_answers("https://www.kaggle.com"):
        raise UserError(f"--data kaggle: kaggle.com cannot be reached: {KAGGLE_MANUALLY}")
    try:
        return Path(kagglehub.dataset_download(KAGGLE_SET))
    except Exception as error:  # kagglehub and requests raise many types: no account, no such set, full disk
        reason = first_line(error)[:100]
        raise UserError(f"--data kaggle: the download failed ({reason}): {KAGGLE_MANUALLY}") from error
