"""What a study shows: the ranked table on the terminal and as CSV, a plot, the best and the worst grid."""

import csv
import io
from pathlib import Path
from textwrap import shorten

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from ghibli.runs.settings import as_yaml
from ghibli.runtime.console import full_width
from ghibli.runtime.files import write_atomically, write_text
from ghibli.sweeps.effects import effects
from ghibli.sweeps.trials import Trial, levels, varied

matplotlib.use("Agg")


def table(trials: list[Trial]) -> Table:
    """The ranked table for the terminal, as wide as it needs to be."""
    keys = varied(trials)
    rows = Table(box=None, pad_edge=False)
    measured = any(trial.distance for trial in trials)
    distance = ("kernel distance",) if measured else ()
    for name in ("", *keys, "gain over the base", *distance, "epoch", "min", "verdict"):
        rows.add_column(name, no_wrap=True)
    for place, trial in enumerate(trials, start=1):
        settings = [as_yaml(trial.settings.get(key)) for key in keys]
        gain = "-" if trial.gain is None else ("" if trial.gain.value >= 0 else "-") + trial.gain.size
        minutes = "-" if trial.minutes is None else f"{trial.minutes:.1f}"
        distance = [distance_of(trial)] if measured else []
        verdict = shorten(trial.verdict, 60, placeholder=" ...")
        epoch = str(trial.status.get("best_epoch", "-"))
        rows.add_row(str(place), *settings, gain, *distance, epoch, minutes, verdict)
    return full_width(rows)


def distance_of(trial: Trial) -> str:
    """`0.58 +- 0.22 (ddim 7.5)`."""
    if trial.distance is None:
        return "-"
    value, error, cell = trial.distance
    return f"{value:.2f} +- {error:.2f} ({cell})"


def write_grids(folder: Path, trials: list[Trial]) -> Path | None:
    """best_and_worst.png: the last grids of the first and the last trial of the ranking that drew one."""
    drawn = [trial for trial in trials if trial.gain is not None and trial.grid is not None]
    if len(drawn) < 2:
        return None
    images, font = [], ImageFont.load_default(16)
    for word, trial in (("best", drawn[0]), ("worst", drawn[-1])):
        grid = Image.open(trial.grid).convert("RGB")
        page = Image.new("RGB", (grid.width, grid.height + 28), "white")
        gain = f"{'' if trial.gain.value >= 0 else '-'}{trial.gain.size}"
        title = f"{word}: {gain}  {trial.run.path.name}"
        ImageDraw.Draw(page).text((8, 5), title, fill="black", font=font)
        page.paste(grid, (0, 28))
        images.append(page)
    size = max(page.width for page in images), sum(page.height for page in images)
    both = Image.new("RGB", size, "white")
    both.paste(images[0], (0, 0))
    both.paste(images[1], (0, images[0].height))
    file = folder / "best_and_worst.png"
    write_atomically(file, lambda opened: both.save(opened, format="png"))
    return file


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
        values = levels(key, scored)
        lines: dict[tuple, list[tuple[int, float]]] = {}
        for trial in scored:
            rest = tuple(str(trial.settings.get(other)) for other in keys if other != key)
            point = values.index(trial.settings.get(key)), 100 * trial.gain.value
            lines.setdefault(rest, []).append(point)
        for points in lines.values():
            axis.plot(*zip(*sorted(points), strict=True), color="#999999", lw=0.8, marker=".")
        means = [
            np.mean([y for points in lines.values() for x, y in points if x == level])
            for level in range(len(values))
        ]
        axis.plot(range(len(values)), means, color="#1f6fb4", lw=2, marker="o")
        axis.set_xticks(range(len(values)), [as_yaml(value) for value in values])
        axis.set(xlabel=key, xlim=(-0.3, len(values) - 0.7))
        axis.grid(alpha=0.2)
    axes[0, 0].set_ylabel("gain over the base (%)")
    file = folder / "study.png"
    write_atomically(file, lambda opened: figure.savefig(opened, format="png", dpi=120))
    plt.close(figure)
    return file


def as_csv(trials: list[Trial]) -> str:
    """The ranked table: place, folder, varied settings, gain, its error, best epoch, minutes, verdict."""
    keys = varied(trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    last = ("gain", "gain_se", "distance", "distance_se", "best_epoch", "minutes", "verdict")
    writer.writerow(["place", "trial", *keys, *last])
    for place, trial in enumerate(trials, start=1):
        gain = (trial.gain.value, trial.gain.standard_error) if trial.gain else ("", "")
        minutes = "" if trial.minutes is None else f"{trial.minutes:.1f}"
        epoch = trial.status.get("best_epoch", "")
        settings = [as_yaml(trial.settings.get(key)) for key in keys]
        distance = trial.distance[:2] if trial.distance else ("", "")
        name = trial.run.path.name
        writer.writerow([place, name, *settings, *gain, *distance, epoch, minutes, trial.verdict])
    return text.getvalue()


def effects_csv(trials: list[Trial]) -> str:
    """The effect of each setting in points of gain, with its error and its 95 % interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "low", "high", "pairs", "difference", "se", "low95", "high95"])
    for effect in effects(trials):
        gain = effect.difference
        points = [f"{100 * x:.4f}" for x in (gain.value, gain.standard_error, gain.low, gain.high)]
        writer.writerow([effect.key, as_yaml(effect.low), as_yaml(effect.high), effect.pairs, *points])
    return text.getvalue()


def write_table(folder: Path, trials: list[Trial]) -> Path:
    """study.csv in the study's folder, and effects.csv beside it."""
    file = folder / "study.csv"
    write_text(file, as_csv(trials))
    write_text(folder / "effects.csv", effects_csv(trials))
    return file
