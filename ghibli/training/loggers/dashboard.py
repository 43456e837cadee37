"""What every dashboard shows of a run, and the guard around it: no failure of one ends a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch.loggers.logger import Logger
from PIL import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """A table for a dashboard, which may draw it."""

    name: str  # below which it is found, such as probe/gain_curve
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    chart: str = ""  # bar: the second column over the first; lines: all others over the first; "": a table


class Dashboard(Protocol):
    """A place that shows a run. Each method may raise whatever its library raises."""

    label: str  # its name in a message

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to the curve of each value."""

    def log_image(self, name: str, image: Image.Image, caption: str, step: int) -> None:
        """Show an RGB image."""

    def log_table(self, table: Table, step: int) -> None:
        """Show a table, or the chart that it is for."""

    def log_finding(self, name: str, text: str, step: int) -> None:
        """Show what the doctor found."""

    def log_summary(self, values: Mapping[str, float], step: int) -> None:
        """Show values that describe the whole run."""

    def how_to_look(self) -> list[str]:
        """Return addresses and commands that show the run."""

    def close(self) -> None:
        """Write what is left and end."""


class DashboardLogger(Logger):
    """Lightning's logger of one dashboard, whose first failure is one warning; then it does nothing more."""

    def __init__(self, dashboard: Dashboard):
        super().__init__()
        self.dashboard = dashboard
        self.is_lost = False

    @property
    def name(self) -> str:
        return self.dashboard.label

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.send(lambda: self.dashboard.log_values(dict(metrics), step or 0))

    def log_hyperparams(self, *words: Any, **more: Any) -> None:
        """Do nothing: a dashboard gets all settings when it is opened."""

    def log_image(self, name: str, image: Image.Image, caption: str, step: int) -> None:
        self.send(lambda: self.dashboard.log_image(name, image, caption, step))

    def log_table(self, table: Table, step: int) -> None:
        self.send(lambda: self.dashboard.log_table(table, step))

    def log_finding(self, name: str, text: str, step: int) -> None:
        self.send(lambda: self.dashboard.log_finding(name, text, step))

    def log_summary(self, values: Mapping[str, float], step: int) -> None:
        self.send(lambda: self.dashboard.log_summary(values, step))

    def how_to_look(self) -> list[str]:
        """Return addresses and commands that show the run; of a lost dashboard, what it had got."""
        try:
            return self.dashboard.how_to_look()
        except Exception as error:  # as in send
            self.lose(error)
            return []

    def close(self) -> None:
        """End the dashboard, a lost one too: it may hold a process or a file."""
        try:
            self.dashboard.close()
        except Exception as error:  # as in send
            self.lose(error)

    def send(self, action: Callable[[], None]) -> None:
        """Let the dashboard do something, unless it is lost."""
        if self.is_lost:
            return
        try:
            action()
        except Exception as error:  # the libraries share no type, and none of their errors may end a training
            self.lose(error)

    def lose(self, error: Exception) -> None:
        """Warn, once, that the dashboard is lost."""
        if not self.is_lost:
            self.is_lost = True
            warn_of(self.dashboard.label, error)


def warn_of(label: str, error: Exception) -> None:
    """Say in one line that a dashboard is lost, and where the numbers are."""
    log.warning(f"{label} failed ({first_words(error)}): going on without it; metrics.csv has all numbers")


def first_words(error: Exception) -> str:
    """Return the beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:100] or type(error).__name__
