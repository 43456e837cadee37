"""The slides' table: a run and its base sampled in every cell, and how far that is from real images.

All models draw the same prompts from the same start noise, so they compare in pairs.
"""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ghibli.adapters.trained import starting_base, trained_base
from ghibli.config.schema import Config
from ghibli.data.folder import CaptionedImage
from ghibli.data.sources import LEAST, real_images
from ghibli.diffusion.samplers import Cell, cells_of
from ghibli.evaluation import diagnosis
from ghibli.evaluation.distances import precision_recall
from ghibli.evaluation.features import FeatureExtractor, ReferenceSet
from ghibli.evaluation.samples import Job, Measurements, SampleCache
from ghibli.evaluation.statistics import Estimate, mean_of
from ghibli.images.grid import compose_grid
from ghibli.images.read import open_image
from ghibli.images.resize import preprocess
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_json

SHOWN = 6  # samples beside their nearest training image
CHANGEABLE = (
    "evaluate", "sample.samplers", "sample.guidance", "sample.num_inference_steps", "sample.seed",
    "data.reference", "model.clip", "cache_dir",
)  # fmt: skip
REFERENCE = "measuring the reference"


class Real(NamedTuple):
    """The real images, measured."""

    reference: ReferenceSet  # what samples are compared with
    own: Measurements  # of the reference
    floor: Measurements  # of a fixed part of the training images: what real images score
    training: torch.Tensor  # thumbnails (N, 768) of all training images: what samples might be copies of


def evaluate(run: RunDir, config: Config) -> dict[str, Any]:
    """Samples and measures a run and its base; writes evaluation.json and evaluation.png into its folder.

    Args:
        config: the run's own, but for what CHANGEABLE names.

    Raises:
        UserError: a base, image set or feature network that is not at hand.
    """
    options = config.evaluate
    bases = {"base": starting_base(config)}
    cells = {"base": cells_of(config.sample, 1)}
    if config.finetune != "none":
        bases["run"] = trained_base(run, config)
        cells["run"] = cells_of(config.sample, config.loss.guidance)
    reference_images, training_images = real_images(config)
    if len(training_images) < LEAST:
        raise UserError(f"too few training images to evaluate with: at least {LEAST} are needed")
    sample_cache = SampleCache(
        config, FeatureExtractor(config, bases["base"]), [p.caption for p in reference_images]
    )
    real = measured(sample_cache, reference_images, training_images)
    scan = list(dict.fromkeys(Cell("ddim", scale) for scale in options.scales))
    jobs = [Job(name, base, cell, options.samples) for name, base in bases.items() for cell in cells[name]]
    jobs += [Job(name, base, cell, options.scan_samples) for name, base in bases.items() for cell in scan]
    sampled = sample_cache.sample_all(jobs)

    def kernel_of(rows: Measurements) -> tuple[float, float]:
        return pair(real.reference.kernel(rows["features"]))

    of_cells = {key[:2]: rows for key, rows in sampled.items() if key[2] == options.samples}
    result = {
        "features": options.features, "reference_images": len(reference_images),
        "samples": options.samples, "scan_samples": options.scan_samples,
        "num_inference_steps": config.sample.num_inference_steps, "training_guidance": config.loss.guidance,
        "weights": run.weights, "cache_dir": config.cache_dir,
        "reference_file": sample_cache.files[REFERENCE],
        "floor_images": len(real.floor["features"]), "real": numbers(real.floor, real.reference),
        "models": {name: table_of(name, cells[name], of_cells, real) for name in bases},
        "scan": {
            name: {f"{c.guidance:g}": kernel_of(sampled[name, c, options.scan_samples]) for c in scan}
            for name in bases
        },
    }  # fmt: skip
    for name, rows in result["models"].items():
        for row, cell in zip(rows, cells[name], strict=True):
            row["file"] = sample_cache.files[name, cell, options.samples]
    least = min(options.samples, len(reference_images))
    found = diagnosis.few_images(least, real.own["features"].shape[1], result["real"]["frechet"])
    result["findings"] = [vars(finding) for finding in found]
    write_json(run.evaluation, result)
    note_findings(run, result["findings"])
    save_images(run, {key: rows["kept"] for key, rows in of_cells.items()}, sample_cache.captions, cells)
    if "run" in bases:
        cell = cells["run"][-1]
        found = nearest_copies(of_cells["run", cell], real)
        drawn = sample_cache.draw(bases["run"], cell, [sample for sample, _, _ in found])
        save_nearest(run, found, drawn, training_images, config)
    return result


def note_findings(run: RunDir, found: list[dict[str, str]]) -> None:
    """Adds them to what the doctor said in training, in place of those of an earlier evaluation."""
    said = [finding for finding in run.read_status().get("findings", []) if finding["name"] != "few images"]
    run.update_status(findings=[*said, *found])


def measured(
    sample_cache: SampleCache, reference: list[CaptionedImage], training: list[CaptionedImage]
) -> Real:
    """The real images; the floor has as many as there are samples, reference and training images."""
    options = sample_cache.config.evaluate
    own = sample_cache.measure_real(REFERENCE, reference)
    few = training[: min(options.samples, len(reference))]
    return Real(
        reference=ReferenceSet(own["features"], standardise=options.features == "style"),
        own=own,
        floor=sample_cache.measure_real("measuring training images", few),
        training=sample_cache.thumbnails("reading all training images", training),
    )


def table_of(
    name: str, cells: list[Cell], sampled: dict[tuple[str, Cell], Measurements], real: Real
) -> list[dict[str, Any]]:
    """The rows of one model: a row for each cell; beside the base's same cell where there is one."""
    rows = []
    for cell in cells:
        ours, base = sampled[name, cell], sampled.get(("base", cell))
        row = asdict(cell) | numbers(ours, real.reference) | {"copying": copying(ours, real)}
        if name != "base" and base is not None:
            row["kernel_minus_base"] = pair(real.reference.difference(ours["features"], base["features"]))
        rows.append(row)
    return rows


def numbers(rows: Measurements, reference: ReferenceSet) -> dict[str, Any]:
    """What one set of images scores; kernel and caption_fit are (value, standard error)."""
    features = rows["features"]
    precision, recall = precision_recall(reference.units(features), reference.units(reference.own))
    return {
        "kernel": pair(reference.kernel(features)),
        "frechet": reference.frechet(features),
        "caption_fit": pair(mean_of(rows["caption_fit"])) if "caption_fit" in rows else None,
        "precision": precision,
        "recall": recall,
    }


def copying(rows: Measurements, real: Real) -> float:
    """How near samples come to the training images: 1 = as near as unseen real images, 0 = copies.

    The median distance of thumbnails to their nearest training image, over that of the reference.
    """
    ours, unseen = (
        torch.cdist(part["thumbnails"], real.training).min(1).values.median() for part in (rows, real.own)
    )
    return (ours / unseen).item()


def nearest_copies(rows: Measurements, real: Real) -> list[tuple[int, int, float]]:
    """(sample, training image, distance) of the samples that come nearest to one, the nearest first.

    The distance is that of thumbnails, over the median distance of unseen real images to theirs.
    """
    unseen = torch.cdist(real.own["thumbnails"], real.training).min(1).values.median()
    distances, images = torch.cdist(rows["thumbnails"], real.training).min(1)
    first = distances.argsort()[:SHOWN]
    return [(int(i), int(images[i]), (distances[i] / unseen).item()) for i in first]


def save_nearest(
    run: RunDir,
    found: list[tuple[int, int, float]],
    drawn: torch.Tensor,
    training: list[CaptionedImage],
    config: Config,
) -> None:
    """evaluation_nearest.png: of all samples those nearest to a training image, above that image."""
    size = config.model.resolution, config.data.square_resize
    originals = [preprocess(open_image(training[place].path), *size) / 2 + 0.5 for _, place, _ in found]
    rows = [("sample", drawn[None]), ("nearest\ntraining\nimage", torch.stack(originals)[None])]
    title = "copies? The samples that come nearest to a training image\n1 = as near as an unseen image is"
    grid = compose_grid(rows, [""], [f"{distance:.2f}" for _, _, distance in found], title)
    write_atomically(run.evaluation_nearest, lambda file: grid.save(file, "PNG"))


def pair(estimate: Estimate) -> tuple[float, float]:
    """(value, standard error), for JSON."""
    return estimate.value, estimate.standard_error


def save_images(
    run: RunDir, kept: dict[tuple[str, Cell], torch.Tensor], prompts: list[str], cells: dict[str, list[Cell]]
) -> None:
    """evaluation.png: the first prompts in every cell, base above, run below; white where it is not drawn."""
    every = list(dict.fromkeys(cell for own in reversed(cells.values()) for cell in own))
    few = min(4, len(prompts), *(len(images) for images in kept.values()))
    empty = torch.ones_like(next(iter(kept.values()))[:few], dtype=torch.float32)

    def tiles(name: str) -> list[torch.Tensor]:
        return [kept[name, cell][:few] / 255 if cell in cells[name] else empty for cell in every]

    rows = [(name, torch.stack(tiles(name), dim=1)) for name in cells]
    title = f"evaluation of {run.path.name}\nsame start noise in a row"
    grid = compose_grid(rows, prompts[:few], [cell.label for cell in every], title)
    write_atomically(run.evaluation_images, lambda file: grid.save(file, "PNG"))
