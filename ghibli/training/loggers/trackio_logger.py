"""The trackio dashboard: one store of all runs, where trackio keeps it, shown by `trackio show`.

trackio never raises: what it cannot write it tells by a Python warning, often from a thread of its own.
"""

import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trackio
from PIL import Image

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here
from ghibli.training.loggers.dashboard import Table

PACKAGE = Path(trackio.__file__).parent


class TrackioDashboard:
    """A run in trackio's store."""

    label = "trackio"

    def __init__(self, config: Config, run: RunDir, name: str):
        self.project = config.wandb.project
        self.failures: list[str] = []  # what trackio has warned of
        self.show_warning = warnings.showwarning
        warnings.filterwarnings("always", module=r"trackio\b")  # else a second run's failure is no news
        warnings.showwarning = self.note_warning
        status = run.status.read()
        known = status.get("trackio_name")
        chosen = known or config.wandb.name or f"{run.path.resolve().name} {name}"
        chosen = chosen.replace("/", "_")  # trackio makes a folder of this name
        try:
            with silent():
                self.experiment = trackio.init(
                    self.project, chosen, config.wandb.group, resume="allow" if known else "never",
                    config=asdict(config) | {"git_commit": status.get("git_commit")},
                    embed=False, auto_log_cpu=False, auto_log_gpu=False,
                )  # fmt: skip
            self.raise_failure()
        except Exception:
            warnings.showwarning = self.show_warning
            raise
        run.status.update(trackio_name=chosen)

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        self.log(dict(values), step)

    def log_image(self, name: str, image: Image.Image, caption: str, step: int) -> None:
        self.log({name: trackio.Image(image, caption=caption)}, step)

    def log_table(self, table: Table, step: int) -> None:
        self.log({table.name: trackio.Table(list(table.columns), [list(row) for row in table.rows])}, step)

    def log_finding(self, name: str, text: str, step: int) -> None:
        with silent():
            self.experiment.alert(name, text, step=step)
        self.raise_failure()

    def log_summary(self, values: Mapping[str, float], step: int) -> None:
        self.log(dict(values), step)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send values, and raise what trackio could not write of earlier ones."""
        self.experiment.log(values, step)
        self.raise_failure()

    def how_to_look(self) -> list[str]:
        return [f"trackio  {command_here('trackio', 'show', '--project', self.project)}"]

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: as log.
        """
        try:
            with silent():
                trackio.finish()
        finally:
            warnings.showwarning = self.show_warning
        self.raise_failure()

    def note_warning(
        self, message: Warning | str, category: type[Warning], filename: str, *more: Any, **named: Any
    ) -> None:
        """Keep a warning of trackio's; leave any other to Python."""
        if Path(filename).is_relative_to(PACKAGE):
            self.failures.append(str(message))
        else:
            self.show_warning(message, category, filename, *more, **named)

    def raise_failure(self) -> None:
        """Raise an OSError with the first thing that trackio has warned of."""
        if self.failures:
            raise OSError(self.failures[0])


def open_dashboard(config: Config, run: RunDir, name: str) -> TrackioDashboard:
    """Start a run in trackio's store; a resumed run continues the one that it began."""
    return TrackioDashboard(config, run, name)


def silent() -> redirect_stdout:
    """Return a context in which trackio's greetings are not printed; what fails it tells by a warning."""
    return redirect_stdout(io.StringIO())
