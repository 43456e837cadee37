"""The ranking of a study: its columns, the table on the terminal, study.csv and effects.csv."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.table import Table

from ghibli.runs.settings import as_yaml
from ghibli.runtime.console import full_width
from ghibli.runtime.files import write_text
from ghibli.sweeps.effects import effects
from ghibli.sweeps.trials import Trial, varied

LONGEST_TEXT = 60  # characters of a cell on the terminal


@dataclass(frozen=True)
class Column:
    """One column of the ranking, after those of the varied settings.

    The terminal, study.csv and the report all take their columns from COLUMNS.
    """

    title: str  # for a person
    csv_names: tuple[str, ...]  # in study.csv
    value: Callable[[Trial], Any]  # None where a trial has none
    text: Callable[[Any], str]  # the value for a person
    csv_cells: Callable[[Any], tuple[Any, ...]] = lambda value: (value,)  # one for each of csv_names
    align: str = "right"  # in the report; the terminal aligns everything left
    optional: bool = False  # hidden from a person if no trial has a value
    folds: bool = False  # a text of words, broken between them on a narrow terminal

    @property
    def name(self) -> str:
        """The first of csv_names, which identifies the column."""
        return self.csv_names[0]

    def text_of(self, value: Any) -> str:
        """Format the value for a person; `-` for none."""
        return "-" if value is None else self.text(value)

    def csv_cells_of(self, value: Any) -> tuple[Any, ...]:
        """Return the value's cells in study.csv; empty cells for none."""
        return ("",) * len(self.csv_names) if value is None else self.csv_cells(value)


def distance_text(distance: tuple[float, float, str]) -> str:
    """Format a distance with its standard error and cell: `0.58 +- 0.22 (ddim 7.5)`."""
    value, error, cell = distance
    return f"{value:.2f} +- {error:.2f} ({cell})"


COLUMNS = [
    Column(
        title="gain over the base",
        csv_names=("gain", "gain_se"),
        value=lambda trial: trial.gain,
        text=lambda gain: gain.signed_size,
        csv_cells=lambda gain: (gain.value, gain.standard_error),
    ),
    Column(
        title="price",
        csv_names=("price", "price_se"),
        value=lambda trial: trial.price,
        text=lambda price: price.signed_size,
        csv_cells=lambda price: (price.value, price.standard_error),
        optional=True,
    ),
    Column(
        title="image distance",
        csv_names=("distance", "distance_se"),
        value=lambda trial: trial.distance,
        text=distance_text,
        csv_cells=lambda distance: distance[:2],
        optional=True,
    ),
    Column(title="epoch", csv_names=("best_epoch",), value=lambda trial: trial.best_epoch, text=str),
    Column(
        title="min",
        csv_names=("minutes",),
        value=lambda trial: trial.minutes,
        text="{:.1f}".format,
        csv_cells=lambda minutes: (f"{minutes:.1f}",),
    ),
    Column(
        title="verdict",
        csv_names=("verdict",),
        value=lambda trial: trial.verdict,
        text=str,
        align="left",
        optional=True,
        folds=True,
    ),
]


def visible_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """Return the columns to show a person, given the values of every trial by the columns' names."""
    return [
        column
        for column in COLUMNS
        if not column.optional or any(row[column.name] not in (None, "") for row in rows)
    ]


def ranking_table(trials: list[Trial]) -> Table:
    """Tabulate the ranking for the terminal; numbers and settings are never cut."""
    keys = varied(trials)
    rows = [{column.name: column.value(trial) for column in COLUMNS} for trial in trials]
    columns = visible_columns(rows)
    table = Table(box=None, pad_edge=False)
    for title in ("", *keys):
        table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column.title, no_wrap=not column.folds)
    for place, (trial, row) in enumerate(zip(trials, rows, strict=True), start=1):
        settings = [as_yaml(trial.settings.get(key)) for key in keys]
        texts = [column.text_of(row[column.name]) for column in columns]
        short = (shorten(text, LONGEST_TEXT, placeholder=" ...") for text in texts)
        table.add_row(str(place), *settings, *short)
    return full_width(table)


def ranking_csv(trials: list[Trial]) -> str:
    """Return the ranking as CSV: place, folder, varied settings, then COLUMNS."""
    keys = varied(trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", "trial", *keys, *(name for column in COLUMNS for name in column.csv_names)])
    for place, trial in enumerate(trials, start=1):
        settings = [as_yaml(trial.settings.get(key)) for key in keys]
        cells = [cell for column in COLUMNS for cell in column.csv_cells_of(column.value(trial))]
        writer.writerow([place, trial.run.path.name, *settings, *cells])
    return text.getvalue()


def effects_csv(trials: list[Trial]) -> str:
    """Return each setting's effect in points of gain, with errors, 95 % interval and its range, as CSV.

    se and the interval are over images, se_pairs is over pairs; least and most are of single pairs.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["key", "low", "high", "pairs", "difference", "se", "low95", "high95", "se_pairs", "least", "most"]
    )
    for effect in effects(trials):
        gain = effect.difference
        numbers = [gain.value, gain.standard_error, gain.low, gain.high, effect.error_over_pairs]
        points = [f"{100 * x:.4f}" for x in (*numbers, min(effect.each), max(effect.each))]
        writer.writerow([effect.key, as_yaml(effect.low), as_yaml(effect.high), effect.pairs, *points])
    return text.getvalue()


def write_table(folder: Path, trials: list[Trial]) -> Path:
    """Write study.csv, and effects.csv beside it; return the path of the former."""
    file = folder / "study.csv"
    write_text(file, ranking_csv(trials))
    write_text(folder / "effects.csv", effects_csv(trials))
    return file
