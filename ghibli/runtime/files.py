"""Atomic writes, with or without a checksum: a reader sees a complete file or none."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

ROOT = Path(__file__).parents[2]  # the folder that holds ghibli/, conf/ and train.py
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # on a read-only disk this fails even where there is no such file
            temporary.unlink()
        trouble = error if isinstance(error, OSError) else error.__context__
        if isinstance(trouble, OSError):  # torch.save wraps it in its own error
            trouble.filename = str(path)
            raise trouble from None
        raise


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


def is_whole(path: Path) -> bool:
    """Return whether a file of `write_with_checksum` is complete and unchanged."""
    length = len(CHECKSUM_PREFIX) + 32
    try:
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
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - len(CHECKSUM_PREFIX) - 32, 0))
            end = file.read()
    except OSError:
        return None
    return end.removeprefix(CHECKSUM_PREFIX).hex() if end.startswith(CHECKSUM_PREFIX) else None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; half a surrogate pair, of a file name that is no UTF-8, as `\\udce9`."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


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
    """Return the rows of a CSV file, every value as text; empty if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
