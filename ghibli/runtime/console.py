"""Terminal output: the console, logging on it, progress bars with the time left, tables that are never cut.

The command line, train.py, sweep.py and the progress callbacks print on `console`. All other modules log
through `logging.getLogger(__name__)`; importing this module sets up the logger of the package.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text
from rich.traceback import Traceback

from ghibli.runtime.terminal import one_line, visible
from ghibli.runtime.wrapping import fold

LEVEL_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


class PlainConsole(Console):
    """Print text as it is: data is never markup, and its control characters are shown, not obeyed.

    Strings are made visible before they are measured, so columns stay straight. Whatever else is printed
    (Text objects, progress bars) goes through `render`.
    """

    def __init__(self, **options: Any):
        if os.environ.get("COLUMNS") == "0":  # what knows no width sets it, and rich would print nothing
            options.setdefault("width", 80)
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(self.folded(one) if isinstance(one, str) else one for one in objects), **options)

    def folded(self, text: str) -> str:
        """Break the lines of a text between words, where they are wider than the terminal."""
        return "\n".join(fold(line, self.width) for line in text.split("\n")) if self.is_terminal else text

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **(options | {"markup": False, "emoji": False}))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


console = PlainConsole()


class LineHandler(RichHandler):
    """Print a log record as its message alone, in one line, coloured by its level.

    A name with a line break in it would otherwise write a line of its own, such as one about an error.
    RichHandler would lay it out as a table as wide as the console, which is 80 columns in a pipe.
    """

    def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
        text = one_line(message)
        return Text(
            self.console.folded(text) if isinstance(self.console, PlainConsole) else text,
            LEVEL_STYLES.get(record.levelno, ""),
        )

    def render(
        self,
        *,
        record: logging.LogRecord,
        traceback: Traceback | None,
        message_renderable: ConsoleRenderable,
    ) -> ConsoleRenderable:
        return message_renderable


def set_up_logging() -> None:
    """Send what the package logs, from INFO up, to the console; a message is never read as rich markup.

    It stays off the root logger, which Hydra and other libraries configure: no line appears twice.
    """
    logger = logging.getLogger("ghibli")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(LineHandler(console=console))
    # On a CPU bitsandbytes would warn in every import of PEFT that a faster kernel is not there, and in
    # every layer that 8-bit products round to 16 bits first, as docs/training-sd15.md says.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


set_up_logging()


class TimeLeftColumn(TimeRemainingColumn):
    """The time left, with that word beside it; empty where it is not known, and when nothing is left."""

    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text("")
        return Text(f"{super().render(task).plain} left", "progress.remaining")


def make_bar() -> Progress:
    """Create a progress bar with label, count, a free text and the time left; silent when piped."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeLeftColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def full_width(table: Table) -> Table:
    """Make the table as wide as its content: a pipe has 80 columns and would cut it.

    On a narrower terminal the columns that may wrap do, between words; all others stay whole.
    """
    table.width = measure(table).maximum
    excess = table.width - console.width
    if console.is_terminal and excess > 0:
        table.width -= min(excess, sum(spare_width(column) for column in table.columns if not column.no_wrap))
    return table


def spare_width(column: Column) -> int:
    """Return by how much a column gets narrower where its texts are broken between words."""
    least, most = zip(*(measure(cell) for cell in (column.header, *column.cells)), strict=True)
    return max(most) - max(least)


def measure(renderable: RenderableType) -> Measurement:
    """Measure the least and the full width of what is to be printed."""
    wide = PlainConsole(width=10_000)
    return Measurement.get(wide, wide.options, renderable)


@contextmanager
def counted(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for a loop; yield the function to call with (done, total)."""
    with make_bar() as bar:
        task = bar.add_task(visible(label), total=None, note="")  # visible before it is measured
        yield lambda done, total: bar.update(task, completed=done, total=total)


def relative_path(path: Path) -> str:
    """Return the path relative to the current directory, as a user would type it."""
    return os.path.relpath(path)
