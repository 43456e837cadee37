"""The tables that every dashboard shows: the gain by epoch and by timestep, and an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from ghibli.evaluation.gain import Gain
from ghibli.training.loggers.dashboard import Table

NOT_MEASURED = (None, None)  # value and error, in evaluations of before or without a CLIP


def gain_curve(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the gain of all epochs so far with its 95 % band, from rows of probe.csv."""
    ends = ("", "_low", "_high")
    return Table(
        "probe/gain_curve", "held-out gain over the base", ("epoch", "gain", "95 % low", "95 % high"),
        [[int(row["epoch"]), *(float(row[f"probe/val_gain{end}"]) for end in ends)] for row in rows],
        chart="lines",
    )  # fmt: skip


def gain_and_price(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return what was learned and what was forgotten in every epoch with a price; nothing without one."""
    priced = [row for row in rows if row.get("probe/price", "") != ""]
    if not priced:
        return []
    return [Table(
        "probe/gain_and_price", "learned and forgotten", ("epoch", "gain", "price"),
        [[int(row["epoch"]), float(row["probe/val_gain"]), float(row["probe/price"])] for row in priced],
        chart="lines",
    )]  # fmt: skip


def gain_by_timestep(gains: Mapping[str, Gain]) -> Table:
    """Return the gain at each part of the timesteps, with its standard error."""
    return Table(
        "probe/gain_by_timestep", "held-out gain by timestep", ("timesteps", "gain", "standard error"),
        [[part, gain.value, gain.standard_error] for part, gain in gains.items()],
        chart="bar",
    )  # fmt: skip


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the content of evaluation.json: the cells, and the guidance scan."""
    cells = [
        [
            model, row["sampler"], row["guidance"], *row["kernel"], *(row.get("layout") or NOT_MEASURED),
            row["frechet"], *(row.get("caption_fit") or NOT_MEASURED), row["precision"], row["recall"],
        ]
        for model, found in result["models"].items()
        for row in found
    ]  # fmt: skip
    scan = [
        [model, float(scale), *kernel]
        for model, kernels in result["scan"].items()
        for scale, kernel in kernels.items()
    ]
    distance = ("image distance", "error of the distance")
    names = (
        *distance, "layout distance", "error of the layout", "frechet", "caption fit", "error of the fit",
        "precision", "recall",
    )  # fmt: skip
    return [
        Table(
            "evaluate/cells", "images by sampler and guidance",
            ("model", "sampler", "guidance", *names), cells,
        ),
        Table("evaluate/scan", "guidance scan", ("model", "guidance", *distance), scan),
    ]  # fmt: skip
