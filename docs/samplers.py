"""Make the table and figure of docs/samplers.md: `python docs/samplers.py`, some minutes on one core.

The images of each sampler and number of steps are measured once and kept in outputs/samplers/.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from ghibli.adapters.apply import load_base
from ghibli.config.registry import SAMPLERS
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.diffusion.samplers import Cell, sample
from ghibli.evaluation.features import ReferenceSet, extract_in_batches, style_features
from ghibli.models.base import BaseModel
from ghibli.runs.compose import compose_config
from ghibli.runtime.cache import cached
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_json

FOLDER, WORK = Path(__file__).parent / "samplers", Path("outputs/samplers")
IMAGES, REAL, BATCH = 10, 150, 10  # images of a cell, real images, images sampled together
STEPS = (5, 10, 15, 20, 30)
GUIDANCE, SIDE, STYLE = 7.5, 128, ", Studio Ghibli style"
EXACT = ("euler", 60)  # stands for the solution of the ODE that the deterministic samplers approximate
SEED = EVALUATION_SEEDS.start  # of the first scene that is drawn


def images_of(base: BaseModel, sampler: str, steps: int) -> torch.Tensor:
    """Sample IMAGES scenes of EVALUATION_SEEDS, (IMAGES, 3, SIDE, SIDE) uint8, or read them again."""
    prompts = [f"{compose(SEED + i).caption}{STYLE}" for i in range(IMAGES)]

    def make() -> dict[str, torch.Tensor]:
        parts = []
        with counted(f"{sampler}, {steps} steps") as on_progress:
            for start in range(0, IMAGES, BATCH):
                part = prompts[start : start + BATCH]
                seeds = list(range(start, start + len(part)))
                cell = Cell(sampler, GUIDANCE)
                options = {"num_inference_steps": steps, "seeds": seeds, "resolution": SIDE}
                parts.append((sample(base, part, cell, **options) * 255).round().to(torch.uint8))
                on_progress(start + len(part), IMAGES)
        return {"images": torch.cat(parts)}

    return cached(WORK, {"sampler": sampler, "steps": steps, "images": IMAGES}, make)["images"]


def real_scenes() -> torch.Tensor:
    """Draw REAL scenes of the look, none of them sampled or trained on, (REAL, 3, SIDE, SIDE) in 0 .. 1."""
    drawn = [np.array(draw(compose(SEED + 10_000 + i), "drawn")) for i in range(REAL)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255


def measure() -> list[dict[str, Any]]:
    """Return a row for each sampler and number of steps, DDIM at 30 among them."""
    base = load_base(compose_config(["model=demo_near"]).model)

    def features(images: torch.Tensor) -> torch.Tensor:
        return extract_in_batches(lambda part: style_features(base.vae, part), images)

    real = features(real_scenes())
    reference = ReferenceSet(real, units=real)
    usual = features(images_of(base, "ddim", 30) / 255)
    exact = images_of(base, *EXACT) / 255
    rows = []
    for sampler in SAMPLERS:
        for steps in STEPS:
            images = images_of(base, sampler, steps) / 255
            found = features(images)
            distance, beside = reference.kernel(found), reference.difference(found, usual)
            rows.append({
                "sampler": sampler, "steps": steps,
                "distance": [distance.value, distance.standard_error],
                "minus_ddim_30": [beside.value, beside.standard_error],
                "to_exact": (images - exact).square().mean(dim=(1, 2, 3)).sqrt().mean().item(),
            })  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw distance over steps: to real images for all, to the ODE's solution for the deterministic ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, entry) in enumerate(SAMPLERS.items()):
        own = [row for row in rows if row["sampler"] == name]
        steps, colour = [row["steps"] for row in own], f"C{number}"
        dashed = "--" if entry.is_stochastic else "-"
        distances, errors = zip(*(row["distance"] for row in own), strict=True)
        at = [step + 0.18 * (number - len(SAMPLERS) / 2) for step in steps]  # so that no error hides another
        style = {"ls": dashed, "marker": "o", "ms": 4, "color": colour, "elinewidth": 0.6}
        left.errorbar(at, distances, errors, label=entry.label, **style)
        if not entry.is_stochastic:
            right.plot(steps, [row["to_exact"] for row in own], marker="o", ms=4, color=colour)
    left.set(title="Style distance to real images, +- one standard error", xlabel="steps", xticks=STEPS)
    left.set_yscale("symlog", linthresh=0.3)
    left.set_yticks((-0.3, 0, 0.3, 1, 3, 10), ["-0.3", "0", "0.3", "1", "3", "10"])
    right.set(title="Distance to the image of endless steps", xlabel="steps", yscale="log", xticks=STEPS)
    right.set_yticks((0.02, 0.05, 0.1, 0.2), ["0.02", "0.05", "0.1", "0.2"])
    for axes in (left, right):
        axes.set_xticklabels([str(steps) for steps in STEPS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(file, dpi=90)


def table(rows: list[dict[str, Any]]) -> str:
    """Format a line for each sampler with its kernel distance at every number of steps, as Markdown."""
    lines = ["| sampler | " + " | ".join(map(str, STEPS)) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name, entry in SAMPLERS.items():
        own = [row["distance"] for row in rows if row["sampler"] == name]
        lines.append(f"| {entry.label} | " + " | ".join(f"{value:.2f}" for value, _ in own) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1:] != ["plot"]:  # alone, that makes the figure and the table from the numbers
        write_json(FOLDER / "distances.json", measure())
    measured = json.loads((FOLDER / "distances.json").read_text())
    plot(measured, FOLDER / "steps.png")
    print(table(measured))
