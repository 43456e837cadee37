"""What `ghibli watch` shows: a run or a study in some lines of text, read from its files and nothing else.

Every file may be missing, half way through an epoch, or damaged: what cannot be read is left out.
"""

import csv
import math
import os
import re
import textwrap
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ghibli.runs import lock
from ghibli.runs.find import folders_with
from ghibli.runs.folder import RunDir
from ghibli.runs.listing import ListedRun, listed, own_settings
from ghibli.runtime.commands import command_here, list_hint, quoted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_rows
from ghibli.runtime.terminal import one_line

HEIGHT = 9  # rows of the gain's chart, at most
LEAST_HEIGHT = 4  # rows of it, however low the terminal is
LABEL = 9  # columns before it, and before every other text
LEAST_RANKED = 3  # rows of a study's ranking, however low the terminal is
BARS = "▁▂▃▄▅▆▇█"
CHART_ROW = re.compile(r"[-\d.% ]{8}(?: [-o| ]*[o|][-o| ]*)")
CUT_NAME = re.compile("-[0-9a-f]{12}$")  # a long name of a trial ends in a hash instead of its last settings
EPOCHS = re.compile(r"^trainer:\n(?:[ \t].*\n)*?[ \t]+max_epochs: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Gain:
    """The gain or the price after an epoch and its 95 % interval, in percent; none if its ends are equal."""

    epoch: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "" if self.low == self.high else f" ({self.low:.1f} to {self.high:.1f})"
        return f"{self.value:.1f} %{interval} after epoch {self.epoch}"


def view(folder: Path, width: int, now: datetime, height: int | None = None) -> list[str]:
    """Describe a run, or a study with its ranking so far, in lines of at most `width` columns.

    Args:
        height: lines that there is room for: the chart and the ranking are made smaller.

    Raises:
        UserError: the folder holds neither, or may not be read.
    """
    if not readable_folder(folder):
        raise UserError(f"{folder}: no such folder {list_hint()}")
    run = RunDir(folder)
    if run.status.path.exists():
        return run_lines(run, width, now, height)
    trials = listed(RunDir(found) for found in folders_with("status.json", folder))
    if trials:
        return study_lines(folder, trials, width, now, height)
    if is_starting(folder):
        return [cut(one_line(folder), width), "loading: a run writes its first file after some seconds"]
    raise UserError(f"{folder} holds no run yet {list_hint()}")


def readable_folder(folder: Path) -> bool:
    """Return whether a folder is there.

    Raises:
        UserError: this user may not read it.
    """
    try:
        is_there = folder.is_dir()
    except PermissionError:
        is_there = False
    may_read = os.access(folder, os.R_OK | os.X_OK) if is_there else folder_above_is_open(folder)
    if not may_read:
        raise UserError(f"{folder}: you may not read it; its owner can: chmod -R go+rX {quoted(str(folder))}")
    return is_there


def folder_above_is_open(folder: Path) -> bool:
    """Return whether this user could tell that a folder is not there."""
    try:
        folder.lstat()
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def is_starting(folder: Path) -> bool:
    """Return whether a process has locked a run's folder, a study's or one of its trials'."""
    return any(lock.is_held(path) for path in (folder / ".lock", *folder.glob("*/.lock")))


def is_over(folder: Path) -> bool:
    """Return whether nothing will change any more: no run in the folder is being trained."""
    runs = [RunDir(found) for found in folders_with("status.json", folder)]
    return not is_starting(folder) and all(run.status.state != "running" for run in runs)


def run_lines(run: RunDir, width: int, now: datetime, height: int | None = None) -> list[str]:
    """Describe one run."""
    status = run.status.read()
    gains = read_gains(run)
    above = [
        one_line(run.path),
        f"{run.status.state_of(status)}   {one_line(status.get('settings', ''))}",
        *progress(run, status, now),
        "",
    ]
    below = after_chart(run, status, width)
    if height is not None and len(above) + 1 + LEAST_HEIGHT + len(below) > height:
        below = after_chart(run, status, width, most=2)
    room = HEIGHT if height is None else height - len(above) - len(below) - 1
    drawn = chart(gains, width, min(max(room, LEAST_HEIGHT), HEIGHT))
    return [cut(line, width) for line in (*above, *drawn, *below)]


def after_chart(run: RunDir, status: dict[str, Any], width: int, most: int | None = None) -> list[str]:
    """Describe all below the chart; a finding in `most` lines, None: as it is."""
    shown = [f"price    forgot {last}" for last in read_gains(run, "price")[1:][-1:]] + losses(run, width)
    for finding in status.get("findings") or []:
        shown += wrapped(f"doctor   {one_line(finding['name'])}: {one_line(finding['text'])}", width, most)
    grid = newest_grid(run)
    if grid is not None:
        shown.append(one_line(f"grid     {grid}"))
    if status.get("reason"):
        shown += wrapped(f"reason   {one_line(status['reason'])}", width, most)
    return shown


def study_lines(
    folder: Path, trials: list[ListedRun], width: int, now: datetime, height: int | None = None
) -> list[str]:
    """Describe a study: how many trials are in which state, the ranking so far, the trial at work."""
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    ranked = sorted(
        (trial for trial in trials if trial.gain is not None), key=lambda trial: -(trial.gain or 0.0)
    )
    at_work: list[str] = []
    for trial in trials:
        if trial.state == "running":
            less = None if height is None else height - len(at_work) - LEAST_RANKED - 6
            at_work += ["", *run_lines(trial.run, width, now, less)]
    shown = [cut(one_line(folder), width), cut(counts, width), ""]
    if ranked:
        room = len(ranked) if height is None else max(height - len(shown) - len(at_work) - 2, LEAST_RANKED)
        shown += [cut(line, width) for line in ranking(ranked[:room], trials)]
        if len(ranked) > room:
            shown.append(
                f"and {len(ranked) - room} more below them (`{command_here('ghibli', 'list')}` shows all)"
            )
    return shown + at_work


def ranking(ranked: list[ListedRun], trials: list[ListedRun]) -> list[str]:
    """List trials with their gain below a line of heads; each is named by what not all trials have."""
    names = own_settings([trial.run.path for trial in trials])
    rows = [("gain", "epoch", "state", "trial")]
    for trial in ranked:
        name = names[trial.run.path]
        if CUT_NAME.search(name):
            name = str(trial.status.get("settings", name))
        rows.append((trial.gain_text, str(trial.status.get("epoch", "-")), trial.state, one_line(name)))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(size) for text, size in zip(row, wide, strict=True)).rstrip() for row in rows
    ]


def read_gains(run: RunDir, measure: str = "val_gain") -> list[Gain]:
    """Read the gain or the price of each epoch from probe.csv, the untouched model's first."""
    found = []
    for row in readable_rows(run.probe):
        try:
            values = [100 * float(row[f"probe/{measure}{end}"]) for end in ("", "_low", "_high")]
            number = int(row["epoch"])
        except (KeyError, TypeError, ValueError):
            continue
        if all(map(math.isfinite, values[1:])):
            found.append(Gain(number, *values))
        elif math.isfinite(values[0]):  # of one image
            found.append(Gain(number, *values[:1] * 3))
    return found


def readable_rows(file: Path) -> list[dict[str, str]]:
    """Read a CSV file; empty when it cannot be read."""
    try:
        return read_rows(file)
    except (OSError, ValueError, csv.Error):
        return []


def chart(gains: list[Gain], width: int, height: int = HEIGHT) -> list[str]:
    """Draw the gain by epoch as text: `o` the value, `|` its 95 % interval, `-` the base's 0.

    Args:
        height: rows below the line of numbers.
    """
    if len(gains) < 2:
        return ["gain     after the first epoch"]
    low = min(0.0, *(gain.low for gain in gains))
    high = max(0.0, *(gain.high for gain in gains))
    step = (high - low) / (height - 1) or 1.0

    def row_of(value: float) -> int:
        return height - 1 - round((value - low) / step)

    columns = max(min(width - LABEL - 1, 3 * len(gains)), 1)
    shown = gains[-columns:]
    spacing = max(columns // len(shown), 1)
    cells = [[" "] * (spacing * len(shown)) for _ in range(height)]
    cells[row_of(0.0)] = ["-"] * (spacing * len(shown))
    for at, gain in enumerate(shown):
        for row in range(row_of(gain.high), row_of(gain.low) + 1):
            cells[row][at * spacing] = "|"
        cells[row_of(gain.value)][at * spacing] = "o"
    best, last = max(gains[1:], key=lambda gain: gain.value), gains[-1]
    head = f"gain     {last}; best {best.value:.1f} %, epoch {best.epoch}"
    labels = {0: f"{high:.1f} %", height - 1: f"{low:.1f} %", row_of(0.0): "0 %"}
    return [
        head,
        *(f"{labels.get(at, ''):>{LABEL - 1}} {''.join(row)}".rstrip() for at, row in enumerate(cells)),
    ]


def losses(run: RunDir, width: int) -> list[str]:
    """Draw the training loss, as a share of the base's, as a line of bars, and give its last value."""
    values = []
    for row in readable_rows(run.metrics):
        try:
            values.append(float(row["train/loss"]))
        except (KeyError, TypeError, ValueError):
            continue
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return []
    room = max(width - LABEL - 10, 8)
    size = math.ceil(len(values) / room)
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    low, span = min(means), (max(means) - min(means)) or 1.0
    bars = "".join(BARS[min(int((value - low) / span * len(BARS)), len(BARS) - 1)] for value in means)
    return [f"loss     {bars} {values[-1]:.4f}"]


def progress(run: RunDir, status: dict[str, Any], now: datetime) -> list[str]:
    """Say which step and epoch the last checkpoint has, and how long the rest takes at that pace."""
    step, epoch, total = status.get("step"), status.get("epoch"), planned_epochs(run)
    if step is None or epoch is None:
        return ["epoch    the first one is not over" if status.get("state") == "running" else "epoch    -"]
    text = f"epoch    {epoch}{f' of at most {total}' if total else ''}, step {step}"
    left = seconds_left(run, status, total, now)
    return [text if left is None else f"{text}, {in_words(left)} left at this pace"]


def planned_epochs(run: RunDir) -> int | None:
    """Read trainer.max_epochs from config.yaml, without the seconds that parsing all of it takes."""
    try:
        found = EPOCHS.search(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None


def seconds_left(run: RunDir, status: dict[str, Any], total: int | None, now: datetime) -> float | None:
    """Estimate the seconds to the last planned epoch from the steps since this start; None if not running."""
    starts, step, epoch = status.get("starts") or [], status["step"], status["epoch"]
    if run.status.state_of(status) != "running" or not total or not starts or not epoch:
        return None
    try:
        at, updated = (datetime.fromisoformat(text) for text in (starts[-1]["at"], status["updated"]))
        done = step - (starts[-1].get("step") or 0)
        pace = (updated - at).total_seconds() / done
        passed = (now - updated).total_seconds()
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return max(pace * (step / epoch * total - step) - passed, 0.0)


def in_words(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def newest_grid(run: RunDir) -> Path | None:
    """Return the newest image grid, relative to the current folder."""
    try:
        grids = sorted(run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    except OSError:
        return None
    return Path(os.path.relpath(grids[-1])) if grids else None


def wrapped(text: str, width: int, most: int | None = None) -> list[str]:
    """Break a text into lines of a width, at most so many, all but the first one indented."""
    indent = " " * LABEL
    return textwrap.wrap(text, width, subsequent_indent=indent, max_lines=most, placeholder=" …")


def cut(line: str, width: int) -> str:
    """Cut a line to a width."""
    return line if len(line) <= width else line[: width - 1] + "…"


def utc_now() -> datetime:
    """Return the time, in the zone of the times in status.json."""
    return datetime.now(UTC)
