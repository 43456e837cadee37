"""Caption tables: text files that hold the captions of many images, in one of three formats."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ghibli.runtime.errors import UserError

FILE_NAME = "file_name"
CAPTION_KEYS = ("text", "caption")  # the first one that a row has counts
RowReader = Callable[[Path, str], Iterator[tuple[str, str]]]
"""(table, its text) -> (file name, caption) of every row; the path is for messages."""


def read_table(table: Path, folder: Path, read_rows: RowReader) -> dict[str, str]:
    """Return image's file name -> caption, in one line; of several rows for one file the last counts.

    Args:
        table: its rows name paths from its own folder, or names within `folder`.
        folder: where the images are.
        read_rows: the reader of its format.

    Raises:
        UserError: not UTF-8, or a row that cannot be read, named by its number.
    """
    return {
        name_within(folder, table.parent, name): " ".join(caption.split())
        for name, caption in read_rows(table, read_text(table))
    }


def read_text(table: Path) -> str:
    """Return the table's text, without a byte order mark.

    Raises:
        UserError: not UTF-8.
    """
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{table} line {line} is not UTF-8 text: save the file as UTF-8") from None


def bar_rows(table: Path, text: str) -> Iterator[tuple[str, str]]:
    """Iterate over (file name, caption) of lines `file|caption`."""
    for number, line in enumerate(text.split("\n"), start=1):
        name, bar, caption = line.partition("|")
        if bar and name.strip():
            yield name.strip(), caption
        elif line.strip():
            raise UserError(f"{table} line {number}: expected `file|caption`, found `{line.strip()[:60]}`")


def json_rows(table: Path, text: str) -> Iterator[tuple[str, str]]:
    """Iterate over (file name, caption) of lines `{"file_name": ..., "text": ...}`, the hub's format."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{table} line {number} is not a JSON object: `{line.strip()[:60]}`")
        yield name_and_caption(row, f"{table} line {number}")


def csv_rows(table: Path, text: str) -> Iterator[tuple[str, str]]:
    """Iterate over (file name, caption) of rows below a header with file_name and text."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield name_and_caption(row, f"{table} line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{table} line {reader.line_num} cannot be read: {error}") from None


def name_and_caption(row: dict[str, Any], where: str) -> tuple[str, str]:
    """Return (file name, caption) of one row; the caption may be empty.

    Raises:
        UserError: no file name, no caption, or a caption that is not text.
    """
    if not isinstance(row.get(FILE_NAME), str) or not row[FILE_NAME].strip():
        raise UserError(f"{where} has no {FILE_NAME}: expected {FILE_NAME} and {CAPTION_KEYS[0]}")
    key = next((key for key in CAPTION_KEYS if key in row), None)
    if key is None:
        raise UserError(f"{where} has no {CAPTION_KEYS[0]}: expected {FILE_NAME} and {CAPTION_KEYS[0]}")
    caption = row[key] or ""
    if not isinstance(caption, str):
        raise UserError(f"{where}: its {key} is not text: `{str(caption)[:60]}`")
    return row[FILE_NAME].strip(), caption


def name_within(folder: Path, table_folder: Path, name: str) -> str:
    """Return an image's name within `folder`, given as a table in `table_folder` spells it."""
    path = PurePosixPath(name)
    try:
        return str(path.relative_to(folder.relative_to(table_folder).as_posix()))
    except ValueError:  # written as within the folder already
        return name
