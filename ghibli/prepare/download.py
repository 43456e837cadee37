"""Fetch an image set into a plain folder: from zip files, parquet shards, the hub, Kaggle."""

import hashlib
import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, snapshot_download
from PIL import Image

from ghibli.data.folder import list_images
from ghibli.images.read import IMAGE_ENDINGS
from ghibli.models.hub import HUB_FILES, hub_answers
from ghibli.models.load import is_here
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.resources import free_disk

KAGGLE_SET = "shubham1921/real-to-ghibli-image-dataset-5k-paired-images"
KAGGLE_MANUALLY = (
    f"download the set {KAGGLE_SET} with a browser from kaggle.com, then: ghibli prepare --data archive.zip"
)
WANTED_SUFFIXES = {*IMAGE_ENDINGS, ".txt", ".jsonl", ".csv", ".parquet"}  # what is extracted from a zip
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}  # of image formats whose suffix is not their name
MIN_FREE_DISK = 2**30  # bytes that must stay free
TEXT_COLUMNS = ("text", "caption", "prompt")
Progress = Callable[[int, int], None]


def fetch(data: str, into: Path, on_progress: Progress) -> Path:
    """Return the folder of images that `data` names; unpack or download it first if necessary.

    Args:
        data: a folder, a .zip or .parquet file, `kaggle`, or a hub dataset OWNER/NAME.
        into: where archives are unpacked, created if needed; what was unpacked before is reused.
        on_progress: called with (files or rows done, in total).

    Raises:
        UserError: no such thing, a damaged file, a full disk, no network or no account.
    """
    path = Path(data).expanduser()
    if data == "kaggle":
        return unwrap(download_kaggle())
    if path.is_dir():
        return unpack_shards(unwrap(path), into, path.resolve().name, on_progress)
    if path.is_file():
        target = into / versioned_name(path.stem, [path])
        if path.suffix.lower() == ".parquet":
            return unpack_parquet([path], target, on_progress)
        folder = unwrap(unpack_zip(path, target, on_progress))
        return unpack_shards(folder, into, f"{path.stem}-images", on_progress)
    if data.count("/") == 1 and not data.startswith((".", "/", "~")):
        return unpack_shards(download_dataset(data), into, data.replace("/", "--"), on_progress)
    raise UserError(f"--data {data}: no such folder or file, and not a hub dataset (OWNER/NAME) or kaggle")


def unwrap(folder: Path) -> Path:
    """Descend into a folder that holds nothing but one other folder, as zip files often do."""
    while True:
        inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir() or list_images(folder):
            return folder
        folder = inside[0]


def versioned_name(stem: str, files: list[Path]) -> str:
    """Name the folder for what is in these files; other or changed files of the same name get another."""
    version = hashlib.sha256()
    for file in files:
        version.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return f"{stem}-{version.hexdigest()[:8]}"


def unpack_shards(folder: Path, into: Path, name: str, on_progress: Progress) -> Path:
    """Return the folder; where all its images are in parquet shards, unpack those below `into`."""
    shards = sorted(folder.rglob("*.parquet"))
    if not shards or list_images(folder):
        return folder
    training = [shard for shard in shards if shard.name.startswith("train")]
    shards = training or shards
    return unpack_parquet(shards, into / versioned_name(name, shards), on_progress)


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
        UserError: the file is damaged, encrypted, without images, or larger than the free disk.
    """
    if target.is_dir():
        return target
    try:
        with zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if is_wanted(info)]
            check_free_disk(sum(info.file_size for info in members), target.parent, f"--data {file}")
            if not members:
                raise UserError(f"--data {file}: no images in it")
            with atomic_folder(target) as folder:
                for done, info in enumerate(members, start=1):
                    archive.extract(info, folder)  # the library drops .. and leading slashes
                    on_progress(done, len(members))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"--data {file} is not a complete zip file: {error}; download it again") from error
    except RuntimeError as error:  # zipfile's error for an encrypted file
        raise UserError(f"--data {file}: {error}; unpack it yourself and give the folder") from error
    return target


def is_wanted(info: zipfile.ZipInfo) -> bool:
    """Return whether a member is an image or a caption file, and not macOS metadata."""
    path = PurePosixPath(info.filename)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not info.is_dir() and not hidden and path.suffix.lower() in WANTED_SUFFIXES


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


def unpack_parquet(shards: list[Path], target: Path, on_progress: Progress) -> Path:
    """Write the images and captions of parquet shards as images/ and captions.txt below `target`.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, or there is no image column.
    """
    if target.is_dir():
        return target
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install -e '.[hub]'") from error
    try:
        files = [parquet.ParquetFile(shard) for shard in shards]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--data: {shards[0].parent}: a parquet file is damaged: {first_line(error)}"
        ) from error
    total = sum(file.metadata.num_rows for file in files)
    check_free_disk(sum(shard.stat().st_size for shard in shards), target.parent, f"--data {shards[0]}")
    with atomic_folder(target) as folder:
        (folder / "images").mkdir()
        lines: list[str] = []
        for file in files:
            column, text = image_and_text_columns(file.schema_arrow, shards[0])
            for batch in file.iter_batches(batch_size=64, columns=[column, *([text] if text else [])]):
                for row in batch.to_pylist():
                    name = write_image_bytes(row[column] or {}, folder / "images", len(lines))
                    caption = row.get(text) or ""
                    first = caption[0] if isinstance(caption, list) else caption  # some sets have several
                    lines.append(f"{name}|{' '.join(str(first).split())}\n")
                    on_progress(len(lines), total)
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return target


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
        image_format = Image.open(io.BytesIO(content)).format or "png"
    except Exception:  # read_folder reports what is wrong with it, by name
        image_format = "png"
    name = f"{number:06d}.{SUFFIXES.get(image_format, image_format.lower())}"
    (folder / name).write_bytes(content)
    return name


def download_dataset(hub_id: str) -> Path:
    """Return the folder of a hub dataset in the hub cache; download what is missing.

    Raises:
        UserError: it is neither cached nor available from the hub.
    """
    online = hub_answers()
    wanted = [f"*{suffix}" for suffix in sorted(WANTED_SUFFIXES)]
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
            f"--data kaggle needs kagglehub: pip install -e '.[hub]'; or {KAGGLE_MANUALLY}"
        ) from error
    if not hub_answers("https://www.kaggle.com"):
        raise UserError(f"--data kaggle: kaggle.com cannot be reached: {KAGGLE_MANUALLY}")
    try:
        return Path(kagglehub.dataset_download(KAGGLE_SET))
    except Exception as error:  # kagglehub and requests raise many types: no account, no such set, full disk
        reason = first_line(error)[:100]
        raise UserError(f"--data kaggle: the download failed ({reason}): {KAGGLE_MANUALLY}") from error
