"""Which figures a page has: of one run, and of several in one drawing."""

import math

import numpy as np

from ghibli.report.charts import COLOURS, Figure, Series, bars, curves
from ghibli.report.run_data import Row, RunData, by_timestep, gain_of

Labelled = list[tuple[str, RunData]]  # the best first, those that are not finished last
LOWEST = -200.0  # percent; below that a curve says no more than that it diverged
LOSS, NORMALISED = "train/loss", "train/loss_normalised"


def of_one(part: RunData) -> list[Figure]:
    """Gain, distance, loss and gain by timestep of one run; what its files do not tell is left out."""
    found = [
        gain_curve(part),
        distance_curve([("distance", part)]),
        *loss_curves([("loss", part)]),
        steps(part),
    ]
    return [figure for figure in found if figure is not None]


def gain_curve(part: RunData) -> Figure | None:
    """Held-out gain with its band, and that of training images, epoch by epoch."""
    held_out = gain_points(part.probe)
    training = [(x, y, math.nan) for x, y, _ in gain_points(part.probe, "train")]
    series = [
        Series("held-out images, 95 % band", held_out, "c0", band=True),
        Series("training images", training, "c1", dashed=True),
    ]
    caption = (
        "How much lower the loss on fixed items is than the untouched base's; epoch 0 is before training."
    )
    return gain_figure("Gain over the base", series, caption) if len(held_out) > 1 else None


def gain_figure(title: str, series: list[Series], caption: str) -> Figure | None:
    """Gain over epochs; a start far below where any curve ends is cut, and so is what lies below LOWEST."""
    values = [y for one in series for _, y, _ in one.finite]
    last = min((one.finite[-1][1] for one in series if one.finite), default=0.0)
    floor = min(-max(10.0, 0.6 * max(values, default=0)), max(1.1 * last, LOWEST))
    if min(values, default=0) < floor:
        caption += f" The axis is cut: the lowest point is at {min(values):.0f} %."
    return curves(title, series, "epoch", "gain, %", caption=caption, floor=floor, zero=True)


def gain_points(rows: list[Row], part: str = "val") -> list[tuple[float, float, float]]:
    """(epoch, gain, standard error) in percent."""
    gains = [(row["epoch"], gain_of(row, part)) for row in rows]
    return [(epoch, 100 * gain.value, 100 * gain.standard_error) for epoch, gain in gains]


def gains_of_all(runs: Labelled) -> Figure | None:
    """The held-out gain of all runs."""
    scored = [(label, part) for label, part in runs if len(part.probe) > 1]
    series = chosen(scored, lambda part: gain_points(part.probe), bands=3)
    caption = "Bands are 95 % intervals." if any(one.band for one in series) else ""
    return gain_figure("Gain over the base on held-out images", series, caption)


def chosen(runs: Labelled, points: object, bands: int = 0) -> list[Series]:
    """A curve for each run; of more than there are colours, the best and the worst stand out.

    Args:
        points: from a run to its points (x, y, error).
        bands: the most coloured curves that still get a band; with more it would hide them.
    """
    few = len(runs) <= COLOURS
    series, worst = [], sum(part.state == "finished" for _, part in runs) - 1
    for place, (label, part) in enumerate(runs):
        colour = f"c{place}" if few else {0: "c0", worst: "c1"}.get(place, "faint")
        word = "" if few else {0: "best: ", worst: "worst: "}.get(place, "")
        stands_out = colour != "faint" and (not few or len(runs) <= bands)
        own = points(part) if stands_out else [(x, y, math.nan) for x, y, _ in points(part)]
        series.append(Series(word + label, own, colour, band=stands_out and bands > 0, dashed=place % 2 == 1))
    return series


def loss_curves(runs: Labelled) -> list[Figure | None]:
    """The training loss, and beside it the one that can be read."""
    with_loss = [(label, part) for label, part in runs if part.metrics]
    with_both = [(label, part) for label, part in with_loss if NORMALISED in part.metrics[0]]
    rows = with_both[0][1].metrics if with_both else []
    plain = chosen(with_loss, lambda part: points_of(part, LOSS))
    readable = chosen(with_both, lambda part: points_of(part, NORMALISED))
    why = "The same loss over what the base scores at the same timesteps; 1 is the untouched base."
    flat = "It depends far more on which timesteps were drawn than on the weights: a small gain drowns in it."
    return [
        curves("Training loss as it is", plain, "step", "loss", caption=f"{flat} {scatter(rows)}".strip()),
        curves("Training loss, readable", readable, "step", "loss / base's", caption=why),
    ]


def points_of(part: RunData, column: str) -> list[tuple[float, float, float]]:
    return [(row["step"], row.get(column, math.nan), math.nan) for row in part.metrics]


def scatter(rows: list[Row]) -> str:
    """How much rows differ from their neighbours, of the loss as it is and of the readable one."""
    if len(rows) < 8:
        return ""
    values = [np.array([row[column] for row in rows]) for column in (LOSS, NORMALISED)]
    amounts = [100 * float(np.diff(one).std() / 2**0.5 / one.mean()) for one in values]
    if not all(map(math.isfinite, amounts)):
        return ""
    return f"From row to row it scatters by {amounts[0]:.1f} %, the readable one by {amounts[1]:.1f} %."


def distance_curve(runs: Labelled) -> Figure | None:
    """The kernel distance of sampled images to real ones over the epochs, where it was measured."""
    column = "evaluate/kernel_distance"
    measured = [(label, part) for label, part in runs if part.distances]
    series = chosen(
        measured,
        lambda part: [(row["epoch"], row[column], row[f"{column}_se"]) for row in part.distances],
        COLOURS,
    )
    whiskers = [Series(one.label, one.points, one.colour, dashed=one.dashed) for one in series]
    caption = "Images drawn during training; epoch 0 is the untouched base. Whiskers are 95 % intervals."
    return curves("Distance to real images", whiskers, "epoch", "kernel distance", caption=caption, zero=True)


def steps(part: RunData, of: str = "") -> Figure | None:
    """The held-out gain of the best epoch by timestep.

    Args:
        of: whose, where the page shows several runs.
    """
    if part.best is None:
        return None
    title = f"Gain by timestep{of}, epoch {part.best_epoch}"
    caption = (
        "Low timesteps are nearly clean images, high ones nearly pure noise. Whiskers are 95 % intervals."
    )
    return bars(title, by_timestep(part.best), "timesteps", caption)
