"""Caption tables: text files that hold the captions of many images, in one of three formats."""

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghibli.images.read import image_endings, say_once
from ghibli.runtime.errors import UserError

FILE_NAME = "file_name"
CAPTION_KEYS = ("text", "caption")  # the first one in which a row has text counts
EXPECTED = f"expected {FILE_NAME} and {CAPTION_KEYS[0]}"
DELIMITERS = ",;\t"  # of a .csv: spreadsheets write all three
MAX_TABLE = 2**28  # bytes; a million captions are a third of that
RowReader = Callable[[Path, str], Iterator[tuple[int, str, str]]]
"""(table, its text) -> (line number, file name, caption) of every row; the path is for messages."""


def read_table(table: Path, folder: Path, read_rows: RowReader) -> dict[str, str]:
    """Return image's file name as written -> caption, in one line; of several rows for one the last counts.

    Args:
        table: its rows name paths from its own folder, or names within `folder`.
        folder: where the images are.
        read_rows: the reader of its format.

    Raises:
        UserError: not UTF-8, too large, or a row that cannot be read, named by its number.
    """
    captions: dict[str, str] = {}
    replaced: list[str] = []
    for number, name, caption in read_rows(table, read_text(table)):
        within, line = name_within(folder, table.parent, name), one_line(caption)
        refuse_half_characters(name, line, f"{table} line {number}")
        if captions.get(within, line) != line:
            replaced.append(f"{within} (line {number})")
        captions[within] = line
    if replaced:
        say_once(
            f"{table}: {len(replaced)} rows replace the caption of an earlier row: {', '.join(replaced[:3])}"
            f"{' and others' if len(replaced) > 3 else ''}"
        )
    return captions


def one_line(caption: str) -> str:
    """Return a caption in one line, with single spaces."""
    return " ".join(caption.split())


def refuse_half_characters(name: str, caption: str, where: str) -> None:
    r"""Refuse surrogates that are no characters, which only JSON can write (`\ud800`).

    In a name, U+DC80 to U+DCFF stand for bytes that are not UTF-8, as Python lists such a file.

    Raises:
        UserError: there is one.
    """
    try:
        os.fsencode(name)
        caption.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half of a surrogate pair, no character: correct it") from None


def read_text(table: Path) -> str:
    """Return the table's text, without a byte order mark; all its line ends are newlines.

    Raises:
        UserError: not UTF-8, or too large for a table of captions.
    """
    if table.stat().st_size > MAX_TABLE:
        raise UserError(f"{table} is larger than {MAX_TABLE >> 20} MiB: it is no table of captions")
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{table} line {line} is not UTF-8 text: save the file as UTF-8") from None


def bar_rows(table: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """Iterate over (line, file name, caption) of lines `file|caption`."""
    for number, line in enumerate(text.split("\n"), start=1):
        name, bar, caption = line.partition("|")
        if bar and name.strip():
            yield number, name, caption
        elif line.strip():
            raise UserError(f"{table} line {number}: expected `file|caption`, found `{line.strip()[:60]}`")


def json_rows(table: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """Iterate over (line, name, caption) of lines `{"file_name": ..., "text": ...}`, the hub's format."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{table} line {number}"
        try:
            row = json.loads(line, object_pairs_hook=list)
        except (ValueError, RecursionError):
            row = None
        if not is_object(row):
            raise UserError(f"{where} is not a JSON object: `{line.strip()[:60]}`")
        yield number, *name_and_caption(without_repeats(row, where), where)


def is_object(row: Any) -> bool:
    """Tell a JSON object, read as (key, value) pairs, from an array and from all else."""
    return isinstance(row, list) and all(isinstance(pair, tuple) for pair in row)


def csv_rows(table: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """Iterate over (line, file name, caption) of rows below a header with file_name and text.

    Columns are separated by whatever separates them in the header: comma, semicolon or tab.
    """
    first_line, delimiter = header_of(text)
    spaced = f"{delimiter} " in first_line
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True
    )
    header: list[str] | None = None
    first = 1  # line in which the row begins
    try:
        for cells in reader:
            where, number, first = f"{table} line {first}", first, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip().lower() for cell in cells]
                continue
            refuse_misread(cells, header, where, spaced)
            row = without_repeats(list(zip(header, cells, strict=False)), where)
            yield number, *name_and_caption(row, where)
    except csv.Error as error:
        raise UserError(
            f"{table} line {first} cannot be read: {error}; a caption that holds the separator, a quote or a "
            'line break stands in double quotes, and a quote in it is doubled ("")'
        ) from None


def header_of(text: str) -> tuple[str, str]:
    """Return the first line that is not empty, and the separator with which it names a file_name column."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    for delimiter in DELIMITERS:
        if FILE_NAME in [cell.strip(' "').lower() for cell in line.split(delimiter)]:
            return line, delimiter
    return line, DELIMITERS[0]


def refuse_misread(cells: list[str], header: list[str], where: str, spaced: bool) -> None:
    """Refuse a row whose caption was cut at a separator, or that swallowed the next rows.

    Args:
        spaced: the header has spaces after its separators, so they mean nothing in rows.

    Raises:
        UserError: more cells with text than columns, a cell that reads like the rest of a caption, or a cell
            with a line that begins like a row.
    """
    if any(cell.strip() for cell in cells[len(header) :]):
        raise UserError(
            f"{where} has {len(cells)} cells, and there are {len(header)} columns: put a caption that holds "
            f"the separator in double quotes, found `{' | '.join(cells)[:60]}`"
        )
    first = min((header.index(key) for key in CAPTION_KEYS if key in header), default=len(header))
    rest = next((cell for cell in cells[first + 1 :] if re.match(r" \S", cell)), None)
    if rest is not None and not spaced:
        raise UserError(
            f"{where}: is `{rest.strip()[:40]}` the rest of the caption? put a caption that holds the "
            "separator in double quotes, and leave no space before other cells"
        )
    endings = "|".join(re.escape(ending) for ending in sorted(image_endings()))
    for cell in cells:  # lines are looked at one by one: a pattern across them takes time by their square
        if re.search(rf"\n[^\n]{{1,250}}(?:{endings})\"?[{DELIMITERS}]", cell, re.IGNORECASE):
            raise UserError(f"{where}: a double quote is opened and not closed: `{cell[:60]}`")


def without_repeats(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Return the columns of one row.

    Raises:
        UserError: file name or caption is given twice.
    """
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row and key in (FILE_NAME, *CAPTION_KEYS):
            raise UserError(f"{where} has two values of {key}: remove one")
        row[key] = value
    return row


def name_and_caption(row: dict[str, Any], where: str) -> tuple[str, str]:
    """Return (file name, caption) of one row; the caption may be empty.

    Raises:
        UserError: no file name, no caption, or a caption that is not text.
    """
    name = row.get(FILE_NAME)
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} has no {FILE_NAME}: {EXPECTED}")
    if not any(key in row for key in CAPTION_KEYS):
        raise UserError(f"{where} has no {CAPTION_KEYS[0]}: {EXPECTED}")
    for key in CAPTION_KEYS:
        if not isinstance(row.get(key) or "", str):
            raise UserError(f"{where}: its {key} is not text: `{str(row[key])[:60]}`")
    return name, next((row[key] for key in CAPTION_KEYS if (row.get(key) or "").strip()), "")


def name_within(folder: Path, table_folder: Path, name: str) -> str:
    """Return an image's path within `folder`, given as a table in `table_folder` spells it.

    A name that leads elsewhere is returned as it leads there, such as `../a.png` or an absolute path.
    """
    if "\\" in name and not os.path.lexists(folder / name):  # as Windows writes it
        name = name.replace("\\", "/")
    if table_folder.is_relative_to(folder):  # beside the images, perhaps in a folder of its own
        name = posixpath.join(table_folder.relative_to(folder).as_posix(), name)
    if posixpath.isabs(name):
        return relative_if_below(posixpath.normpath(name), folder)
    name = posixpath.normpath(name)
    if folder.is_relative_to(table_folder):
        prefix = folder.relative_to(table_folder).as_posix()
        name = name.removeprefix(f"{prefix}/") if prefix != "." else name
    return name


def relative_if_below(name: str, folder: Path) -> str:
    """Return an absolute name relative to a folder that it is below; any other as it is."""
    return os.path.relpath(name, folder.absolute()) if Path(name).is_relative_to(folder.absolute()) else name
