"""A study's trials as a ranked table, and which settings matter: from the folders alone."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from rich.table import Table

from ghibli.run_dir import RunDir, is_whole, write_atomically, write_text
from ghibli.trial import flat, shown, that_count
from ghibli.validation import Gain, Probe, best_epoch, paired_gain

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    run: RunDir
    settings: dict[str, Any]  # dotted key -> value, all that can change a result
    status: dict[str, Any]
    best: Probe | None  # scores of the best epoch; None when there is none yet

    @property
    def gain(self) -> Gain | None:
        """How much better than the base its best epoch is."""
        return None if self.best is None else self.best.val_gain

    @property
    def verdict(self) -> str:
        """What became of it: the doctor's findings, or why it is not finished."""
        if self.run.state != "finished":
            reason = self.status.get("reason")
            return f"{self.run.state}: {reason}" if reason else self.run.state
        return ", ".join(finding["name"] for finding in self.status.get("findings", []))

    @property
    def minutes(self) -> float | None:
        """From start to end; of a resumed trial from its first start."""
        times = self.status.get("started"), self.status.get("ended")
        if None in times:
            return None
        started, ended = map(datetime.fromisoformat, times)
        return (ended - started).total_seconds() / 60


def read_trials(folder: Path) -> list[Trial]:
    """Every trial below a study's folder, the best first, those without a gain last."""
    trials = [read_trial(RunDir(path.parent)) for path in sorted(folder.glob("*/status.json"))]
    found = [trial for trial in trials if trial is not None]
    return sorted(found, key=lambda trial: -(trial.gain.value if trial.gain else -float("inf")))


def read_trial(run: RunDir) -> Trial | None:
    """One trial; None where config.yaml cannot be read."""
    try:
        content = yaml.safe_load(run.config.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return None
    return Trial(run, that_count(flat(content)), run.read_status(), best_probe(run))


def best_probe(run: RunDir) -> Probe | None:
    """The scores of the best epoch, from best.ckpt; None without a whole one."""
    if not is_whole(run.best_checkpoint):
        return None
    stored = torch.load(run.best_checkpoint, weights_only=True, map_location="cpu")["probe"]
    history = [Probe(**probe) for probe in stored]
    return history[best_epoch(history)] if len(history) > 1 else None


def varied(trials: list[Trial]) -> list[str]:
    """The settings that are not the same in all trials, but for those that follow another one."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    several = [key for key in keys if len({str(trial.settings.get(key)) for trial in trials}) > 1]
    followers = {"lora.alpha": "lora.rank"}
    return [key for key in several if followers.get(key) not in several]


@dataclass(frozen=True)
class Effect:
    """What one setting changes: the mean over pairs of trials that differ in nothing else."""

    key: str
    low: Any
    high: Any
    pairs: int
    difference: Gain  # gain at `high` minus gain at `low`

    @property
    def matters(self) -> bool:
        """The 95 % interval does not hold 0."""
        return self.difference.low > 0 or self.difference.high < 0

    def __str__(self) -> str:
        value, error = 100 * self.difference.value, 100 * self.difference.standard_error
        word = "" if self.matters else ", which is nothing"
        levels = f"{self.key} {shown(self.low)} -> {shown(self.high)}"
        return f"{levels}: {value:+.2f} +- {error:.2f} points of gain ({self.pairs} pairs){word}"


def effects(trials: list[Trial]) -> list[Effect]:
    """The effect of every varied setting, between neighbouring values, largest first.

    The error is that of the choice of held-out pictures (jackknife); what another seed would change
    is not in it.
    """
    scored = [trial for trial in trials if trial.best is not None]
    found = [effect for key in varied(scored) for effect in effects_of(key, scored)]
    return sorted(found, key=lambda effect: -abs(effect.difference.value))


def effects_of(key: str, trials: list[Trial]) -> Iterator[Effect]:
    """Effects of one setting's neighbouring values, where there are pairs."""
    values = sorted({trial.settings.get(key) for trial in trials}, key=order)
    others = [name for name in varied(trials) if name != key]
    for low, high in zip(values, values[1:], strict=False):
        pairs = [
            (a, b)
            for a in trials
            for b in trials
            if a.settings.get(key) == low
            and b.settings.get(key) == high
            and all(a.settings.get(name) == b.settings.get(name) for name in others)
            and torch.equal(a.best.base_val, b.best.base_val)
        ]
        if pairs:
            yield Effect(key, low, high, len(pairs), gain_difference(pairs))


def gain_difference(pairs: list[tuple[Trial, Trial]]) -> Gain:
    """Mean of the second's gain minus the first's, with its jackknife error over pictures.

    All share the base's scores, so the mean difference is the gain of base + mean(second - first).
    """
    base = pairs[0][0].best.base_val.double()
    change = torch.stack([b.best.val.double() - a.best.val.double() for a, b in pairs]).mean(0)
    return paired_gain(base + change, base)


def ranking(trials: list[Trial]) -> Table:
    """The ranked table for the terminal."""
    keys = varied(trials)
    table = Table(box=None, pad_edge=False)
    for name in ("", *keys, "gain over the base", "epoch", "min", "verdict"):
        table.add_column(name, no_wrap=name != "verdict")
    for place, trial in enumerate(trials, start=1):
        settings = [shown(trial.settings.get(key)) for key in keys]
        gain = "-" if trial.gain is None else ("" if trial.gain.value >= 0 else "-") + trial.gain.size
        minutes = "-" if trial.minutes is None else f"{trial.minutes:.1f}"
        table.add_row(
            str(place), *settings, gain, str(trial.status.get("best_epoch", "-")), minutes,
            trial.verdict.partition(":")[0],
        )  # fmt: skip
    return table


def write_plot(folder: Path, trials: list[Trial]) -> Path | None:
    """study.png: a panel for each varied setting, a line for each set of trials equal in all else."""
    scored = [trial for trial in trials if trial.gain is not None]
    keys = varied(scored)
    if not keys:
        return None
    figure, axes = plt.subplots(
        1, len(keys), figsize=(1.2 + 2.4 * len(keys), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, key in zip(axes[0], keys, strict=True):
        levels = sorted({trial.settings.get(key) for trial in scored}, key=order)
        lines: dict[tuple, list[tuple[int, float]]] = {}
        for trial in scored:
            rest = tuple(str(trial.settings.get(other)) for other in keys if other != key)
            point = levels.index(trial.settings.get(key)), 100 * trial.gain.value
            lines.setdefault(rest, []).append(point)
        for points in lines.values():
            axis.plot(*zip(*sorted(points), strict=True), color="#999999", lw=0.8, marker=".")
        means = [
            np.mean([y for points in lines.values() for x, y in points if x == level])
            for level in range(len(levels))
        ]
        axis.plot(range(len(levels)), means, color="#1f6fb4", lw=2, marker="o")
        axis.set_xticks(range(len(levels)), [shown(level) for level in levels])
        axis.set(xlabel=key, xlim=(-0.3, len(levels) - 0.7))
        axis.grid(alpha=0.2)
    axes[0, 0].set_ylabel("gain over the base (%)")
    file = folder / "study.png"
    write_atomically(file, lambda opened: figure.savefig(opened, format="png", dpi=120))
    plt.close(figure)
    return file


def order(value: Any) -> tuple[bool, Any]:
    """Sorts numbers by size and puts words behind them."""
    is_word = not isinstance(value, int | float)
    return is_word, str(value) if is_word else value


def as_csv(trials: list[Trial]) -> str:
    """The ranked table: place, folder, varied settings, gain, its error, best epoch, minutes, verdict."""
    keys = varied(trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", "trial", *keys, "gain", "gain_se", "best_epoch", "minutes", "verdict"])
    for place, trial in enumerate(trials, start=1):
        gain = (trial.gain.value, trial.gain.standard_error) if trial.gain else ("", "")
        minutes = "" if trial.minutes is None else f"{trial.minutes:.1f}"
        epoch = trial.status.get("best_epoch", "")
        settings = [shown(trial.settings.get(key)) for key in keys]
        writer.writerow([place, trial.run.path.name, *settings, *gain, epoch, minutes, trial.verdict])
    return text.getvalue()


def write_table(folder: Path, trials: list[Trial]) -> Path:
    """study.csv in the study's folder."""
    file = folder / "study.csv"
    write_text(file, as_csv(trials))
    return file
