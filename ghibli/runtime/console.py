"""What a person sees: one console, one kind of bar with the time left, tables that are never cut."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(soft_wrap=True, highlight=False)


def make_bar() -> Progress:
    """A bar with label, count, a free text and the time left; nothing at all when piped."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def full_width(table: Table) -> Table:
    """The table, as wide as it needs to be: a pipe has 80 columns, and would cut it."""
    wide = Console(width=10_000)
    table.width = Measurement.get(wide, wide.options, table).maximum
    return table


@contextmanager
def counted(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a loop: yields the function to call with (done, total)."""
    with make_bar() as bar:
        task = bar.add_task(label, total=None, note="")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def relative_path(path: Path) -> str:
    """The path as a person would type it from here."""
    return os.path.relpath(path)
