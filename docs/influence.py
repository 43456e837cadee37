"""Does `ghibli influence` find bad training images? `python docs/influence.py [PART...]`.

Scenes of the demo, among whose training images a tenth are planted in the look of photographs and a twentieth
have each other's captions; the held-out ones are clean. Parts, each of which goes on where it stopped:
plant (draw the images), train (three seeds), rank (each run's images), again (without the worst tenth of the
first ranking, and without a random tenth), table (print what docs/understanding.md says). All of it stays in
outputs/influence/; --set N plants other scenes, in a folder of its own.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ghibli.data.exclude import write_names
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, Scene, compose, draw
from ghibli.evaluation.influence import ODD, read_influences
from ghibli.evaluation.scores import best_probe
from ghibli.evaluation.seeds import over_seeds
from ghibli.evaluation.statistics import Estimate, crossed_mean
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_json, write_text
from ghibli.runtime.seeding import hash_fraction

ROOT, WORK = Path(__file__).parents[1], Path("outputs/influence")
FIGURE = ROOT / "docs" / "understanding" / "agreement.png"
COUNT, SEEDS, HELD_OUT = 200, 3, 0.25
PHOTOS, SWAPPED = 0.10, 0.05  # shares of the training images
FIRST = EVALUATION_SEEDS.start + 500_000  # of the scenes; set N begins 1000 N further
SETTINGS = (
    "model=demo", "data=demo", "data.draw=null", f"data.val_fraction={HELD_OUT}", "data.batch_size=6",
    "early_stopping.patience=null", "lora.rank=8", "sample.every_n_epochs=0",
    "threads=1", "logger=csv", f"seeds={SEEDS}",
)  # fmt: skip
EPOCHS = {"all": 5, "without": 6}  # 120 and 126 steps: a tenth fewer images make a shorter epoch
KINDS = {"photo": "look of a photograph", "swapped": "another image's caption"}


def encoded(scene: Scene, look: str) -> bytes:
    """Draw a scene and return it as the bytes of a PNG file."""
    content = io.BytesIO()
    draw(scene, look).save(content, format="PNG")
    return content.getvalue()


def is_held_out(content: bytes) -> bool:
    """Tell whether a file with these bytes is held out, as ghibli.data.split decides."""
    return hash_fraction(hashlib.sha256(content).hexdigest()) < HELD_OUT


def plant(work: Path, number: int) -> None:
    """Draw the scenes and plant the bad ones among those that are trained on; note which they are."""
    if (work / "planted.json").exists():
        return
    scenes = [compose(FIRST + 1000 * number + i) for i in range(COUNT)]
    files = {scene.seed: encoded(scene, "drawn") for scene in scenes}
    trained = [scene for scene in scenes if not is_held_out(files[scene.seed])]
    order = [trained[i] for i in np.random.default_rng(number).permutation(len(trained))]
    photos = [scene for scene in order if not is_held_out(encoded(scene, "photo"))]
    photos = photos[: round(PHOTOS * len(trained))]
    files |= {scene.seed: encoded(scene, "photo") for scene in photos}
    swapped = [scene for scene in order if scene not in photos][: round(SWAPPED * len(trained))]
    captions = {scene.seed: scene.caption for scene in scenes}
    captions |= {a.seed: b.caption for a, b in zip(swapped, [*swapped[1:], swapped[0]], strict=True)}
    (work / "images" / "images").mkdir(parents=True, exist_ok=True)
    for seed, content in files.items():
        (work / "images" / "images" / name_of(seed)).write_bytes(content)
    lines = [f"{name_of(seed)}|{caption}\n" for seed, caption in captions.items()]
    write_text(work / "images" / "captions.txt", "".join(lines))
    kinds = {name_of(scene.seed): "photo" for scene in photos}
    kinds |= {name_of(scene.seed): "swapped" for scene in swapped}
    write_json(work / "planted.json", kinds)


def name_of(seed: int) -> str:
    """Return the file name of a scene, which says nothing about what was planted."""
    return f"scene_{seed}.png"


def command(*words: str) -> None:
    """Run a command of this project, and stop if it fails."""
    subprocess.run([sys.executable, *words], cwd=Path.cwd(), check=True)


def train_in(work: Path, name: str, *more: str) -> None:
    """Train the three seeds in a folder; the same command goes on."""
    places = f"data.root={work / 'images'}", f"hydra.run.dir={work / name}"
    epochs = f"trainer.max_epochs={EPOCHS[name.partition('_')[0]]}"
    command(str(ROOT / "train.py"), *SETTINGS, epochs, *places, *more)


def runs_of(work: Path, name: str) -> list[RunDir]:
    """Return the runs of the three seeds."""
    return [RunDir(work / (name if seed == 0 else f"{name}+seed={seed}")) for seed in range(SEEDS)]


def train(work: Path, number: int) -> None:
    """Train on all images."""
    train_in(work, "all")


def rank(work: Path, number: int) -> None:
    """Rank the images of each run."""
    for run in runs_of(work, "all"):
        command("-m", "ghibli", "influence", str(run.path))


def again(work: Path, number: int) -> None:
    """Train without the worst tenth, and without as many chosen by chance."""
    ranked = read_influences(RunDir(work / "all").influence)
    worst = [one.name for one in ranked.worst(0.1)]
    names = sorted(one.name for one in ranked.ranked)
    chance = np.random.default_rng(number + 1).choice(names, len(worst), replace=False)
    for name, listed in (("without_worst", worst), ("without_random", [str(one) for one in chance])):
        write_names(work / f"{name}.txt", listed)
        train_in(work, name, f"data.exclude={work / f'{name}.txt'}")


def area(bad: np.ndarray, good: np.ndarray) -> Estimate:
    """Return the area under the ROC curve: how often a bad image ranks below a good one (DeLong 1988)."""
    below = (bad[:, None] < good[None]) + 0.5 * (bad[:, None] == good[None])
    variance = below.mean(1).var(ddof=1) / len(bad) + below.mean(0).var(ddof=1) / len(good)
    return Estimate(float(below.mean()), float(variance**0.5))


def found_in(run: RunDir, kinds: dict[str, str], by: str) -> dict[str, Estimate]:
    """Return the area under the ROC curve for all planted images of a run, and for each kind alone.

    Args:
        by: what ranks the images, agreement or influence.
    """
    ranked = read_influences(run.influence).ranked
    values = {one.name: one.agreement if by == "agreement" else one.influence.value for one in ranked}
    good = np.array([value for name, value in values.items() if name not in kinds])
    return {
        kind: area(
            np.array(
                [v for name, v in values.items() if kinds.get(name) in ([kind] if kind in KINDS else KINDS)]
            ),
            good,
        )
        for kind in ("all", *KINDS)
    }


def gained(one: list[RunDir], other: list[RunDir]) -> Estimate:
    """Return by how much the second training's gain is higher, over seeds and images together."""
    losses = []
    for runs in (one, other):
        probes = [best_probe(run) for run in runs]
        losses.append(torch.stack([probe.val.double().sum(1) for probe in probes if probe is not None]))
    base = best_probe(one[0])
    assert base is not None
    return crossed_mean((losses[0] - losses[1]) / base.base_val.double().sum(1).mean())


def in_points(one: Estimate) -> str:
    """Format a difference of gains in points, with its 95 % interval and its size in errors."""
    low, high, times = 100 * one.low, 100 * one.high, one.value / one.standard_error
    return (
        f"{100 * one.value:+.2f} +- {100 * one.standard_error:.2f} points, 95 % {low:+.2f} .. {high:+.2f}, "
        f"{times:.1f} standard errors"
    )


def table(work: Path, number: int) -> None:
    """Print and note what was found."""
    kinds = json.loads((work / "planted.json").read_text())
    found: dict[str, Any] = {"planted": {kind: list(kinds.values()).count(kind) for kind in KINDS}}
    for run in runs_of(work, "all"):
        for by in ("agreement", "influence"):
            found[f"AUROC of {by}, {run.path.name}"] = {
                kind: f"{one.value:.3f} +- {one.standard_error:.3f}"
                for kind, one in found_in(run, kinds, by).items()
            }
    for name in ("all", "without_worst", "without_random"):
        probes = {seed: best_probe(run) for seed, run in enumerate(runs_of(work, name))}
        found[name] = str(over_seeds({seed: probe for seed, probe in probes.items() if probe is not None}))
        if name != "all":
            found[f"{name}, more than all"] = in_points(gained(runs_of(work, "all"), runs_of(work, name)))
    sides = runs_of(work, "without_random"), runs_of(work, "without_worst")
    found["without_worst, more than without_random"] = in_points(gained(*sides))
    worst = [one.name for one in read_influences(RunDir(work / "all").influence).worst(0.1)]
    caught = {kind: sum(kinds.get(name) == kind for name in worst) for kind in KINDS}
    found["in the worst tenth"] = caught | {"images": len(worst)}
    write_json(work / "table.json", found)
    print(json.dumps(found, indent=1))
    plot(RunDir(work / "all"), kinds, FIGURE if number == 0 else work / "agreement.png")


def plot(run: RunDir, kinds: dict[str, str], file: Path) -> None:
    """Draw agreement over influence of every image, the planted ones in colour."""
    ranked = read_influences(run.influence).ranked
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, colour, mark in ((None, "0.7", "o"), ("photo", "C3", "s"), ("swapped", "C0", "D")):
        own = [one for one in ranked if kinds.get(one.name) == kind]
        values, reaches = [one.influence.value for one in own], [one.influence.reach for one in own]
        label = "others" if kind is None else KINDS[kind]
        axes.errorbar(
            values, [one.agreement for one in own], xerr=reaches, fmt=mark, ms=4, lw=0.6, color=colour,
            label=label,
        )  # fmt: skip
    axes.axvline(0, color="black", lw=0.6)
    axes.axhline(ODD, color="black", lw=0.6, ls=":")
    axes.set(xlabel="influence on the gain, 95 % intervals", ylabel="agreement, lowest noise level")
    axes.legend(frameon=False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=90)


def main() -> None:
    parts = {part.__name__: part for part in (plant, train, rank, again, table)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="by default all")
    parser.add_argument("--set", type=int, default=0, help="which scenes")
    asked = parser.parse_args()
    for name in asked.parts or parts:
        parts[name](WORK / f"set{asked.set}", asked.set)


if __name__ == "__main__":
    main()
