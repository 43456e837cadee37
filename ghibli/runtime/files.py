"""Atomic writes, with or without a checksum: a reader sees a complete file or none; names that are free."""

import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded

ROOT = Path(__file__).parents[2]  # the folder that holds ghibli/, conf/ and train.py
LARGEST_TABLE = 2**26  # bytes of a CSV file of a run; ours have some kilobytes
LONGEST_NAME = 255  # bytes of a file name on most file systems
NUMBERED = re.compile(r"\d{3,18}", re.ASCII)  # the name of a file that is one of a series, without its ending
CHECKSUM_PREFIX = b"sha256:"  # at the end of a file; the digest of 32 bytes follows
TEMPORARY = re.compile(r"\.ghibli-\d+-[0-9a-f]{8}\.tmp")  # names of temporary_beside, and no others


def temporary_beside(path: Path) -> Path:
    """Return a free name in the folder of a file to write; a process that is killed may leave it behind.

    It does not depend on the file's name, which may be as long as the file system allows.
    """
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"  # machines that share a cache may reuse a pid
    return path.with_name(f".ghibli-{unique}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file, flush it to disk and rename it to `path`.

    A reader sees the old file or the new one, never part of one. A failure leaves no temporary file behind.

    Raises:
        OSError: the disk is full, read-only and so on; its filename is `path`.
    """
    with _written(path, write) as temporary:
        os.replace(temporary, path)


def write_new(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write as write_atomically does, but under the next free name where `path` is taken; return the file.

    `a.png` becomes `a-2.png`, `a-3.png`, ... No file is ever replaced, nor one that another process writes at
    the same time.

    Raises:
        OSError: as write_atomically.
    """
    with _written(path, write) as temporary:
        for free in free_names(path):
            if _placed(temporary, free):
                return free
    raise AssertionError("free_names never ends")


@contextmanager
def _written(path: Path, write: Callable[[BinaryIO], Any]) -> Iterator[Path]:
    """Yield a temporary file beside `path` with what `write` wrote; it is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except BaseException as error:
        trouble = error if isinstance(error, OSError) else error.__context__
        if isinstance(trouble, OSError):  # torch.save wraps it in its own error
            trouble.filename = str(path)
            raise trouble from None
        raise
    finally:
        with suppress(OSError):  # it was renamed; on a read-only disk there never was one
            temporary.unlink()


def _placed(temporary: Path, path: Path) -> bool:
    """Give a temporary file its name unless that is taken; tell whether it could."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: claim the name with an empty file
        try:
            open(path, "xb").close()
        except FileExistsError:
            return False
        os.replace(temporary, path)
    return True


def free_names(path: Path) -> Iterator[Path]:
    """Yield `path` and then what it may be called instead, each short enough for a file system."""
    stem, ending = path.stem, path.suffix
    yield path.with_name(fitting(stem, ending))
    for number in itertools.count(2):
        yield path.with_name(fitting(stem, f"-{number}{ending}"))


def fitting(stem: str, ending: str) -> str:
    """Return stem + ending, the stem cut so that both together are at most LONGEST_NAME bytes."""
    return shortened(stem, LONGEST_NAME - len(os.fsencode(ending))) + ending


def shortened(name: str, most: int) -> str:
    """Cut a file name to at most so many bytes, between two characters."""
    while len(os.fsencode(name)) > most:
        name = name[:-1]
    return name


def next_number(folder: Path, ending: str) -> int:
    """Return the number after the highest of the files 000.png, 001.png, ... in a folder; 0 without any."""
    try:
        names = os.listdir(folder)
    except OSError:  # no such folder yet
        return 0
    paths = [Path(name) for name in names]
    taken = [int(p.stem) for p in paths if p.suffix.lower() == ending and NUMBERED.fullmatch(p.stem)]
    return max(taken, default=-1) + 1


def require_target(folder: Path, flag: str, needed: int) -> None:
    """Require that files can be written into a folder, which need not exist yet.

    Args:
        flag: that names the folder, for the message, such as --to.
        needed: bytes that will be written, about.

    Raises:
        UserError: it cannot be made or written, or its disk is too full.
    """
    existing = expanded(folder).absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise UserError(f"{flag} {folder}: nothing can be written there: {error.strerror}") from error
    if free < needed:
        raise UserError(
            f"{flag} {folder}: {free / 1e6:.0f} MB are free on that disk and about {needed / 1e6:.0f} MB are "
            "needed: free some space or name another folder"
        )


class _Hashing:
    """A file that computes the sha256 of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def write_with_checksum(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write atomically, and append the sha256 of what `write` wrote as the last bytes of the file."""

    def write_and_append(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        write(cast(BinaryIO, hashing))
        file.write(CHECKSUM_PREFIX + hashing.sha256.digest())

    write_atomically(path, write_and_append)


def require_plain(path: Path) -> int:
    """Return the size of a plain file in bytes; a link to one counts.

    Whoever opens a pipe waits, and a device may never end; a folder from elsewhere can hold both, or links to
    them.

    Raises:
        OSError: it is missing, or something else than a plain file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return found.st_size


def read_plain(path: Path, most: int) -> bytes:
    """Return the content of a plain file of at most so many bytes, which may be a stranger's.

    Raises:
        OSError: as require_plain, or it is larger.
    """
    require_plain(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)  # a file below /proc has a size of 0
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
    return content


def require_stored(file: Path) -> None:
    """Check that what torch saved takes no more memory than its file: torch compresses none, but reads one.

    Raises:
        OSError, ValueError: it is no plain file, or it is compressed.
    """
    require_plain(file)
    # Suppressed: a bare pickle, which torch reads too, is no zip and not compressed.
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed")


def is_whole(path: Path) -> bool:
    """Return whether a file of `write_with_checksum` is complete and unchanged."""
    length = len(CHECKSUM_PREFIX) + 32
    try:
        require_plain(path)
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - length
            file.seek(0)
            found = hashlib.sha256()
            while left > 0:
                chunk = file.read(min(left, 2**20))
                found.update(chunk)
                left -= len(chunk) or left
            return file.read() == CHECKSUM_PREFIX + found.digest()
    except OSError:
        return False


def checksum_of(path: Path) -> str | None:
    """Return the hex sha256 at the end of a file of `write_with_checksum`; None for any other file.

    The rest of the file is not read.
    """
    try:
        require_plain(path)
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - len(CHECKSUM_PREFIX) - 32, 0))
            end = file.read()
    except OSError:
        return None
    return end.removeprefix(CHECKSUM_PREFIX).hex() if end.startswith(CHECKSUM_PREFIX) else None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; bytes of file names that are not UTF-8 become escapes, as in JSON."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Write a CSV file with a header row atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, every value as text; empty if there is no file.

    Raises:
        OSError, ValueError, csv.Error: it is no plain file, too large, not UTF-8, or no CSV.
    """
    if not path.exists():
        return []
    text = read_plain(path, LARGEST_TABLE).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))
