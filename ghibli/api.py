"""Look at runs from Python, as in a notebook: `from ghibli.api import Run`.

It is a module of its own, and not `from ghibli import Run`: the package's `__init__.py` stays one docstring,
so that no command loads Pillow before it needs it. Only the run's files are read.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ghibli.images.read import open_image
from ghibli.runs.find import run_named
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here, list_hint
from ghibli.runtime.errors import UserError


class Run:
    """A run's files as pandas tables and Pillow images.

    Args:
        name: a run folder, or `latest`.

    Raises:
        UserError: no such folder, or no run in it.
    """

    def __init__(self, name: str | Path = "latest"):
        self.folder: RunDir = run_named(str(name))
        if not self.folder.status.path.is_file():
            raise UserError(f"{self.folder.path} is no run: it has no status.json {list_hint()}")

    def __repr__(self) -> str:
        gain, error = self.status.get("gain"), self.status.get("gain_se")
        result = "no gain yet" if gain is None else f"gain {100 * gain:.1f} % +- {100 * (error or 0):.1f} %"
        return f"Run({str(self.folder.path)!r}): {self.folder.status.state}, {result}"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def status(self) -> dict[str, Any]:
        """The content of status.json now: state, gain and its standard error (shares), hashes, findings."""
        return self.folder.status.read()

    @property
    def probe(self) -> Any:
        """probe.csv as a pandas.DataFrame: a row for each epoch, the untouched base first."""
        return table(self.folder.probe)

    @property
    def metrics(self) -> Any:
        """metrics.csv as a pandas.DataFrame: a row for every few optimiser steps."""
        return table(self.folder.metrics)

    @cached_property
    def adapter(self) -> Path:
        """The adapter's folder of the best epoch, for `pipeline.load_lora_weights`.

        Raises:
            UserError: the run has none, as before its end.
        """
        if not self.folder.adapter.is_dir():
            raise UserError(f"{self.path} has no adapter yet: it is {self.folder.status.state}")
        return self.folder.adapter

    def grid(self, name: str | None = None) -> Image.Image:
        """Return an image grid, RGB; a notebook shows it.

        Args:
            name: of a file in samples/ without its ending, such as epoch_005; by default the newest.

        Raises:
            UserError: there is no such grid.
        """
        found = sorted(self.folder.samples.glob("*.png"), key=lambda file: file.stat().st_mtime_ns)
        files = [file for file in found if name in (None, file.stem)]
        if not files:
            known = ", ".join(sorted(file.stem for file in found)) or "none yet"
            raise UserError(f"{self.path} has no grid{f' {name}' if name else ''}: it has {known}")
        return open_image(files[-1])


def table(file: Path) -> Any:
    """Read a CSV file of a run as a pandas.DataFrame.

    Raises:
        UserError: pandas is not installed, or there is no such file.
    """
    try:
        import pandas
    except ImportError as error:
        command = command_here("python", "-m", "pip", "install", "pandas")
        raise UserError(f"tables need pandas: {command}") from error
    if not file.is_file():
        raise UserError(f"{file} is not there yet: it is written after the first epoch")
    return pandas.read_csv(file)
