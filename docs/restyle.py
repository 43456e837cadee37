"""Make the numbers and the figure of docs/restyle.md: `python docs/restyle.py`, some minutes on one core.

Every photo-like scene of the demo has a true drawn twin, the same scene in the drawn look. What a way of
restyling makes of the photo is compared with that twin (does the structure stay?) and with other drawn scenes
(is it the look?). The images are kept in outputs/restyle-curve/.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import AutoencoderKL

from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.evaluation.features import ReferenceSet, extract_in_batches, style_features
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import RestyleOptions
from ghibli.inference.restyle import restyle_photo
from ghibli.models.base import DEMO
from ghibli.runtime.cache import cached
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_json

FOLDER, WORK = Path(__file__).parent / "restyle", Path("outputs/restyle-curve")
PHOTOS, DRAWN, SEED = 12, 150, EVALUATION_SEEDS.start + 50_000
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
WAYS = [("img2img", 7.5), ("img2img", 3.0), ("inversion", 7.5), ("inversion", 3.0), ("inversion", 1.0)]
ADAPTER = f"{DEMO / 'near'}:0.92"


def scenes(look: str, start: int, count: int) -> torch.Tensor:
    """Draw scenes in a look, (count, 3, 128, 128) in 0 .. 1."""
    drawn = [np.array(draw(compose(start + i), look)) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255


def restyled(model: LoadedModel, way: str, guidance: float, strength: float) -> torch.Tensor:
    """Restyle PHOTOS scenes, (PHOTOS, 3, 128, 128) in 0 .. 1, or read them again."""

    def make() -> dict[str, torch.Tensor]:
        images = []
        with counted(f"{way}, guidance {guidance:g}, strength {strength:g}") as on_progress:
            for i in range(PHOTOS):
                scene = compose(SEED + i)
                options = RestyleOptions(strength, "ddim", guidance, 30, i, "", 1.0, 128, way)
                prompt = f"{scene.caption}, Studio Ghibli style"
                images.append(np.array(restyle_photo(model, draw(scene, "photo"), prompt, options)))
                on_progress(i + 1, PHOTOS)
        return {"images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}

    key = {"way": way, "guidance": guidance, "strength": strength, "photos": PHOTOS}
    return cached(WORK, key, make)["images"] / 255


@torch.no_grad()
def structure_distance(vae: AutoencoderKL, images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Measure how far images (N, 3, H, W) in 0 .. 1 are from their twins, place by place: (N,).

    As LPIPS (Zhang et al. 2018, equation 1) with equal weights, on the features of the base's own VAE
    encoder: each place's features have length 1, and their squared difference is averaged.
    """
    totals = torch.zeros(len(images))
    blocks = [vae.encoder.conv_in, *vae.encoder.down_blocks[:-1]]
    ours, theirs = images * 2 - 1, twins * 2 - 1
    for block in blocks:
        ours, theirs = block(ours), block(theirs)
        unit = [torch.nn.functional.normalize(x, dim=1) for x in (ours, theirs)]
        totals += (unit[0] - unit[1]).square().sum(1).mean((1, 2)) / len(blocks)
    return totals


def edge_distance(images: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of the edges of images (N, 3, H, W) and their twins: (N,)."""

    def edges(x: torch.Tensor) -> torch.Tensor:
        grey = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)
        return torch.cat([grey.diff(dim=2)[..., :-1], grey.diff(dim=3)[..., :-1, :]], dim=1)

    return (edges(images) - edges(twins)).abs().mean((1, 2, 3))


def measure() -> list[dict[str, Any]]:
    """Return a row for each way, guidance and strength, and one for the untouched photos."""
    model = load_model([ADAPTER], ["model=demo"])
    vae = model.base.vae

    def features(images: torch.Tensor) -> torch.Tensor:
        return extract_in_batches(lambda part: style_features(vae, part), images)

    look = ReferenceSet(features(scenes("drawn", SEED + 10_000, DRAWN)), standardise=True)
    twins, photos = scenes("drawn", SEED, PHOTOS), scenes("photo", SEED, PHOTOS)

    def row(images: torch.Tensor, **what: Any) -> dict[str, Any]:
        structure, edges = structure_distance(vae, images, twins), edge_distance(images, twins)
        distance = look.kernel(features(images))
        return what | {
            "look": [distance.value, distance.standard_error],
            "structure": [structure.mean().item(), (structure.std() / PHOTOS**0.5).item()],
            "edges": [edges.mean().item(), (edges.std() / PHOTOS**0.5).item()],
        }

    rows = [row(photos, way="photo", guidance=None, strength=0.0), row(twins, way="twin", guidance=None)]
    for way, guidance in WAYS:
        for strength in STRENGTHS:
            images = restyled(model, way, guidance, strength)
            rows.append(row(images, way=way, guidance=guidance, strength=strength))
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw structure over look, a line for each way."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axes, what in zip(both, ("structure", "edges"), strict=True):
        for way, guidance in WAYS:
            own = [r for r in rows if r["way"] == way and r["guidance"] == guidance]
            style = "-" if way == "img2img" else "--"
            xs, ys = [r["look"][0] for r in own], [r[what][0] for r in own]
            axes.plot(xs, ys, style, marker="o", ms=4, label=f"{way}, guidance {guidance:g}")
            for r, x, y in zip(own, xs, ys, strict=True):
                axes.annotate(
                    f"{r['strength']:g}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
        photo = next(r for r in rows if r["way"] == "photo")
        axes.plot(photo["look"][0], photo[what][0], "k*", label="the photo itself")
        axes.set(xlabel="distance to the look", ylabel="distance to the true twin", title=what)
        axes.grid(alpha=0.3)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    measured = measure()
    write_json(FOLDER / "distances.json", measured)
    plot(measured, FOLDER / "curve.png")
    for entry in measured:
        numbers = " ".join(
            f"{what} {entry[what][0]:.3f}+-{entry[what][1]:.3f}" for what in ("look", "structure", "edges")
        )
        print(entry["way"], entry["guidance"], entry.get("strength"), numbers)
