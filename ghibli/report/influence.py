"""The section on what each training image did to the gain, as `ghibli influence` measured it."""

from typing import Any

from ghibli.evaluation.influence import ODD, Influences, RankedImage
from ghibli.report.charts import ChartAxes, Series, line_chart
from ghibli.report.images import embed
from ghibli.report.run_data import RunData

SHOWN = 8  # images of each kind in the table, as on the sheet


def influence_section(data: RunData) -> dict[str, Any] | None:
    """Return the ranking's curve, the images at its ends and the sheet; None where it is unknown."""
    found = data.influence
    if found is None or not found.ranked:
        return None
    points = [
        (float(place), one.influence.value, one.influence.standard_error)
        for place, one in enumerate(found.ranked, start=1)
    ]
    series = Series("influence", points, band=True, freedom=found.ranked[0].influence.freedom)
    caption = "Each training image by its place in the ranking. The band holds the 95 % intervals."
    axes = ChartAxes("place", "influence", zero=True)
    alt = "the training images at the ends of both rankings with their captions, as in the table"
    sheet = embed(data.run.path / "influence.png", alt, data.problems, "The ends of both rankings")
    return {
        "sentences": sentences(found),
        "chart": line_chart("Influence of the images", [series], axes, caption),
        "groups": [
            (title, [row_of(found, one) for one in images]) for title, images in found.ends(SHOWN).items()
        ],
        "images": [sheet] if sheet else [],
    }  # fmt: skip


def row_of(found: Influences, one: RankedImage) -> dict[str, Any]:
    """Return what the table says of an image."""
    return {
        "name": one.name, "influence": one.text, "caption": one.caption,
        "agreement": f"{one.agreement:.1f}", "timesteps": found.timesteps(one.level),
    }  # fmt: skip


def sentences(found: Influences) -> list[str]:
    """Say what was measured, and how many images harm."""
    harmful, odd = sum(one.is_harmful for one in found.ranked), sum(one.is_odd for one in found.ranked)
    count = len(found.ranked)
    part = "" if found.is_whole else f" of {found.images}, as the measurement is unfinished"
    return [
        f"What each of {count} training images{part} did to the gain on {found.held_out} held-out images, to "
        f"first order, at {' and '.join(found.checkpoints)}: 1 is the mean size, below 0 it lowers the gain.",
        f"{harmful or 'None'} of them lower{'s' * (harmful == 1)} it beyond doubt (95 %).",
        "The gain is mostly made at little noise. So each image was also compared at every noise level: "
        "agreement is the modified z-score of its gradient's cosine with that of held-out images, where it "
        "is lowest. "
        f"{odd or 'None'} of them {'is' if odd == 1 else 'are'} below {ODD:g}, far from the others: look at "
        "these images and their captions. influence_exclude.txt lists those that agree least, for "
        "`data.exclude`.",
    ]
