"""The figures of a report page: of one run, and of several in common charts."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ghibli.evaluation.gain import Gain
from ghibli.report.charts import COLOUR_COUNT, ChartAxes, Figure, Point, Series, bar_chart, line_chart
from ghibli.report.run_data import CsvRow, RunData, freedom_of, gain_of, price_of, timestep_gains

LabelledRuns = list[tuple[str, RunData]]  # (name on the page, run): best first, unfinished ones last
LOWEST_GAIN = -200.0  # percent; below that a curve shows only that the run diverged
LOSS, NORMALISED_LOSS = "train/loss", "train/loss_normalised"


def run_figures(data: RunData) -> list[Figure]:
    """Draw gain, distance, losses and gain by timestep of one run, as far as its files allow."""
    found = [
        gain_curve(data),
        price_curve(data),
        distance_curves([("distance", data)]),
        *loss_curves([("loss", data)]),
        timestep_chart(data),
    ]
    return [figure for figure in found if figure is not None]


def gain_curve(data: RunData) -> Figure | None:
    """Draw the held-out gain with its band, and that of training images, over epochs."""
    held_out = gain_points(data.probe)
    training = [(x, y, math.nan) for x, y, _ in gain_points(data.probe, "train")]
    series = [
        Series("held-out images, 95 % band", held_out, "c0", band=True, freedom=run_freedom(data)),
        Series("training images", training, "c1", dashed=True),
    ]
    caption = "How far the loss on fixed items is below the untouched base's; epoch 0 is before training."
    return gain_chart("Gain over the base", series, caption) if len(held_out) > 1 else None


def priced_rows(rows: list[CsvRow]) -> list[tuple[CsvRow, Gain]]:
    """Return the rows of probe.csv that have a price, with it.

    The start of a guided training is left out: its price is that of guidance, far above all others.
    """
    found = [(row, price) for row in rows if (price := price_of(row)) is not None]
    return [(row, price) for row, price in found if row["epoch"] > 0 or price.value == 0]


def price_curve(data: RunData) -> Figure | None:
    """Draw what a run has forgotten of what the base was made for, with its band, over epochs."""
    rows = priced_rows(data.probe)
    if len(rows) < 2:
        return None
    points = [(row["epoch"], 100 * price.value, 100 * price.standard_error) for row, price in rows]
    freedom = min(price.freedom for _, price in rows)
    caption = (
        "How far the loss on what the base was made for is above the untouched base's. The band is a 95 % "
        "interval."
    )
    series = [Series("price", points, "c1", band=True, freedom=freedom)]
    return line_chart("Price: what it forgot", series, ChartAxes("epoch", "price, %", zero=True), caption)


def price_curves(runs: LabelledRuns) -> Figure | None:
    """Draw the gain of all runs over their price, from epoch to epoch."""
    priced = [(label, data) for label, data in runs if len(priced_rows(data.probe)) > 1]

    def path(data: RunData) -> list[Point]:
        pairs = [(price, gain_of(row)) for row, price in priced_rows(data.probe)]
        return [(100 * price.value, 100 * gain.value, math.nan) for price, gain in pairs]

    caption = "Each run from epoch to epoch: up is learned, right is forgotten of what the base was made for."
    axes = ChartAxes("price, %", "gain, %", zero=True)
    return line_chart("Gain over price", run_series(priced, path), axes, caption)


def gain_chart(title: str, series: list[Series], caption: str) -> Figure | None:
    """Draw gains over epochs; the axis cuts a start far below the last points, and all below LOWEST_GAIN."""
    values = [y for one in series for _, y, _ in one.finite]
    last = min((one.finite[-1][1] for one in series if one.finite), default=0.0)
    floor = min(-max(10.0, 0.6 * max(values, default=0)), max(1.1 * last, LOWEST_GAIN))
    if min(values, default=0) < floor:
        caption += f" The axis is cut: the lowest point is at {min(values):.0f} %."
    return line_chart(title, series, ChartAxes("epoch", "gain, %", floor=floor, zero=True), caption)


def run_freedom(data: RunData) -> float:
    """Return the degrees of freedom of the errors of a run's held-out gains."""
    return min((freedom_of(row) for row in data.probe), default=math.inf)


def gain_points(rows: list[CsvRow], split: str = "val") -> list[Point]:
    """Return (epoch, gain, standard error) in percent of each row of probe.csv."""
    gains = [(row["epoch"], gain_of(row, split)) for row in rows]
    return [(epoch, 100 * gain.value, 100 * gain.standard_error) for epoch, gain in gains]


def gain_curves(runs: LabelledRuns) -> Figure | None:
    """Draw the held-out gain of all runs."""
    scored = [(label, data) for label, data in runs if len(data.probe) > 1]
    drawn = run_series(scored, lambda data: gain_points(data.probe), max_bands=3)
    series = [replace(one, freedom=run_freedom(data)) for one, (_, data) in zip(drawn, scored, strict=True)]
    caption = "Bands are 95 % intervals." if any(one.band for one in series) else ""
    return gain_chart("Gain over the base on held-out images", series, caption)


def run_series(
    runs: LabelledRuns, points_of: Callable[[RunData], list[Point]], max_bands: int = 0
) -> list[Series]:
    """Return a curve per run; if there are more runs than colours, only the best and the worst are coloured.

    Args:
        max_bands: the most curves that get a band each; more bands would hide the curves.
    """
    few = len(runs) <= COLOUR_COUNT
    series, worst = [], sum(data.state == "finished" for _, data in runs) - 1
    for place, (label, data) in enumerate(runs):
        colour = f"c{place}" if few else {0: "c0", worst: "c1"}.get(place, "faint")
        prefix = "" if few else {0: "best: ", worst: "worst: "}.get(place, "")
        has_errors = colour != "faint" and (not few or len(runs) <= max_bands)
        points = points_of(data) if has_errors else [(x, y, math.nan) for x, y, _ in points_of(data)]
        band = has_errors and max_bands > 0
        series.append(Series(prefix + label, points, colour, band=band, dashed=place % 2 == 1))
    return series


def loss_curves(runs: LabelledRuns) -> list[Figure | None]:
    """Draw the training loss, and the loss normalised by the base's, which is easier to read."""
    with_loss = [(label, data) for label, data in runs if data.metrics]
    with_both = [(label, data) for label, data in with_loss if NORMALISED_LOSS in data.metrics[0]]
    rows = with_both[0][1].metrics if with_both else []
    raw = run_series(with_loss, lambda data: metric_points(data, LOSS))
    normalised = run_series(with_both, lambda data: metric_points(data, NORMALISED_LOSS))
    hidden = (
        "It depends far more on which timesteps were drawn than on the weights: a small gain is lost in it."
    )
    falls = any(falls_visibly(data.metrics) for _, data in with_loss)
    raw_caption = " ".join(filter(None, ("" if falls else hidden, scatter_sentence(rows))))
    caption = "The same loss divided by the base's at the same timesteps; 1 is the untouched base."
    return [
        line_chart("Training loss", raw, ChartAxes("step", "loss"), raw_caption),
        line_chart("Normalised training loss", normalised, ChartAxes("step", "loss / base's"), caption),
    ]


def falls_visibly(rows: list[CsvRow]) -> bool:
    """Return whether the loss of the last quarter of the rows is a fifth or more below that of the first."""
    losses = [row[LOSS] for row in rows]
    part = max(len(losses) // 4, 1)
    first, last = (sum(quarter) / part for quarter in (losses[:part], losses[-part:]))
    return last <= 0.8 * first


def metric_points(data: RunData, column: str) -> list[Point]:
    """Return (step, value, NaN) of each row of metrics.csv."""
    return [(row["step"], row.get(column, math.nan), math.nan) for row in data.metrics]


def scatter_sentence(rows: list[CsvRow]) -> str:
    """Say how much neighbouring rows differ, for both losses."""
    if len(rows) < 8:
        return ""
    values = [np.array([row[column] for row in rows]) for column in (LOSS, NORMALISED_LOSS)]
    amounts = [100 * float(np.diff(one).std() / 2**0.5 / one.mean()) for one in values]
    if not all(map(math.isfinite, amounts)):
        return ""
    return f"From row to row it varies by {amounts[0]:.1f} %, the normalised loss by {amounts[1]:.1f} %."


def distance_curves(runs: LabelledRuns) -> Figure | None:
    """Draw the kernel distance of sampled images to real ones over epochs, where it was measured."""
    column = "evaluate/kernel_distance"
    series = run_series(
        [(label, data) for label, data in runs if data.distances],
        lambda data: [(row["epoch"], row[column], row[f"{column}_se"]) for row in data.distances],
        COLOUR_COUNT,
    )
    series = [Series(one.label, one.points, one.colour, dashed=one.dashed) for one in series]  # no bands
    caption = "Images sampled during training; epoch 0 is the untouched base. Whiskers are 95 % intervals."
    axes = ChartAxes("epoch", "image distance", zero=True)
    return line_chart("Distance to real images", series, axes, caption)


def timestep_chart(data: RunData, of: str = "") -> Figure | None:
    """Draw the held-out gain of the best epoch by timestep.

    Args:
        of: names the run in the title, where the page shows several.
    """
    if data.best is None:
        return None
    title = f"Gain by timestep{of}, epoch {data.best_epoch}"
    caption = (
        "Low timesteps are nearly clean images, high ones nearly pure noise. Whiskers are 95 % intervals."
    )
    return bar_chart(title, timestep_gains(data.best), "timesteps", caption)
