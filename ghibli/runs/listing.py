"""The rows of `ghibli list`: which runs, in which order, and what fits beside each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghibli.config.schema import CONFIG_VERSION, age_of
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError, did_you_mean
from ghibli.runtime.terminal import one_line

SORTS = ("started", "gain", "name", "state")
HEADS = ("run", "started", "state", "settings", "epoch", "gain")
SHORTEST = {"settings": 8, "run": 16}  # what is shortened when a row is too wide, in this order, and how far
GAP = 2  # columns between two cells


@dataclass(frozen=True)
class ListedRun:
    """One run with its status.json, which is read once."""

    run: RunDir
    status: dict[str, Any]
    state: str

    @property
    def gain(self) -> float | None:
        """The gain over its base, a share; None before the first epoch."""
        return self.status.get("gain")

    @property
    def cells(self) -> tuple[str, ...]:
        """The text of each column of HEADS."""
        started = str(self.status.get("started") or "-")[5:16].replace("T", " ")
        epochs = str(self.status.get("epoch", "-"))
        cells = (self.run.path, started, self.state, self.settings, epochs, self.gain_text)
        return tuple(map(one_line, cells))

    @property
    def settings(self) -> str:
        """What was trained, of which version, and why a run that failed did."""
        if self.run.status.path.exists() and not self.status:
            return "damaged"
        version, text = self.status.get("config_version", CONFIG_VERSION), self.status.get("settings", "?")
        if version != CONFIG_VERSION:
            text = f"{text} (made by {age_of(version)} version)"
        reason = self.status.get("reason") if self.state == "failed" else None
        return f"{text}: {reason}" if reason else str(text)

    @property
    def gain_text(self) -> str:
        """The gain with its standard error, in percent."""
        error = self.status.get("gain_se")
        if self.gain is None or error is None:
            return "-"
        return f"{100 * self.gain:.1f} % +- {100 * error:.1f} %"


def listed(runs: Iterable[RunDir]) -> list[ListedRun]:
    """Read the status of each run, once."""
    found = []
    for run in runs:
        status = run.status.read()
        found.append(ListedRun(run, status, run.status.state_of(status)))
    return found


def chosen(rows: list[ListedRun], words: Iterable[str], sort: str, last: int | None) -> list[ListedRun]:
    """Keep the rows in which every word occurs, sort them, and keep the last so many.

    Args:
        sort: one of SORTS; by gain, the best run comes last, just above the prompt.

    Raises:
        UserError: an unknown order.
    """
    if sort not in SORTS:
        hint = did_you_mean(sort, SORTS)
        raise UserError(f"--sort {sort} is unknown: choose one of {', '.join(SORTS)}{hint}")
    rows = [row for row in rows if all(word in " ".join(row.cells) for word in words)]
    keys = {
        "started": lambda row: (str(row.status.get("started", "")), str(row.run.path)),
        "gain": lambda row: (row.gain is not None, row.gain or 0.0),
        "name": lambda row: str(row.run.path),
        "state": lambda row: row.state,
    }
    rows = sorted(rows, key=keys[sort])
    return rows if last is None else rows[-last:] if last > 0 else []


def by_base(rows: list[ListedRun]) -> dict[str, list[ListedRun]]:
    """Group rows by the base they started from, in the order of their first run: gains compare within one.

    Rows without a gain, which compare with nothing, stand in the first group.
    """
    bases = [str(row.status.get("base_hash") or "") for row in rows if row.gain is not None]
    groups: dict[str, list[ListedRun]] = {base: [] for base in bases or [""]}
    first = next(iter(groups))
    for row in rows:
        groups[first if row.gain is None else str(row.status.get("base_hash") or "")].append(row)
    return groups


def widths(rows: list[tuple[str, ...]], total: int | None) -> list[int]:
    """Return the width of each column so that a row takes at most `total` columns; None: as wide as it is.

    Settings are shortened first, then the names of runs; nothing else ever is.
    """
    own = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if total is None:
        return own
    surplus = sum(own) + GAP * (len(own) - 1) - total
    for name, shortest in SHORTEST.items():
        at = HEADS.index(name)
        less = min(max(surplus, 0), max(own[at] - shortest, 0))
        own[at] -= less
        surplus -= less
    return own


def shortened_name(name: str, width: int) -> str:
    """Cut a path to a width: its first folders go first, then the middle of its last part."""
    if len(name) <= width:
        return name
    last = Path(name).name
    if len(last) + 2 <= width:
        ends = (name[at:] for at, letter in enumerate(name) if letter == "/")
        return "…" + next(end for end in ends if len(end) < width)
    front = (width - 1) // 2
    return f"{last[:front]}…{last[len(last) - (width - 1 - front) :]}"


def lines(rows: list[ListedRun], total: int | None) -> list[str]:
    """Lay the rows out below a line of heads, in at most `total` columns, as far as the gains allow it."""
    cells = [HEADS, *(row.cells for row in rows)]
    wide = widths(cells, total)
    laid_out = []
    for row in cells:
        parts = []
        for head, text, width in zip(HEADS, row, wide, strict=True):
            short = shortened_name(text, width) if head == "run" else shortened_end(text, width)
            parts.append(short.ljust(width))
        laid_out.append((" " * GAP).join(parts).rstrip())
    return laid_out


def shortened_end(text: str, width: int) -> str:
    """Cut the end of a text to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"
