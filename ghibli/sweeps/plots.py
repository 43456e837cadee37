"""The images of a study: gain over each varied setting, and the best trial's grid above the worst's."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from ghibli.images.grid import Text, lay_out
from ghibli.images.read import open_file
from ghibli.runs.settings import as_yaml
from ghibli.runtime.files import write_atomically
from ghibli.sweeps.tradeoffs import front, priced
from ghibli.sweeps.trials import Trial, setting_values, varied

matplotlib.use("Agg")
GUIDANCE = "loss.guidance"
COLOURS = ("#1f77b4", "#d8731a", "#2ca02c", "#9467bd", "#8c564b")  # of its values, in order
GREY = "#999999"


def write_plot(folder: Path, trials: list[Trial]) -> Path | None:
    """Write study.png and return its path, None if no setting varies.

    A panel for each varied setting, a line for each set of trials equal in all else; where prices were
    measured, one more for the gain over them.
    """
    scored = [trial for trial in trials if trial.gain is not None]
    keys = varied(scored)
    if not keys:
        return None
    panels = len(keys) + (len(priced(scored)) > 1)
    figure, axes = plt.subplots(
        1, panels, figsize=(1.2 + 2.4 * panels, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, key in zip(axes[0], keys, strict=False):
        plot_setting(axis, key, keys, scored)
    if panels > len(keys):
        plot_price(axes[0, -1], scored)
    axes[0, 0].set_ylabel("gain over the base (%)")
    entries, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(entries, names, loc="outside upper right", ncols=len(names), frameon=False)
    file = folder / "study.png"
    write_atomically(file, lambda opened: figure.savefig(opened, format="png", dpi=120))
    plt.close(figure)
    return file


def plot_setting(axis: plt.Axes, key: str, keys: list[str], trials: list[Trial]) -> None:
    """Plot the gain over one setting: thin lines through trials equal in all other keys, the mean thick.

    The lines have the colour of their training guidance where that varies, as the gain of a guided training
    starts far below the base's; in the panel of the guidance itself, each point has.
    """
    values, guidances = setting_values(key, trials), setting_values(GUIDANCE, trials)
    colours = dict(zip(map(as_yaml, guidances), COLOURS, strict=False)) if GUIDANCE in keys else {}
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for trial in trials:
        own = colours.get(as_yaml(trial.settings.get(GUIDANCE)), GREY)
        point = values.index(trial.settings.get(key)), 100 * trial.scores.val_gain.value
        rest = tuple(str(trial.settings.get(other)) for other in keys if other != key)
        lines.setdefault((GREY if key == GUIDANCE else own, *rest), []).append(point)
        axis.plot(*point, color=own, marker=".")
    for (colour, *_), points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), color=colour, lw=0.8, zorder=0)
    means = [
        np.mean([y for points in lines.values() for x, y in points if x == index])
        for index in range(len(values))
    ]
    for guidance, colour in colours.items():
        axis.plot([], [], color=colour, lw=0.8, marker=".", label=f"training guidance {guidance}")
    axis.plot(range(len(values)), means, color="black", lw=2, marker="o", label="mean")
    axis.set_xticks(range(len(values)), [as_yaml(value) for value in values])
    axis.set(xlabel=key, xlim=(-0.3, len(values) - 0.7))
    axis.grid(alpha=0.2)


def plot_price(axis: plt.Axes, trials: list[Trial]) -> None:
    """Plot the gain over the price with 95 % intervals, and the front of best trade-offs as a line."""
    for _, gain, price in priced(trials):
        axis.errorbar(
            100 * price.value, 100 * gain.value, xerr=100 * price.reach, yerr=100 * gain.reach,
            color="#999999", lw=0.8, marker=".",
        )  # fmt: skip
    best = [(100 * price.value, 100 * gain.value) for _, gain, price in front(trials)]
    axis.plot(*zip(*best, strict=True), color="#1f6fb4", lw=2, marker="o", label="best trade-offs")
    axis.set(xlabel="price: forgot (%)")
    axis.legend(frameon=False, fontsize="small", loc="lower right")
    axis.grid(alpha=0.2)


def write_grids(folder: Path, trials: list[Trial]) -> Path | None:
    """Write best_and_worst.png and return its path, None if fewer than two trials have a grid.

    The newest grids of the first and the last ranked trial that have one.
    """
    scored = [trial for trial in trials if trial.gain is not None]
    drawn = [(trial, grid) for trial in scored if (grid := trial.grid) is not None]
    if len(drawn) < 2:
        return None
    best_and_worst = {"best": drawn[0], "worst": drawn[-1]}
    grids = [open_file(file).convert("RGB") for _, file in best_and_worst.values()]
    line = 28  # px, of the title above each grid
    tops = [line, line + grids[0].height + line]
    texts = [
        Text(8, top - line + 5, f"{rank}: {trial.scores.val_gain.signed_size}  {trial.run.path.name}", 16)
        for (rank, (trial, _)), top in zip(best_and_worst.items(), tops, strict=True)
    ]
    size = max(grid.width for grid in grids), tops[1] + grids[1].height
    sheet = lay_out(size, [[grid] for grid in grids], [0], tops, texts)
    file = folder / "best_and_worst.png"
    write_atomically(file, lambda opened: sheet.save(opened, format="png"))
    return file
