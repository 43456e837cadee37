"""Look at runs from Python, as in a notebook: `from ghibli import Run, show`. It only reads a run's files."""

from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ghibli.images.read import open_file, open_image
from ghibli.runs.find import run_named
from ghibli.runs.folder import RunDir
from ghibli.runs.monitor import read_gains
from ghibli.runtime.commands import command_here, list_hint
from ghibli.runtime.errors import UserError
from ghibli.runtime.terminal import one_line


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

    def curve(self) -> Image.Image:
        """Draw the held-out gain over the base by epoch with its 95 % band, RGB; 0 is before training."""
        gains = read_gains(self.folder)
        figure = Figure((6, 3), layout="constrained")
        axes = figure.subplots()
        epochs = [gain.epoch for gain in gains]
        axes.axhline(0, color="grey", linewidth=1)
        axes.fill_between(epochs, [gain.low for gain in gains], [gain.high for gain in gains], alpha=0.25)
        axes.plot(epochs, [gain.value for gain in gains], marker="o")
        axes.set(xlabel="epoch", ylabel="gain over the base, %", title=f"{self.path.name}: held-out images")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
        return open_file(drawn).convert("RGB")


def show(run: Run | str | Path = "latest") -> None:
    """Display a run in a notebook: state and gain, what the doctor found, the gain curve, the newest grid.

    Args:
        run: one, its folder, or `latest`.

    Raises:
        UserError: as Run, or this Python has no IPython.
    """
    try:
        from IPython.display import display
    except ImportError as error:
        raise UserError("show needs a notebook; Run(...).grid() returns the image") from error
    shown = run if isinstance(run, Run) else Run(run)
    findings = shown.status.get("findings") or []
    lines = [repr(shown), *(f"doctor: {found['name']}: {found['text']}" for found in findings)]
    display({"text/plain": "\n".join(map(one_line, lines))}, raw=True)
    display(shown.curve())
    if any(shown.folder.samples.glob("*.png")):
        display(shown.grid())


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
