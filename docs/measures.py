"""Make the numbers of docs/measures.md: `python docs/measures.py [PART ...]`.

Parts: altered, layouts, others, sizes, copies; all by default. Features are kept in outputs/measures/, made
once, so a part that was stopped goes on where it was.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from ghibli.adapters.trained import starting_base
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, FINETUNE_SEEDS, compose, draw
from ghibli.evaluation.copies import TrainingThumbnails, copies_among, crops_of, thumbnails_of
from ghibli.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from ghibli.evaluation.features import (
    FeatureExtractor,
    extract_in_batches,
    layout_features,
    standardised,
    style_features,
)
from ghibli.evaluation.statistics import mean_of
from ghibli.models.load import load
from ghibli.runs.compose import compose_config
from ghibli.runtime.cache import cached
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_json
from ghibli.runtime.provenance import now, provenance

NUMBERS = Path(__file__).parent / "measures" / "numbers.json"
WORK = Path("outputs/measures")
COUNT = 300  # images of each set
REFERENCE, ALTERED, TRAINING = (
    EVALUATION_SEEDS.start + 40_000, EVALUATION_SEEDS.start + 50_000, FINETUNE_SEEDS.start,
)  # fmt: skip
GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # luma of an RGB pixel


def scenes(first: int, count: int = COUNT, look: str = "drawn") -> torch.Tensor:
    """Draw scenes, (count, 3, 128, 128) in 0 .. 1."""
    arrays = [np.asarray(draw(compose(first + i), look)) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def nights() -> torch.Tensor:
    """Draw as many scenes that are all at night."""
    seeds = [seed for seed in range(ALTERED, ALTERED + 20 * COUNT) if compose(seed).time == "night"][:COUNT]
    return torch.cat([scenes(seed, 1) for seed in seeds])


def tiles(images: torch.Tensor, side: int) -> torch.Tensor:
    """Shuffle each image's square tiles of `side` px."""
    draws, per = np.random.default_rng(0), images.shape[-1] // side
    cut = images.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)  # (N, 3, tiles, side, side)
    shuffled = torch.stack([image[:, draws.permutation(per * per)] for image in cut])
    rows = shuffled.unflatten(2, (per, per)).permute(0, 1, 2, 4, 3, 5)
    return rows.reshape(images.shape)


def blurred(images: torch.Tensor, deviation: float = 1.0) -> torch.Tensor:
    """Blur by a Gaussian of this standard deviation in px."""
    line = torch.exp(-0.5 * (torch.arange(-3, 4) / deviation) ** 2)
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect")
    return conv2d(padded.flatten(0, 1)[:, None], kernel).view(images.shape)


def noisy(images: torch.Tensor, deviation: float) -> torch.Tensor:
    """Add normal noise of this standard deviation, of 0 .. 1."""
    draws = torch.Generator().manual_seed(0)
    return images + deviation * torch.randn(images.shape, generator=draws)


def saturated(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale the distance of every pixel to its own grey."""
    grey = (images * GREY).sum(1, keepdim=True)
    return grey + factor * (images - grey)


def contrasted(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale the distance of every pixel to its image's mean grey."""
    mean = (images * GREY).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return mean + factor * (images - mean)


ALTERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda images: images,
    "mirrored": lambda images: images.flip(-1),
    "upside down": lambda images: images.flip(-2),
    "tiles of 64 px shuffled": lambda images: tiles(images, 64),
    "tiles of 32 px shuffled": lambda images: tiles(images, 32),
    "noise of 10 levels": lambda images: noisy(images, 10 / 255),
    "blurred by 1 px": blurred,
    "brighter by a tenth": lambda images: 1.1 * images,
    "saturation x 0.7": lambda images: saturated(images, 0.7),
    "contrast x 0.7": lambda images: contrasted(images, 0.7),
    "nights only": lambda images: nights(),
    "a tenth photographs": lambda images: torch.cat(
        [images[: -COUNT // 10], scenes(ALTERED + COUNT - COUNT // 10, COUNT // 10, "photo")]
    ),
}


def features_of(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return style features (COUNT, D) of the demo base's VAE, kept under this name."""

    def measure() -> dict[str, torch.Tensor]:
        base = load("demo")
        images = make().clamp(0, 1)
        with counted(f"measuring: {name}") as on_progress:
            rows = extract_in_batches(lambda part: style_features(base.vae, part), images, on_progress)
        return {"features": rows}

    return cached(WORK, {"version": 1, "set": name, "count": COUNT}, measure)["features"]


def layouts_of(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return layout features (COUNT, D) of the demo base's VAE, kept under this name."""

    def measure() -> dict[str, torch.Tensor]:
        base = load("demo")
        with counted(f"measuring layouts: {name}") as on_progress:
            rows = extract_in_batches(
                lambda part: layout_features(base.vae, part), make().clamp(0, 1), on_progress
            )
        return {"layout": rows}

    return cached(WORK, {"version": 1, "layouts": name, "count": COUNT}, measure)["layout"]


def note(part: str, **numbers: object) -> None:
    """Add numbers to numbers.json, with date and commit, and print them."""
    known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    NUMBERS.parent.mkdir(exist_ok=True)
    about = {"date": now(), "commit": provenance()["git_commit"]}
    write_json(NUMBERS, known | {part: about | numbers})
    print(part, json.dumps(numbers, indent=1), flush=True)


def altered() -> None:
    """Measure the kernel distance of altered real images, in units of reference and training images."""
    reference = features_of("reference", lambda: scenes(REFERENCE))
    training = features_of("training", lambda: scenes(TRAINING))
    plain, found = [], {}
    for name, alter in ALTERATIONS.items():
        rows = features_of(name, lambda alter=alter: alter(scenes(ALTERED)))
        own, other = (
            kernel_distance(standardised(rows, unit), standardised(reference, unit))
            for unit in (reference, training)
        )
        plain.append((own.value, other.value))
        found[name] = [
            round(x, 3) for x in (own.value, own.standard_error, other.value, other.standard_error)
        ]
    ratios = [b / a for a, b in plain if a > 0.3]
    note(
        "altered", distances=found,
        columns=["in the reference's units", "its error", "in those of training images", "its error"],
        ratio_of_units=[round(min(ratios), 3), round(max(ratios), 3)],
    )  # fmt: skip


def layouts() -> None:
    """Measure the layout distance of altered real images, in units of training images."""
    reference, training = (
        layouts_of(n, lambda f=f: scenes(f)) for n, f in (("reference", REFERENCE), ("training", TRAINING))
    )
    found = {}
    for name, alter in ALTERATIONS.items():
        rows = layouts_of(name, lambda alter=alter: alter(scenes(ALTERED)))
        one = kernel_distance(standardised(rows, training), standardised(reference, training))
        found[name] = [round(one.value, 3), round(one.standard_error, 3)]
    note("layouts", distances=found, columns=["distance", "its error"])


def others() -> None:
    """Measure the other numbers of `ghibli evaluate` for altered real images, and for exchanged captions."""
    config = compose_config(["data=demo", "model=demo"])
    extractor = FeatureExtractor(config, starting_base(config))
    captions = [f"{compose(ALTERED + i).caption}, Studio Ghibli style" for i in range(COUNT)]
    training, reference = (
        features_of(n, lambda f=f: scenes(f)) for n, f in (("training", TRAINING), ("reference", REFERENCE))
    )
    found = {}
    for name, alter in ALTERATIONS.items():
        rows = standardised(features_of(name, lambda alter=alter: alter(scenes(ALTERED))), training)
        real = standardised(reference, training)
        precision, recall = precision_recall(rows, real)
        found[name] = {
            "frechet": round(frechet_distance(rows, real), 1),
            "precision": round(precision, 3), "recall": round(recall, 3),
        }  # fmt: skip
        if name != "nights only":  # those are other scenes
            images = alter(scenes(ALTERED)).clamp(0, 1)
            found[name]["caption fit"] = fit(extractor, images, captions)
    turned = captions[1:] + captions[:1]
    note("others", measures=found, captions_exchanged=fit(extractor, scenes(ALTERED), turned))


def fit(extractor: FeatureExtractor, images: torch.Tensor, captions: list[str]) -> list[float]:
    """Return the mean fit of images and captions by the demo's CLIP, with its standard error."""
    rows = [
        extractor.measure(images[at : at + 50], captions[at : at + 50])["caption_fit"]
        for at in range(0, len(images), 50)
    ]
    found = mean_of(torch.cat(rows))
    return [round(found.value, 1), round(found.standard_error, 1)]


def sizes(repeats: int = 100) -> None:
    """Measure real against real images with few reference images, in both units."""
    reference, others = (
        features_of(n, lambda f=f: scenes(f)) for n, f in (("reference", REFERENCE), ("none", ALTERED))
    )
    training = features_of("training", lambda: scenes(TRAINING))
    draws, found = np.random.default_rng(0), {}
    for count in (5, 10, 20, 50, 100):
        values = []
        for _ in range(repeats):
            few = reference[draws.choice(COUNT, count, replace=False)]
            units = (few, training)
            values.append(
                [kernel_distance(standardised(others, u), standardised(few, u)).value for u in units]
            )
        means, spreads = np.mean(values, 0), np.std(values, 0, ddof=1)
        found[str(count)] = {
            "own units": [round(means[0], 3), round(spreads[0], 3)],
            "training images' units": [round(means[1], 3), round(spreads[1], 3)],
        }
    note("sizes", repeats=repeats, real_against_real=found)


def corner(images: torch.Tensor, share: float) -> torch.Tensor:
    """Keep the top right part of this side, enlarged."""
    side = int(share * images.shape[-1])
    return interpolate(images[..., :side, -side:], size=images.shape[-1], mode="bilinear")


COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exact": lambda images: images,
    "noise of 10 levels": lambda images: noisy(images, 10 / 255),
    "mirrored": lambda images: images.flip(-1),
    "part of 0.9": lambda images: corner(images, 0.9),
    "part of 0.8": lambda images: corner(images, 0.8),
    "part of 0.85, mirrored": lambda images: corner(images, 0.85).flip(-1),
    "part of 0.6": lambda images: corner(images, 0.6),
    "brighter by a tenth": lambda images: 1.1 * images,
    "half the resolution": lambda images: interpolate(avg_pool2d(images, 2), scale_factor=2),
}


def copies() -> None:
    """Measure how well copies of training images are told from unseen ones: area under the ROC curve."""
    originals = scenes(TRAINING)
    training = TrainingThumbnails(thumbnails_of(originals), torch.stack([crops_of(one) for one in originals]))
    calibrating, unseen = (training.distances(thumbnails_of(scenes(f))) for f in (REFERENCE, ALTERED))
    found = {}
    for name, copy in COPIES.items():
        distances = training.distances(thumbnails_of(copy(originals).clamp(0, 1)))
        area = scipy.stats.mannwhitneyu(unseen, distances).statistic / (len(unseen) * len(distances))
        below = copies_among(distances, calibrating)["below"] / len(distances)
        mixed = copies_among(torch.cat([distances[: COUNT // 5], unseen[COUNT // 5 :]]), calibrating)
        found[name] = {"area": round(float(area), 4), "found": round(below, 3), "a fifth": mixed}
    note("copies", of_copies=found, of_unseen=copies_among(unseen, calibrating))


def main() -> None:
    parts = {part.__name__: part for part in (altered, layouts, others, sizes, copies)}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
