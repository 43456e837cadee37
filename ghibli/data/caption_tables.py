"""Where captions stand: in a table beside the images, which has one of three forms."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ghibli.runtime.errors import UserError

TABLES = (
    "captions.txt",
    "metadata.jsonl",
    "metadata.csv",
)  # of several the first that knows an image counts
NAME = "file_name"
TEXTS = ("text", "caption")  # the first that a row has counts


def find_tables(root: Path, folder: Path) -> list[Path]:
    """The tables of an image set, the one that counts most first.

    Args:
        root: what the user named.
        folder: where the images lie: root itself or a folder in it.
    """
    places = dict.fromkeys((root, folder))
    return [place / name for name in TABLES for place in places if (place / name).is_file()]


def read_table(table: Path, folder: Path) -> dict[str, str]:
    """Image's file name -> caption, in one line; of several rows for one file the last counts.

    Args:
        table: one of TABLES. Its names are paths from its own folder or names within `folder`.
        folder: where the images lie.

    Raises:
        UserError: not UTF-8, or a row that cannot be read, named by its number.
    """
    text = read_text(table)
    rows = {"captions.txt": bar_rows, "metadata.jsonl": json_rows, "metadata.csv": csv_rows}[table.name]
    return {
        name_within(folder, table.parent, name): " ".join(caption.split())
        for name, caption in rows(table, text)
    }


def read_text(table: Path) -> str:
    """The table's text, without a byte order mark."""
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{table} line {line} is not UTF-8 text: save the file as UTF-8") from None


def bar_rows(table: Path, text: str) -> Iterator[tuple[str, str]]:
    """(file name, caption) of lines `file|caption`."""
    for number, line in enumerate(text.split("\n"), start=1):
        name, bar, caption = line.partition("|")
        if bar and name.strip():
            yield name.strip(), caption
        elif line.strip():
            raise UserError(f"{table} line {number}: expected `file|caption`, found `{line.strip()[:60]}`")


def json_rows(table: Path, text: str) -> Iterator[tuple[str, str]]:
    """(file name, caption) of lines `{"file_name": ..., "text": ...}`, as hub image sets have them."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{table} line {number} is no JSON object: `{line.strip()[:60]}`")
        yield name_and_text(row, f"{table} line {number}")


def csv_rows(table: Path, text: str) -> Iterator[tuple[str, str]]:
    """(file name, caption) of rows below a heading with file_name and text."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield name_and_text(row, f"{table} line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{table} line {reader.line_num} cannot be read: {error}") from None


def name_and_text(row: dict[str, Any], where: str) -> tuple[str, str]:
    """(file name, caption) of one row; an empty or missing caption is an empty text."""
    if not isinstance(row.get(NAME), str) or not row[NAME].strip():
        raise UserError(f"{where} has no {NAME}: expected {NAME} and {TEXTS[0]}")
    key = next((key for key in TEXTS if key in row), None)
    if key is None:
        raise UserError(f"{where} has no {TEXTS[0]}: expected {NAME} and {TEXTS[0]}")
    caption = row[key] or ""
    if not isinstance(caption, str):
        raise UserError(f"{where}: its {key} is no text: `{str(caption)[:60]}`")
    return row[NAME].strip(), caption


def name_within(folder: Path, place: Path, name: str) -> str:
    """The name of an image within `folder`, as a table in `place` spells it, perhaps from there."""
    path = PurePosixPath(name)
    try:
        return str(path.relative_to(folder.relative_to(place).as_posix()))
    except ValueError:  # written as within the folder already
        return name
