"""Files that are whole or not there: written beside their place, moved into it, perhaps with a checksum."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[2]  # the folder that holds ghibli/, conf/ and train.py
SEAL = b"sha256:"  # the digest follows


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a temporary file, flushes it to disk and renames it to `path`.

    A reader sees the old file or the new one, never a part. Nothing is left on failure.

    Raises:
        OSError: the disk is full, read-only and so on; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"  # a cache may be shared by machines with equal numbers
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk says so even where there is no such file
            temporary.unlink()
        trouble = error if isinstance(error, OSError) else error.__context__
        if isinstance(trouble, OSError):  # torch.save hides it behind an error of its own
            trouble.filename = str(path)
            raise trouble from None
        raise


class _Hashing:
    """A file that keeps the sha256 of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def write_with_checksum(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Like write_atomically, with the sha256 of all that `write` wrote in the last bytes of the file."""

    def sealed(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        write(hashing)
        file.write(SEAL + hashing.sha256.digest())

    write_atomically(path, sealed)


def is_whole(path: Path) -> bool:
    """True for a file of write_sealed in which no byte has changed since."""
    length = len(SEAL) + 32
    try:
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - length
            file.seek(0)
            found = hashlib.sha256()
            while left > 0:
                part = file.read(min(left, 2**20))
                found.update(part)
                left -= len(part) or left
            return file.read() == SEAL + found.digest()
    except OSError:
        return False


def checksum_of(path: Path) -> str | None:
    """The sha256 with which a file of write_sealed ends, hex; None for any other. The rest is not read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - len(SEAL) - 32, 0))
            end = file.read()
    except OSError:
        return None
    return end.removeprefix(SEAL).hex() if end.startswith(SEAL) else None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, every value as its text; empty when there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
