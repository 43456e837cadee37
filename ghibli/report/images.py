"""The images of a page, as PNG within it."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ghibli.report.run_data import DAMAGED, RunData

WIDEST = 1700  # px; a wider grid is made smaller
MOST_GRIDS = 5  # of one run


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that is part of the page."""

    uri: str
    width: int
    height: int
    alt: str
    label: str = ""


def embed(path: Path, alt: str, problems: list[str], label: str = "") -> EmbeddedImage | None:
    """The file as a data URI; None, and a sentence, where it is missing or damaged."""
    try:
        image = Image.open(path).convert("RGB")
    except (*DAMAGED, SyntaxError, Image.DecompressionBombError):  # SyntaxError: of a broken PNG
        problems.append(f"{path.name} is damaged: it is not shown")
        return None
    if image.width > WIDEST:
        size = WIDEST, round(image.height * WIDEST / image.width)
        image = image.resize(size, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return EmbeddedImage(uri, image.width, image.height, alt, label)


def grids(part: RunData) -> list[EmbeddedImage]:
    """The run's image grids from the first epoch to the best; of many a few, evenly chosen."""
    files = sorted(
        part.run.samples.glob("*.png"), key=lambda path: (not path.stem.startswith("epoch_"), path)
    )
    if len(files) > MOST_GRIDS:
        chosen = [round(k * (len(files) - 1) / (MOST_GRIDS - 1)) for k in range(MOST_GRIDS)]
        left_out = len(files) - MOST_GRIDS
        part.problems.append(
            f"{left_out} of {len(files)} image grids in samples/ are left out to keep the page small"
        )
        files = [files[k] for k in chosen]
    alt = "sample prompts in every cell, base above and {} below, from the same start noise"
    found = [embed(file, alt.format(grid_label(file)), part.problems, grid_label(file)) for file in files]
    return [one for one in found if one is not None]


def last_grid(part: RunData, label: str) -> EmbeddedImage | None:
    """The newest grid of a run, under the name it has on the page."""
    if part.trial.grid is None:
        return None
    alt = f"the last image grid of {part.name}: base above, trained below, from the same start noise"
    return embed(part.trial.grid, alt, part.problems, label)


def grid_label(file: Path) -> str:
    """`epoch 5` for epoch_005.png, `best epoch` for the grid that was drawn at the end."""
    number = file.stem.removeprefix("epoch_")
    if number != file.stem and number.isdigit():
        return f"epoch {int(number)}"
    return "base" if file.stem == "base" else "best epoch"
