"""The TensorBoard dashboard: event files in tensorboard/ of the run, which `tensorboard --logdir` shows.

It writes through torch's SummaryWriter, and not through Lightning's logger around it, which would expand
`$NAME` and `~` in a folder's name.
"""

import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import flatten
from ghibli.runtime.commands import command_here
from ghibli.runtime.console import relative_path
from ghibli.training.loggers.dashboard import Table

FOLDER = "tensorboard"  # in the run's folder
WRITER_MODULE = "tensorboard.summary.writer.event_file_writer"
BANDS = {  # charts of a value within its 95 % interval, on the tab "Custom Scalars"
    "gain": {
        "held-out gain over the base": [
            "Margin",
            ["probe/val_gain", "probe/val_gain_low", "probe/val_gain_high"],
        ],
        "price: what the base forgot": [
            "Margin",
            ["probe/price", "probe/price_low", "probe/price_high"],
        ],
    }
}


class TensorBoardDashboard:
    """A run as event files. A resumed run adds a file, which hides the steps that it makes again."""

    label = "TensorBoard"

    def __init__(self, config: Config, run: RunDir):
        status = run.status.read()
        self.folder = run.path / FOLDER
        settings = flatten(asdict(config) | {"git_commit": status.get("git_commit")})
        self.settings = {key: plain(value) for key, value in settings.items()}
        start = status["step"] + 1 if status.get("step") is not None else 0
        silence_writer_threads()
        self.writer = SummaryWriter(str(self.folder), purge_step=start)
        self.writer.add_custom_scalars(BANDS)
        lines = [f"    {key}: {value}" for key, value in settings.items()]  # indented: as code in markdown
        self.writer.add_text("settings", "\n".join(lines), start)

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, name: str, image: Image.Image, caption: str, step: int) -> None:
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.add_text(f"{name}/caption", caption, step)

    def log_table(self, table: Table, step: int) -> None:
        self.writer.add_text(table.name, as_markdown(table), step)

    def log_finding(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(f"doctor/{name}", text, step)

    def log_summary(self, values: Mapping[str, float], step: int) -> None:
        """Show the values beside the settings on the tab "HParams", where runs are compared."""
        self.writer.add_hparams(self.settings, dict(values), run_name=".", global_step=step)

    def how_to_look(self) -> list[str]:
        return [f"board    {command_here('tensorboard', '--logdir', Path(relative_path(self.folder)))}"]

    def close(self) -> None:
        self.writer.flush()
        self.writer.close()


def open_dashboard(config: Config, run: RunDir, name: str) -> TensorBoardDashboard:
    """Start an event file for this run; TensorBoard names a run after its folder."""
    return TensorBoardDashboard(config, run)


def plain(value: Any) -> bool | int | float | str:
    """Return a setting as a type that TensorBoard's table of settings takes."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def as_markdown(table: Table) -> str:
    """Return a table in markdown, numbers with all their digits."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


@cache
def silence_writer_threads() -> None:
    """Silence the tracebacks of TensorBoard's writing threads: the next caller gets the same error."""
    others = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__module__ != WRITER_MODULE:
            others(failed)

    threading.excepthook = hook
