"""Files that an export wrote into a folder, told from the user's by a record of their checksums.

A later export replaces only what is still as an earlier one wrote it. The record notes every file with its
sha256, so a file that the user put there or has edited since is neither replaced nor deleted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_plain, write_json

LARGEST = 2**24  # bytes of a record
RECORD = ".ghibli-export.json"  # {"files": {path below the folder: sha256}}
STAGING = ".ghibli-export.part"  # where an export is prepared


def check_ours(folder: Path, names: list[str]) -> None:
    """Check that an export into `folder` replaces none of the user's files.

    Args:
        names: files and folders that it writes there.

    Raises:
        UserError: one of them exists and is not as an earlier export wrote it; the message names the file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder with --to DIR")
    noted = read_record(folder)
    for name in names:
        for file in files_below(folder / name):
            if file.is_symlink() or noted.get(file.relative_to(folder).as_posix()) != sha256(file):
                raise UserError(
                    f"{file} was not written by an export, or was changed since, and would be replaced: "
                    "move it away, or choose another folder with --to DIR"
                )


def read_record(folder: Path) -> dict[str, str]:
    """Read which files earlier exports wrote; empty when there is no record or a damaged one."""
    try:
        content = json.loads(read_plain(folder / RECORD, LARGEST).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    files = content.get("files") if isinstance(content, dict) else None
    return files if isinstance(files, dict) else {}


def files_below(place: Path) -> Iterator[Path]:
    """Yield a file or link itself, or everything in a folder that is no folder."""
    if place.is_symlink() or place.is_file():
        yield place
        return
    for folder, inner, names in os.walk(place):
        links = [name for name in inner if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted([*names, *links]))


def sha256(file: Path) -> str:
    """Hash a file's content; empty for what is no plain file."""
    if not file.is_file():
        return ""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def prepared(folder: Path, names: list[str]) -> Iterator[Path]:
    """Yield a hidden folder to prepare files in; afterwards they are put in place, after an error nothing is.

    Args:
        folder, names: as for check_ours, which has to be called first.
    """
    existed, staging = folder.exists(), folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        put_in_place(staging, folder, names)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def put_in_place(staging: Path, folder: Path, names: list[str]) -> None:
    """Move what was prepared in `staging` into the folder, remove the other `names`, and note the files."""
    mode = (staging / "README.md").stat().st_mode  # safetensors writes files that only their owner reads
    for file in files_below(staging):
        file.chmod(mode)
    written = {file.relative_to(staging).as_posix(): sha256(file) for file in files_below(staging)}
    kept = {
        path: digest
        for path, digest in read_record(folder).items()
        if path.partition("/")[0] not in names and path not in names and (folder / path).is_file()
    }
    noted = dict(sorted((kept | written).items()))
    write_json(folder / RECORD, {"files": noted})  # first: what follows may be interrupted
    for name in names:
        remove(folder / name)
        if (staging / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (staging / name).rename(folder / name)


def remove(place: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
