"""The section on which layers carry the gain, as `ghibli slim` measured it."""

from typing import Any

from ghibli.adapters.files import format_number
from ghibli.evaluation.gain import Gain
from ghibli.evaluation.layer_map import LayerMap, Row
from ghibli.evaluation.slimming import LostGain
from ghibli.report.charts import bar_chart, common_scale, interval_chart, scale_labels
from ghibli.report.run_data import RunData
from ghibli.report.text import gain_percent

FEW_BARS = 6  # up to which their names fit below them
KEY = "block: te text encoder, d down, m mid, u up"
NAMES = {"text_encoder": "text", "mid_block": "mid", "time_embedding": "time"}
SHORT = {"text_encoder": "te", "mid_block": "m", "time_embedding": "t", "conv_in": "in", "conv_out": "out"}


def layer_section(data: RunData) -> dict[str, Any] | None:
    """Return the map of blocks and layers, and what the smaller adapter loses; None where it is unknown."""
    found = data.layer_map
    if found is None or not found.layers:
        return None
    few = len(found.blocks) <= FEW_BARS
    bars = {block_label(row.name, few): as_gain(row.lost) for row in found.blocks}
    low, high = common_scale([as_gain(row.lost) for row in found.layers], cut=False)
    title, x_label = "Gain lost without each block", "block" if few else KEY
    caption = "All layers of a block left out at once. Whiskers are 95 % intervals."
    chart = bar_chart(title, bars, x_label, caption, "lost of the gain, %")
    return {
        "sentences": sentences(found), "chart": chart, "scale": scale_labels(low, high),
        "has_kept": any(row.kept_rank is not None for row in found.layers),
        "rows": [layer_row(row, low, high) for row in found.layers],
    }  # fmt: skip


def layer_row(row: Row, low: float, high: float) -> dict[str, Any]:
    """Return what the table says of a layer."""
    return {
        "name": row.name, "rank": "-" if row.rank is None else row.rank,
        "kept": "-" if row.kept_rank is None else row.kept_rank or "left out", "lost": str(row.lost),
        "interval": interval_chart(as_gain(row.lost), low, high),
    }  # fmt: skip


def as_gain(lost: LostGain) -> Gain:
    """Return a lost gain as the charts take it."""
    return Gain(lost.value, lost.standard_error, freedom=lost.images - 1)


def block_label(block: str, few: bool) -> str:
    """Return a name for below a bar: `down 0`, `mid`, `text`; `d0`, `m`, `te` where there are many."""
    name = block.removeprefix("unet.")
    side, _, place = name.partition(".")
    if place:
        side = side.removesuffix("_blocks")
        return f"{side} {place}" if few else f"{side[0]}{place}"
    return (NAMES if few else NAMES | SHORT).get(name, name)


def sentences(found: LayerMap) -> list[str]:
    """Say what was measured, and what the smaller adapter loses."""
    measured = (
        "Each layer and each block was left out in turn: what is lost of the gain "
        f"({gain_percent(found.gain)}) on {found.images} held-out images. Layers work together, so these "
        "shares need not add up to 100 %."
    )
    if found.checked is None:
        return [measured]
    limit = format_number(round(100 * found.limit, 6))
    kept = [row for row in found.layers if row.kept_rank is not None and row.kept_rank > 0]
    loses = (
        f"{found.checked} of the gain on {found.checked.images} held-out images that did not choose it, with "
        f"95 % confidence less than {100 * found.checked.bound:.2f} %"
    )
    if not kept:
        return [
            measured,
            f"No smaller adapter was written for a limit of {limit} %: the one tried loses {loses}.",
        ]
    whole = sum(row.rank or 0 for row in found.layers)
    ranks = f", {sum(row.kept_rank or 0 for row in kept)} of {whole} ranks" if whole else ""
    size = f"{len(kept)} of {len(found.layers)} layers{ranks}"
    return [measured, f"The smallest adapter for a limit of {limit} % has {size}. It loses {loses}."]
