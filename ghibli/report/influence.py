"""The section on what each training image did to the gain, as `ghibli influence` measured it."""

from typing import Any

from ghibli.evaluation.influence import Influences, RankedImage
from ghibli.report.charts import ChartAxes, Series, line_chart
from ghibli.report.images import embed
from ghibli.report.run_data import RunData

SHOWN = 8  # most helpful and most harmful images in the table, as on the sheet


def influence_section(data: RunData) -> dict[str, Any] | None:
    """Return the ranking's curve, the images at its ends and the sheet; None where it is unknown."""
    found = data.influence
    if found is None or not found.ranked:
        return None
    count = min(SHOWN, (len(found.ranked) + 1) // 2)
    ends = [*enumerate(found.ranked[:count], start=1)]
    ends += [*enumerate(found.ranked, start=1)][-count:]
    points = [
        (float(place), one.influence.value, one.influence.standard_error)
        for place, one in enumerate(found.ranked, start=1)
    ]
    series = Series("influence", points, band=True, freedom=found.ranked[0].influence.freedom)
    caption = "Each training image by its place in the ranking. The band holds the 95 % intervals."
    axes = ChartAxes("place", "influence", zero=True)
    alt = "the most helpful and the most harmful training images with their captions, as in the table"
    sheet = embed(data.run.path / "influence.png", alt, data.problems, "Most helpful and most harmful")
    return {
        "sentences": sentences(found),
        "chart": line_chart("Influence of the images", [series], axes, caption),
        "rows": [row_of(place, one) for place, one in dict(ends).items()], "images": [sheet] if sheet else [],
    }  # fmt: skip


def row_of(place: int, one: RankedImage) -> dict[str, Any]:
    """Return what the table says of an image."""
    return {"place": place, "name": one.name, "influence": one.text, "caption": one.caption}


def sentences(found: Influences) -> list[str]:
    """Say what was measured, and how many images harm."""
    harmful = sum(one.is_harmful for one in found.ranked)
    count = len(found.ranked)
    part = "" if found.is_whole else f" of {found.images}, as the measurement is unfinished"
    return [
        f"What each of {count} training images{part} did to the gain on {found.held_out} held-out images, to "
        f"first order, at {' and '.join(found.checkpoints)}: 1 is the mean size, below 0 it lowers the gain.",
        f"{harmful or 'None'} of them lower{'s' * (harmful == 1)} it beyond doubt (95 %). A low rank is a "
        "reason to look at an image and its caption; influence_exclude.txt lists the worst, for "
        "`data.exclude`.",
    ]
