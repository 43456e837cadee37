"""Image sets from elsewhere -> a plain folder: zip files, parquet shards, the hub, Kaggle."""

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ghibli.data.folder import list_images
from ghibli.images.read import IMAGE_ENDINGS
from ghibli.models.hub import HUB_FILES, hub_answers
from ghibli.models.load import is_here
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.resources import free_disk

KAGGLE_SET = "shubham1921/real-to-ghibli-image-dataset-5k-paired-images"
BY_HAND = (
    f"download the set {KAGGLE_SET} with a browser from kaggle.com, then: ghibli prepare --data archive.zip"
)
READ = {*IMAGE_ENDINGS, ".txt", ".jsonl", ".csv", ".parquet"}  # what is unpacked of a zip
ENDINGS = {"JPEG": "jpg", "MPO": "jpg"}  # where it is not the name of the kind
ROOM = 2**30  # bytes of disk that stay free
TEXT_COLUMNS = ("text", "caption", "prompt")
Progress = Callable[[int, int], None]


def fetch(data: str, into: Path, on_progress: Progress) -> Path:
    """The folder of images that `data` names, unpacked or downloaded below `into` if need be.

    Args:
        data: a folder, a .zip or .parquet file, `kaggle`, or a hub data set OWNER/NAME.
        into: made if something has to be written; what is there already is used again.

    Raises:
        UserError: nothing of the kind, a damaged file, no room on the disk, no network or account.
    """
    place = Path(data).expanduser()
    if data == "kaggle":
        return with_images(from_kaggle())
    if place.is_dir():
        return unpacked(with_images(place), into, place.resolve().name, on_progress)
    if place.is_file():
        if place.suffix.lower() == ".parquet":
            return from_parquet([place], into / name_of(place.stem, [place]), on_progress)
        folder = with_images(from_zip(place, into / name_of(place.stem, [place]), on_progress))
        return unpacked(folder, into, f"{place.stem}-images", on_progress)
    if data.count("/") == 1 and not data.startswith((".", "/", "~")):
        return unpacked(from_hub(data), into, data.replace("/", "--"), on_progress)
    raise UserError(f"--data {data}: no such folder or file, and no hub data set (OWNER/NAME) or kaggle")


def with_images(folder: Path) -> Path:
    """The folder, or the only folder in it if it holds nothing else: zip files often wrap one."""
    while True:
        inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir() or list_images(folder):
            return folder
        folder = inside[0]


def name_of(stem: str, files: list[Path]) -> str:
    """A folder's name for what is in some files, which other files of the same name do not get."""
    known = hashlib.sha256()
    for file in files:
        known.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return f"{stem}-{known.hexdigest()[:8]}"


def unpacked(folder: Path, into: Path, name: str, on_progress: Progress) -> Path:
    """The folder itself, or the images of its parquet shards, below `into`, if it has no others."""
    shards = sorted(folder.rglob("*.parquet"))
    if not shards or list_images(folder):
        return folder
    training = [shard for shard in shards if shard.name.startswith("train")]
    shards = training or shards
    return from_parquet(shards, into / name_of(name, shards), on_progress)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that gets its name when all is in it."""
    started = target.with_name(f".{target.name}.part")
    shutil.rmtree(started, ignore_errors=True)
    started.mkdir(parents=True)
    try:
        yield started
        os.replace(started, target)
    finally:
        shutil.rmtree(started, ignore_errors=True)


def from_zip(file: Path, target: Path, on_progress: Progress) -> Path:
    """Unpacks images and captions of a zip file; nothing lands outside `target`.

    Raises:
        UserError: damaged, encrypted, nothing to unpack, or more than the disk holds.
    """
    if target.is_dir():
        return target
    try:
        with zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if is_wanted(info)]
            check_room(sum(info.file_size for info in members), target.parent, f"--data {file}")
            if not members:
                raise UserError(f"--data {file}: no images in it")
            with whole_folder(target) as folder:
                for done, info in enumerate(members, start=1):
                    archive.extract(info, folder)  # the library drops .. and leading slashes
                    on_progress(done, len(members))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"--data {file} is no whole zip file: {error}; get it anew") from error
    except RuntimeError as error:  # the library's word for a password
        raise UserError(f"--data {file}: {error}; unpack it yourself and give the folder") from error
    return target


def is_wanted(info: zipfile.ZipInfo) -> bool:
    """Is it an image or a file of captions, and not one of macOS's shadows?"""
    path = PurePosixPath(info.filename)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not info.is_dir() and not hidden and path.suffix.lower() in READ


def check_room(needed: int, folder: Path, what: str) -> None:
    """Raises a UserError unless the disk of a folder has room for so many bytes."""
    free = free_disk(folder)
    if needed + ROOM > free:
        raise UserError(
            f"{what} takes {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} free: "
            "free some space, or --into another disk"
        )


def check_room_for_base(name: str) -> None:
    """Raises a UserError unless the hub's cache has room for what is still to be downloaded of a base."""
    from huggingface_hub import constants, snapshot_download

    if is_here(name) or not hub_answers():
        return
    try:
        files = snapshot_download(name, **HUB_FILES, etag_timeout=5, dry_run=True)
    except (OSError, ValueError):  # loading will say what is wrong
        return
    needed = sum(file.file_size for file in files if file.will_download)
    check_room(needed, Path(constants.HF_HUB_CACHE), f"--base {name}")


def from_parquet(shards: list[Path], target: Path, on_progress: Progress) -> Path:
    """Writes the images and captions of parquet shards as images/ and captions.txt.

    Raises:
        UserError: pyarrow is not installed, a damaged file, or no column of images.
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
    check_room(sum(shard.stat().st_size for shard in shards), target.parent, f"--data {shards[0]}")
    with whole_folder(target) as folder:
        (folder / "images").mkdir()
        lines = []
        for file in files:
            column, text = columns(file.schema_arrow, shards[0])
            for batch in file.iter_batches(batch_size=64, columns=[column, *([text] if text else [])]):
                for row in batch.to_pylist():
                    name = write_image(row[column] or {}, folder / "images", len(lines))
                    words = row.get(text) or ""
                    first = words[0] if isinstance(words, list) else words  # some sets give several
                    lines.append(f"{name}|{' '.join(str(first).split())}\n")
                    on_progress(len(lines), total)
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return target


def columns(schema: Any, shard: Path) -> tuple[str, str | None]:
    """(column of images, column of captions or None) of a parquet file of images as the hub writes it."""
    found = next(
        (
            field.name
            for field in schema
            if str(field.type).startswith("struct<") and "bytes: binary" in str(field.type)
        ),
        None,
    )
    if found is None:
        raise UserError(f"--data {shard}: no column of images among {', '.join(schema.names)}")
    return found, next((name for name in TEXT_COLUMNS if name in schema.names), None)


def write_image(cell: dict[str, Any], folder: Path, number: int) -> str:
    """Writes one image's bytes as they are; returns the file's name, with its kind's ending."""
    import io

    content = cell.get("bytes") or b""
    try:
        kind = Image.open(io.BytesIO(content)).format or "png"
    except Exception:  # read_folder will say what is wrong with it, by name
        kind = "png"
    name = f"{number:06d}.{ENDINGS.get(kind, kind.lower())}"
    (folder / name).write_bytes(content)
    return name


def from_hub(name: str) -> Path:
    """A hub data set in the libraries' own cache; going on where a download broke off."""
    from huggingface_hub import snapshot_download

    online = hub_answers()
    wanted = [f"*{ending}" for ending in sorted(READ)]
    try:
        return Path(snapshot_download(
            name, repo_type="dataset", allow_patterns=wanted, etag_timeout=5, local_files_only=not online,
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        hub = f"does not give it ({first_line(error)[:100]})" if online else "cannot be reached"
        raise UserError(
            f"--data {name}: no such folder here, and the hub {hub}: give a folder or zip file instead"
        ) from error


def from_kaggle() -> Path:
    """The Kaggle set of the slides in kagglehub's own cache; {trainA, trainB_ghibli} below dataset/."""
    try:
        import kagglehub
    except ImportError as error:
        raise UserError(f"--data kaggle needs kagglehub: pip install -e '.[hub]'; or {BY_HAND}") from error
    if not hub_answers("https://www.kaggle.com"):
        raise UserError(f"--data kaggle: kaggle.com cannot be reached: {BY_HAND}")
    try:
        return Path(kagglehub.dataset_download(KAGGLE_SET))
    except Exception as error:  # kagglehub and requests raise many types: no account, no such set, no room
        reason = first_line(error)[:100]
        raise UserError(f"--data kaggle: the download failed ({reason}): {BY_HAND}") from error
