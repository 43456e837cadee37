"""The rows of `ghibli list`: which runs, in which order, and what fits beside each other."""

import re
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
NAMES, SETTINGS = HEADS.index("run"), HEADS.index("settings")
SHORTEST_NAME, SHORTEST_SETTINGS = 16, 12  # columns; settings in fewer say nothing and are left out
GAP = 2  # columns between two cells
Origin = tuple[tuple[str | None, str | None], tuple[str | None, str | None]]  # (hash, name) of base, images
COMMA = re.compile(  # between the settings that name a trial's folder; the last may be cut, with a hash
    r",(?=[+~]*[\w.@/]+(?:=|-[0-9a-f]{12}$))"
)


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
        """What was trained, and of which version."""
        if self.run.status.path.exists() and not self.status:
            return "damaged"
        version, text = self.status.get("config_version", CONFIG_VERSION), self.status.get("settings", "?")
        if version != CONFIG_VERSION:
            text = f"{text} (made by {age_of(version)} version)"
        return str(text)

    @property
    def reason(self) -> str:
        """Why a run failed; empty for any other."""
        reason = self.status.get("reason") if self.state == "failed" else None
        return one_line(reason or "")

    @property
    def base_and_images(self) -> str:
        """From what and on what it was trained: `base demo (12ab34c), images film (56de78f)`."""
        parts = []
        for what, key in (("base", "base_hash"), ("images", "data_hash")):
            name, content = self.status.get(what), str(self.status.get(key) or "")[:7]
            if name or content:
                parts.append(" ".join(filter(None, (what, name or "", f"({content})" if content else ""))))
        return one_line(", ".join(parts) or "base and images unknown")

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
    rows = [row for row in rows if all(word in searched(row) for word in words)]
    keys = {
        "started": lambda row: (str(row.status.get("started", "")), str(row.run.path)),
        "gain": lambda row: (row.gain is not None, row.gain or 0.0),
        "name": lambda row: str(row.run.path),
        "state": lambda row: row.state,
    }
    rows = sorted(rows, key=keys[sort])
    return rows if last is None else rows[-last:] if last > 0 else []


def searched(row: ListedRun) -> str:
    """Return the text in which the words of `ghibli list WORD` are looked for."""
    return " ".join((*row.cells, row.reason, row.base_and_images))


def by_base(rows: list[ListedRun]) -> dict[str, list[ListedRun]]:
    """Group rows by base and images, within which gains compare; the group of the last row comes last.

    A row that says less than another, as that of a run which failed before its images were read, stands in
    the group of the last row that it may belong to.
    """
    groups: list[tuple[set[Origin], list[ListedRun]]] = []
    for row in reversed(rows):
        own = origin(row)
        group = next((group for group in groups if all(may_be_same(own, other) for other in group[0])), None)
        if group is None:
            groups.append(group := (set(), []))
        group[0].add(own)
        group[1].insert(0, row)
    return {max((row.base_and_images for row in own), key=len): own for _, own in reversed(groups)}


def origin(row: ListedRun) -> Origin:
    """Return hash and name of the base, and of the image set, as far as the status tells."""
    base, images = (
        (row.status.get(content), row.status.get(name))
        for content, name in (("base_hash", "base"), ("data_hash", "images"))
    )
    return base, images


def may_be_same(one: Origin, other: Origin) -> bool:
    """Return whether base and images agree as far as both are known: by hash, else by name."""
    agrees = False
    for ours, theirs in zip(one, other, strict=True):
        known = [pair for pair in zip(ours, theirs, strict=True) if None not in pair]
        if known and known[0][0] != known[0][1]:
            return False
        agrees = agrees or bool(known)
    return agrees or one == other


def short_names(rows: list[ListedRun]) -> list[str]:
    """Return the names of runs, those of a study's trials without the settings that all of them share."""
    studies: dict[Path, list[Path]] = {}
    for row in rows:
        studies.setdefault(row.run.path.parent, []).append(row.run.path)
    own = {path: name for trials in studies.values() for path, name in own_settings(trials).items()}
    names = (own[row.run.path] for row in rows)
    return [one_line(row.run.path.parent / name) for row, name in zip(rows, names, strict=True)]


def own_settings(trials: list[Path]) -> dict[Path, str]:
    """Name each trial of a study by the settings that not all of them share; by its folder's name if none."""
    settings = {trial: COMMA.split(trial.name) for trial in trials}
    shared = set.intersection(*map(set, settings.values())) if len(trials) > 1 else set()
    names = {}
    for trial, every in settings.items():
        own = [re.sub(r"^[\w.]+\.(?=\w+=)", "", part) for part in every if part not in shared]
        names[trial] = ",".join(own) if shared and own else trial.name
    return names


def widths(rows: list[tuple[str, ...]], total: int | None) -> list[int]:
    """Return the width of each column so that a row takes at most `total` columns; None: as wide as it is.

    Settings are shortened first, and left out where too little of them would be seen (width 0), then the
    names of runs; nothing else ever is.
    """
    own = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if total is None:
        return own
    surplus = sum(own) + GAP * (len(own) - 1) - total
    if surplus > own[SETTINGS] - SHORTEST_SETTINGS:
        surplus -= own[SETTINGS] + GAP
        own[SETTINGS] = 0
    elif surplus > 0:
        own[SETTINGS] -= surplus
        surplus = 0
    own[NAMES] -= min(max(surplus, 0), max(own[NAMES] - SHORTEST_NAME, 0))
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
    """Lay the rows out below a line of heads, in at most `total` columns, as far as the gains allow it.

    The reason of a failure stands below its row. With total=None names are whole.
    """
    names = [row.cells[NAMES] for row in rows] if total is None else short_names(rows)
    cells = [HEADS, *((name, *row.cells[1:]) for name, row in zip(names, rows, strict=True))]
    wide = widths(cells, total)
    laid_out = []
    for at, row in enumerate(cells):
        parts = []
        for place, (text, width) in enumerate(zip(row, wide, strict=True)):
            short = shortened_name(text, width) if place == NAMES else shortened_end(text, width)
            parts += [short.ljust(width)] if width else []
        laid_out.append((" " * GAP).join(parts).rstrip())
        if at > 0 and rows[at - 1].reason:
            reason = f"  failed: {rows[at - 1].reason}"
            laid_out.append(reason if total is None else shortened_end(reason, total))
    return laid_out


def shortened_end(text: str, width: int) -> str:
    """Cut the end of a text to a width."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"
