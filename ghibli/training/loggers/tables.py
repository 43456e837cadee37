"""The tables that every dashboard shows: the gain by epoch and by timestep, and an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from ghibli.evaluation.gain import Gain
from ghibli.training.loggers.dashboard import Table

NOT_MEASURED = (None, None)  # value and error, in evaluations of before or without a CLIP
BAND = ("", "_low", "_high")  # a value and the ends of its 95 % interval, as columns of probe.csv


def gain_curve(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the gain of all epochs so far with its 95 % band, from rows of probe.csv."""
    return Table(
        "probe/gain_curve", "held-out gain over the base", ("epoch", "gain", "95 % low", "95 % high"),
        [[int(row["epoch"]), *band(row, "probe/val_gain")] for row in rows],
        chart="lines",
    )  # fmt: skip


def gain_and_price(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return what was learned and forgotten, in 95 % bands, in every epoch that has a price."""
    priced = [row for row in rows if row.get("probe/price", "") != ""]
    if not priced:
        return []
    names = [f"{name}{end}" for name in ("gain", "price") for end in ("", ", 95 % low", ", 95 % high")]
    return [Table(
        "probe/gain_and_price", "learned and forgotten", ("epoch", *names),
        [[int(row["epoch"]), *band(row, "probe/val_gain"), *band(row, "probe/price")] for row in priced],
        chart="lines",
    )]  # fmt: skip


def band(row: Mapping[str, Any], name: str) -> list[float]:
    """Return a value of probe.csv and the ends of its 95 % interval."""
    return [float(row[f"{name}{end}"]) for end in BAND]


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
