"""The images of a report page, embedded as PNG."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ghibli.images.read import open_file
from ghibli.report.run_data import READ_ERRORS, RunData

MAX_WIDTH = 1700  # px; wider images are scaled down
MAX_GRIDS = 5  # of one run


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in the page as a data URI; width and height in px."""

    uri: str
    width: int
    height: int
    alt: str
    label: str = ""


def embed(path: Path, alt: str, problems: list[str], label: str = "") -> EmbeddedImage | None:
    """Embed an image file; return None and note a problem if it is missing or damaged."""
    try:
        image = open_file(path).convert("RGB")
    except (*READ_ERRORS, SyntaxError, Image.DecompressionBombError):  # SyntaxError: of a broken PNG
        problems.append(f"{path.name} is damaged: it is not shown")
        return None
    if image.width > MAX_WIDTH:
        size = MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)
        image = image.resize(size, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return EmbeddedImage(uri, image.width, image.height, alt, label)


def embed_grids(data: RunData) -> list[EmbeddedImage]:
    """Embed the image grids of a run from the first epoch to the best; of many, MAX_GRIDS evenly spaced."""
    files = sorted(
        data.run.samples.glob("*.png"), key=lambda path: (not path.stem.startswith("epoch_"), path)
    )
    if len(files) > MAX_GRIDS:
        chosen = [round(k * (len(files) - 1) / (MAX_GRIDS - 1)) for k in range(MAX_GRIDS)]
        data.problems.append(
            f"{len(files) - MAX_GRIDS} of {len(files)} image grids in samples/ are left out to keep the page "
            "small"
        )
        files = [files[k] for k in chosen]
    alt = "sample prompts in every cell, base above and {} below, from the same start noise"
    found = [embed(file, alt.format(grid_label(file)), data.problems, grid_label(file)) for file in files]
    return [one for one in found if one is not None]


def embed_last_grid(data: RunData, label: str) -> EmbeddedImage | None:
    """Embed the newest image grid of a run; None if it has none."""
    if data.trial.grid is None:
        return None
    alt = f"the last image grid of {data.name}: base above, trained below, from the same start noise"
    return embed(data.trial.grid, alt, data.problems, label)


def grid_label(file: Path) -> str:
    """Label a grid: `epoch 5` for epoch_005.png, `best epoch` for the one drawn at the end."""
    number = file.stem.removeprefix("epoch_")
    if number != file.stem and number.isdigit():
        return f"epoch {int(number)}"
    return "base" if file.stem == "base" else "best epoch"
