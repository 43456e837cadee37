"""Which layers of an adapter carry its gain: the content of a run's slim.json and slim.csv."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ghibli.adapters.layers import Layer
from ghibli.evaluation.gain import Gain
from ghibli.evaluation.slimming import LostGain
from ghibli.runs.folder import RunDir
from ghibli.runs.status import LARGEST
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_plain, write_json, write_rows

MADE_BY = "ghibli slim"
COLUMNS = (
    "level", "name", "block", "kind", "layers", "rank", "kept_rank", "parameters", "lost", "lost_se",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A layer of the adapter, or a block of layers, and the gain that is lost without it."""

    name: str
    block: str
    kind: str  # of a layer: LoRA, DoRA, ...; empty for a block of several
    layers: int
    rank: int | None
    parameters: int
    lost: LostGain
    kept_rank: int | None = None  # in the adapter that was written, 1 for a kind without; 0 = left out


@dataclass(frozen=True)
class LayerMap:
    """What each layer and block carries of a run's gain."""

    weights: str | None  # checksum of best.ckpt
    limit: float  # that was asked for
    gain: Gain  # of the whole adapter, on the same images
    images: int
    items: int  # of each image
    blocks: list[Row]
    layers: list[Row]
    chosen: LostGain | None = None  # of the smallest adapter, on the images that chose it
    checked: LostGain | None = None  # on the others

    def after(self, chosen: LostGain, checked: LostGain, kept: dict[str, Layer] | None) -> "LayerMap":
        """Return the map with the adapter that was chosen.

        Args:
            kept: its layers; None if it was not written.
        """
        layers = self.layers
        if kept is not None:
            ranks = {name: layer.rank or 1 for name, layer in kept.items()}
            layers = [replace(row, kept_rank=ranks.get(row.name, 0)) for row in layers]
        return replace(self, chosen=chosen, checked=checked, layers=layers)


def block_of(name: str) -> str:
    """Return the block that a layer is in: unet.down_blocks.0, unet.mid_block, text_encoder, ..."""
    part, *path = name.split(".")
    if part == "text_encoder":
        return part
    return ".".join([part, *path[: 2 if path[0] in ("down_blocks", "up_blocks") else 1]])


def blocks_of(layers: Iterable[str]) -> dict[str, list[str]]:
    """Group layers by their block, in their order."""
    blocks: dict[str, list[str]] = {}
    for name in layers:
        blocks.setdefault(block_of(name), []).append(name)
    return blocks


def table_of(run: RunDir) -> Path:
    """Return the file with the rows of the map as a table."""
    return run.layer_map.with_suffix(".csv")


def write_map(run: RunDir, found: LayerMap) -> None:
    """Write slim.json and slim.csv into the run's folder."""
    content = {
        "made_by": MADE_BY, "weights": found.weights, "limit": found.limit, "images": found.images,
        "items": found.items, "gain": [found.gain.value, found.gain.standard_error],
        "blocks": [as_content(row) for row in found.blocks],
        "layers": [as_content(row) for row in found.layers],
        "chosen": found.chosen and lost_as_content(found.chosen),
        "checked": found.checked and lost_as_content(found.checked),
    }  # fmt: skip
    rows = [
        {"level": level} | as_content(row) | {"lost": row.lost.value, "lost_se": row.lost.standard_error}
        for level, rows in (("block", found.blocks), ("layer", found.layers))
        for row in rows
    ]
    write_json(run.layer_map, content)
    write_rows(table_of(run), COLUMNS, rows)


def as_content(row: Row) -> dict[str, Any]:
    """Return a row as slim.json has it."""
    return vars(row) | {"lost": lost_as_content(row.lost)}


def lost_as_content(lost: LostGain) -> dict[str, Any]:
    """Return a lost gain as slim.json has it, with its bound."""
    return vars(lost) | {"bound": lost.bound}


def read_map(file: Path) -> LayerMap:
    """Read slim.json.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, damaged, or of something else.
    """
    content = json.loads(read_plain(file, LARGEST).decode())
    if content["made_by"] != MADE_BY:
        raise ValueError("not written by ghibli slim")
    images = int(content["images"])
    return LayerMap(
        weights=content["weights"], limit=number(content["limit"]),
        gain=Gain(*map(number, content["gain"]), freedom=images - 1), images=images,
        items=int(content["items"]),
        blocks=[row_of(row) for row in content["blocks"]], layers=[row_of(row) for row in content["layers"]],
        chosen=content["chosen"] and lost_of(content["chosen"]),
        checked=content["checked"] and lost_of(content["checked"]),
    )  # fmt: skip


def row_of(content: dict[str, Any]) -> Row:
    """Return a row of slim.json."""
    rank, kept = (None if content[key] is None else int(content[key]) for key in ("rank", "kept_rank"))
    return Row(
        name=str(content["name"]), block=str(content["block"]), kind=str(content["kind"]),
        layers=int(content["layers"]), rank=rank, parameters=int(content["parameters"]),
        lost=lost_of(content["lost"]), kept_rank=kept,
    )  # fmt: skip


def lost_of(content: dict[str, Any]) -> LostGain:
    """Return a lost gain of slim.json."""
    return LostGain(number(content["value"]), number(content["standard_error"]), int(content["images"]))


def number(value: Any) -> float:
    """Return a finite number.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)


def check_own_files(run: RunDir) -> None:
    """Check that write_map replaces only what it wrote itself.

    Raises:
        UserError: a file of that name was made by something else.
    """
    try:
        ours = not run.layer_map.exists() or read_map(run.layer_map) is not None
        foreign = None if ours else run.layer_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        foreign = run.layer_map
    table = table_of(run)
    if foreign is None and table.exists():
        with open(table, encoding="utf-8", errors="replace") as opened:
            foreign = None if opened.readline().strip() == ",".join(COLUMNS) else table
    if foreign is not None:
        raise UserError(f"{foreign} was not written by ghibli slim and would be replaced: move it away")
