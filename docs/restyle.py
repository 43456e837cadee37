"""Make the numbers and figure of docs/restyle.md: `python docs/restyle.py RUN [WAY ...]`.

RUN is a finished run of the demo. Draws the photo-like scenes in the named ways (all by default), keeps each
in outputs/restyle/, and measures what is there. It can be stopped and goes on where it was.
"""

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import ndimage

from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.evaluation.distances import kernel_distance
from ghibli.evaluation.features import extract_in_batches, standardised, style_features
from ghibli.evaluation.statistics import Estimate, jackknife, mean_of
from ghibli.inference.control import load_control, load_controlnet
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ControlOptions, RestyleOptions
from ghibli.inference.restyle import restyle_photo
from ghibli.models.base import BaseModel, part_hash, weights_hash
from ghibli.models.prompt_syntax import escaped
from ghibli.runtime.cache import cached, file_of
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.files import is_whole, write_json
from ghibli.runtime.provenance import now, provenance

FOLDER, WORK = Path(__file__).parent / "restyle", Path("outputs/restyle")
PHOTOS, REAL, SIDE, STEPS, SEED = 24, 200, 128, 30, 0
FIRST = EVALUATION_SEEDS.start + 60_000  # of the photos; the real scenes of the look begin REAL below
STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)
CANNY = ControlOptions("canny", "demo/control")
WAYS: dict[str, dict[str, Any]] = {
    "img2img": {},
    "inversion": {"way": "inversion"},
    "img2img_canny": {"control": CANNY},
    "inversion_canny": {"way": "inversion", "control": CANNY},
}
USUAL = ("img2img", 0.5)  # what the others are compared with, at its distance to the look
Table = dict[str, dict[float, dict[str, Any]]]  # way -> strength -> measure()
MEASURES = {"edges": "edges", "features": "features of the VAE"}


def scenes(look: str, first: int, count: int) -> torch.Tensor:
    """Draw scenes, (count, 3, SIDE, SIDE) in 0 .. 1."""
    drawn = [np.array(draw(compose(first + i), look, SIDE)) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255


def options_of(model: LoadedModel, way: str, strength: float) -> RestyleOptions:
    """Return what `ghibli restyle` is asked for: its defaults but for way and strength."""
    return RestyleOptions(strength, "ddim", model.guidance, STEPS, SEED, "", 1.0, SIDE, **WAYS[way])


def key_of(model: LoadedModel, weights: str, way: str, strength: float) -> dict[str, Any]:
    """Return all that the images of a way at a strength depend on."""
    key = {"way": way, "strength": strength, "photos": [FIRST, PHOTOS], "steps": STEPS, "seed": SEED}
    key |= {"guidance": model.guidance, "weights": weights}
    control = WAYS[way].get("control")
    if control is not None:
        key["control"] = part_hash(load_controlnet(control.model, model.base))
    return key


def restyled(model: LoadedModel, weights: str, way: str, strength: float) -> torch.Tensor:
    """Restyle the photos, (PHOTOS, 3, SIDE, SIDE) uint8, or read them again."""
    options = options_of(model, way, strength)

    def make() -> dict[str, torch.Tensor]:
        control = None if options.control is None else load_control(options.control, model.base)(None)
        found = []
        with counted(f"{way}, strength {strength:g}") as on_progress:
            for i in range(PHOTOS):
                scene = compose(FIRST + i)
                prompt = escaped(scene.caption + model.config.data.style)
                photo = draw(scene, "photo", SIDE)
                found.append(np.array(restyle_photo(model, photo, prompt, options, control_of=control)))
                on_progress(i + 1, PHOTOS)
        return {"images": torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)}

    return cached(WORK, key_of(model, weights, way, strength), make)["images"]


# Distances


def edge_distance(images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Return 1 - the correlation of how steep two images are at each place, (N,): 0 = the same edges.

    The steepness is the gradient's magnitude of the grey image at a scale of 1 px.
    """

    def steepness(image: torch.Tensor) -> np.ndarray:
        return ndimage.gaussian_gradient_magnitude(image.mean(0).double().numpy(), 1.0).ravel()

    pairs = zip(images, twins, strict=True)
    return torch.tensor([1 - np.corrcoef(steepness(one), steepness(two))[0, 1] for one, two in pairs])


@torch.no_grad()
def feature_distance(base: BaseModel, images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Return the distance of the VAE encoder's features, (N,): Zhang et al. 2018, equation 1, weights 1.

    In every block that the style features use, the channels of each place are scaled to length 1; their
    squared difference is averaged over the places and summed over the blocks.
    """
    total, encoder = torch.zeros(len(images)), base.vae.encoder
    blocks = [encoder.conv_in(part * 2 - 1) for part in (images, twins)]
    for further in (None, *encoder.down_blocks[:-1]):
        blocks = blocks if further is None else [further(block) for block in blocks]
        one, two = (torch.nn.functional.normalize(block, dim=1) for block in blocks)
        total += (one - two).square().sum(1).mean((1, 2))
    return total


class Look:
    """The distance of images to the drawn look: the kernel distance of `ghibli evaluate` to other scenes."""

    def __init__(self, base: BaseModel) -> None:
        self.extract = partial(extract_in_batches, partial(style_features, base.vae))
        key = {"real": [FIRST - REAL, REAL], "side": SIDE, "vae": part_hash(base.vae)}
        self.real = cached(WORK, key, lambda: {"f": self.extract(scenes("drawn", FIRST - REAL, REAL))})["f"]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (N, D) in units of the real scenes' deviation."""
        return standardised(self.extract(images), self.real)

    def distance(self, features: torch.Tensor) -> Estimate:
        """Return the kernel distance of features (N, D)."""
        return kernel_distance(features, standardised(self.real, self.real))


def measure(
    look: Look, base: BaseModel, key: dict[str, Any], images: torch.Tensor, twins: torch.Tensor
) -> dict[str, Any]:
    """Return all distances, or read them again: `look`, an Estimate, and those to the twins one by one.

    Args:
        key: all that the images depend on.
        images, twins: (PHOTOS, 3, SIDE, SIDE) in 0 .. 1.
    """

    def make() -> dict[str, torch.Tensor]:
        return {
            "style": look.features(images), "edges": edge_distance(images, twins),
            "features": feature_distance(base, images, twins),
        }  # fmt: skip

    found = cached(WORK, key | {"measured": [*MEASURES], "real": REAL}, make)
    return found | {"look": look.distance(found["style"])}


# What follows from them


def at_look(cells: list[tuple[float, float]], wanted: float) -> float:
    """Return a way's distance to the twins where its distance to the look is `wanted`; NaN if it never is.

    Args:
        cells: (to the look, to the twins) from the weakest strength on; between two of them it is linear.
    """
    for (high, before), (low, after) in itertools.pairwise(cells):
        if low <= wanted < high:
            return before + (high - wanted) / (high - low) * (after - before)
    return float("nan")


def nearer(look: Look, table: Table, way: str, measured: str) -> Estimate:
    """Estimate by which share a way is nearer to the twins than USUAL at its look (jackknife of photos)."""

    def share(kept: list[int]) -> float:
        def point(cell: dict[str, Any]) -> tuple[float, float]:
            return look.distance(cell["style"][kept]).value, cell[measured][kept].mean().item()

        wanted, usual = point(table[USUAL[0]][USUAL[1]])
        return 1 - at_look([point(cell) for cell in table[way].values()], wanted) / usual

    every = list(range(PHOTOS))
    without = [share([i for i in every if i != left]) for left in every]
    return jackknife(share(every), [torch.tensor(without, dtype=torch.float64)])


def knee(cells: dict[float, dict[str, Any]], photo: dict[str, Any]) -> tuple[float, float]:
    """Return the strength with the smallest sum of both distances, each over the photo's own, and the sum."""

    def total(cell: dict[str, Any]) -> float:
        parts = [cell["look"].value / photo["look"].value, cell["features"].mean() / photo["features"].mean()]
        return float(sum(parts))

    strength = min(cells, key=lambda one: total(cells[one]))
    return strength, total(cells[strength])


def pair(estimate: Estimate) -> list[float]:
    """Return value and standard error, rounded."""
    return [round(estimate.value, 4), round(estimate.standard_error, 4)]


def row_of(cell: dict[str, Any]) -> dict[str, list[float]]:
    """Return the means over the photos with their standard errors."""
    return {"look": pair(cell["look"]), **{name: pair(mean_of(cell[name])) for name in MEASURES}}


def plot(numbers: dict[str, Any], file: Path) -> None:
    """Draw distance to the twins over distance to the look, a curve for each way, with the strengths."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, (name, label) in zip(panels, MEASURES.items(), strict=True):
        for number, way in enumerate(dict.fromkeys(row["way"] for row in numbers["rows"])):
            rows = [row for row in numbers["rows"] if row["way"] == way]
            looks, twins = ([row[of][0] for row in rows] for of in ("look", name))
            axes.errorbar(
                looks, twins, [row[name][1] for row in rows], marker="o", ms=4, color=f"C{number}", lw=1.4,
                elinewidth=0.7, label=way.replace("_", " + "),
            )  # fmt: skip
            if way == USUAL[0]:  # the others have the same strengths in the same order
                for row, x, y in zip(rows, looks, twins, strict=True):
                    axes.annotate(
                        f"{row['strength']:g}", (x, y), (4, 4), textcoords="offset points", fontsize=8
                    )
        axes.plot(numbers["photo"]["look"][0], numbers["photo"][name][0], "kx", label="the photo itself")
        axes.set(
            xscale="log", xlabel="style distance to the drawn look", ylabel=f"distance to the twin: {label}"
        )
        axes.set_xticks((0.25, 0.5, 1, 2, 4, 8), ["0.25", "0.5", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle("numbers: strength, in the same order on every curve; +- one standard error", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=90)


def main() -> None:
    """Draw the named ways, then measure all that is there; `plot` alone makes the figure from the numbers."""
    if sys.argv[1:] == ["plot"]:
        plot(json.loads((FOLDER / "numbers.json").read_text()), FOLDER / "curve.png")
        return
    if len(sys.argv) < 2 or set(sys.argv[2:]) - set(WAYS):
        raise UserError(f"python docs/restyle.py RUN [WAY ...], of {', '.join(WAYS)}")
    model = load_model([sys.argv[1]], [])
    weights = weights_hash(model.at(1.0))
    for strength in STRENGTHS:
        for way in sys.argv[2:] or WAYS:
            restyled(model, weights, way, strength)
    base = model.at(0.0)
    look, twins = Look(base), scenes("drawn", FIRST, PHOTOS)
    key = {"way": "the photo itself", "photos": [FIRST, PHOTOS]}
    photo = measure(look, base, key, scenes("photo", FIRST, PHOTOS), twins)
    table: Table = {}
    for way in WAYS:
        for strength in STRENGTHS:
            key = key_of(model, weights, way, strength)
            if is_whole(file_of(WORK, key)):
                images = restyled(model, weights, way, strength) / 255
                table.setdefault(way, {})[strength] = measure(look, base, key, images, twins)
    rows = [{"way": way, "strength": s} | row_of(cell) for way in table for s, cell in table[way].items()]
    others = [way for way in table if way != USUAL[0]]
    FOLDER.mkdir(exist_ok=True)
    numbers = {
        "made": now(), "from": provenance(), "weights": weights, "guidance": model.guidance, "steps": STEPS,
        "photos": PHOTOS, "photo": row_of(photo), "rows": rows,
        "nearer": {w: {name: pair(nearer(look, table, w, name)) for name in MEASURES} for w in others},
        "knee": {way: knee(cells, photo) for way, cells in table.items()},
    }  # fmt: skip
    write_json(FOLDER / "numbers.json", numbers)
    plot(numbers, FOLDER / "curve.png")


if __name__ == "__main__":
    one_line_errors(main)
