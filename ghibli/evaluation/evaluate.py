"""Evaluate a run: sample it and its base in every cell, and measure the distance to real images.

A cell is a sampler with a guidance scale. All models draw the same prompts from the same start noise, so
they can be compared in pairs.
"""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ghibli.adapters.trained import for_sampling, run_base, trained_base
from ghibli.config.registry import sampler_label
from ghibli.config.schema import Config, EvaluateConfig
from ghibli.data.folder import CaptionedImage
from ghibli.data.sources import LEAST, real_images
from ghibli.diffusion.samplers import Cell, cells_of
from ghibli.evaluation import diagnosis
from ghibli.evaluation.copies import TrainingThumbnails, copies_among
from ghibli.evaluation.distances import precision_recall
from ghibli.evaluation.features import UNIT_IMAGES, FeatureExtractor, ReferenceSet
from ghibli.evaluation.samples import Job, Measurements, SampleCache, read_unit_image
from ghibli.evaluation.statistics import Estimate, mean_of
from ghibli.images.grid import compose_grid
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_json

NEAREST_SAMPLES = 6  # shown beside their nearest training image
REFERENCE = "measuring the reference"  # label of the progress bar and of the cached file
UNITS = "measuring training images"  # the same
Sampled = dict[tuple[str, Cell, int], Measurements]  # by model, cell and number of samples


class ModelCells(NamedTuple):
    """A model and the cells it is evaluated in."""

    base: BaseModel
    cells: list[Cell]


class RealImages(NamedTuple):
    """Measurements of the real images."""

    reference: ReferenceSet  # what samples are compared with
    layout: ReferenceSet  # the same images, by where things are in them
    own: Measurements  # of the reference
    floor: Measurements  # of a fixed subset of the training images: the best score that samples could have
    training: TrainingThumbnails  # of all training images, to search for copies


def evaluate(run: RunDir, config: Config) -> dict[str, Any]:
    """Sample and measure a run and its base; write evaluation.json and images into the run folder.

    Args:
        config: the run's own, except for the keys in files.CHANGED_BY_EVALUATE.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: a base, image set or feature network is missing, or there are too few images.
    """
    models = models_to_evaluate(run, config)
    reference_images, training_images = real_images(config, run)
    if len(training_images) < LEAST:
        raise UserError(f"too few training images to evaluate with: at least {LEAST} are needed")
    extractor = FeatureExtractor(config, models["base"].base)
    cache = SampleCache(config, extractor, [image.caption for image in reference_images])
    real = measure_real_images(cache, reference_images, training_images)
    sampled = cache.sample_all(sampling_jobs(models, config.evaluate))

    result = {"weights": run.weights} | scores(models, sampled, real, cache)
    findings = check_image_count(result, real)
    result["findings"] = [vars(finding) for finding in findings]
    write_json(run.evaluation, result)
    replace_findings(run, result["findings"])
    save_cells(run, models, sampled, cache)
    if "run" in models:
        save_nearest(run, models["run"], sampled, real, cache, training_images)
    return result


def models_to_evaluate(run: RunDir, config: Config) -> dict[str, ModelCells]:
    """Return the untouched base, and the trained run where there is one, with their cells."""
    models = {"base": ModelCells(for_sampling(run_base(run, config)), cells_of(config.sample, 1))}
    if config.finetune != "none":
        cells = cells_of(config.sample, config.loss.own_guidance)
        models["run"] = ModelCells(trained_base(run, config), cells)
    return models


def measure_real_images(
    cache: SampleCache, reference: list[CaptionedImage], training: list[CaptionedImage]
) -> RealImages:
    """Measure the real images; the floor uses as many as there are samples, reference and training images."""
    options = cache.config.evaluate
    own = cache.measure_real(REFERENCE, reference)
    count = min(options.samples, len(reference), len(training))
    units = cache.measure_real(UNITS, training[: max(count, UNIT_IMAGES)])
    return RealImages(
        reference=ReferenceSet(own["features"], units["features"] if options.features == "style" else None),
        layout=ReferenceSet(own["layout"], units["layout"]),
        own=own,
        floor={name: rows[:count] for name, rows in units.items()},
        training=cache.thumbnails("reading all training images", training),
    )


def sampling_jobs(models: dict[str, ModelCells], options: EvaluateConfig) -> list[Job]:
    """Return the jobs for every cell of every model, then for the guidance scan of every model."""
    jobs = [
        Job(name, model.base, cell, options.samples) for name, model in models.items() for cell in model.cells
    ]
    scan = scan_cells(options)
    jobs += [
        Job(name, model.base, cell, options.scan_samples) for name, model in models.items() for cell in scan
    ]
    return jobs


def scan_cells(options: EvaluateConfig) -> list[Cell]:
    """Return the cells of the guidance scan: DDIM at each scale, once."""
    return list(dict.fromkeys(Cell("ddim", scale) for scale in options.scales))


def scores(
    models: dict[str, ModelCells], sampled: Sampled, real: RealImages, cache: SampleCache
) -> dict[str, Any]:
    """Return how it was measured, and all scores.

    The scores are those of real images, of every model in its cells and of the guidance scan.
    """
    config, options = cache.config, cache.config.evaluate
    return {
        "features": options.features,
        "reference_images": len(real.own["features"]),
        "samples": options.samples,
        "scan_samples": options.scan_samples,
        "num_inference_steps": config.sample.num_inference_steps,
        "sampler_steps": options.sampler_steps,
        "training_guidance": config.loss.own_guidance,
        "cache_dir": config.cache_dir,
        "reference_file": cache.files[REFERENCE],
        "units_file": cache.files[UNITS],
        "floor_images": len(real.floor["features"]),
        "real": set_scores(real.floor, real, drawn=False),
        "models": {
            name: cell_scores(name, model.cells, sampled, real, cache) for name, model in models.items()
        },
        "scan": {
            name: {
                f"{cell.guidance:g}": kernel_pair(sampled[name, cell, options.scan_samples], real)
                for cell in scan_cells(options)
            }
            for name in models
        },
    }


def steps_text(result: dict[str, Any]) -> str:
    """Say in how many steps the samples of an evaluation.json were drawn: `30 steps (DPM++ 2M: 15)`."""
    others = result.get("sampler_steps") or {}
    own = ", ".join(f"{sampler_label(name)}: {steps}" for name, steps in others.items())
    return f"{result.get('num_inference_steps')} steps" + (f" ({own})" if own else "")


def cell_scores(
    name: str, cells: list[Cell], sampled: Sampled, real: RealImages, cache: SampleCache
) -> list[dict[str, Any]]:
    """Score one model in each cell, with the paired difference to the base in the same cell."""
    samples, rows = cache.config.evaluate.samples, []
    for cell in cells:
        ours, base = sampled[name, cell, samples], sampled.get(("base", cell, samples))
        row = asdict(cell) | set_scores(ours, real) | {"copying": copying_ratio(ours, real)}
        nearest = [real.training.distances(rows["thumbnails"]) for rows in (ours, real.own)]
        row["copies"] = copies_among(*nearest)
        if name != "base" and base is not None:
            row["kernel_minus_base"] = as_pair(real.reference.difference(ours["features"], base["features"]))
        rows.append(row | {"file": cache.files[name, cell, samples]})
    return rows


def set_scores(rows: Measurements, real: RealImages, *, drawn: bool = True) -> dict[str, Any]:
    """Score one set of images; kernel, layout and caption_fit are (value, standard error).

    Args:
        drawn: the images were drawn from the reference's captions, so errors are by caption.
    """
    features, reference = rows["features"], real.reference
    groups = reference.captions_of(len(features)) if drawn else None
    precision, recall = precision_recall(reference.scaled(features), reference.scaled(reference.own))
    return {
        "kernel": as_pair(reference.kernel(features, drawn=drawn)),
        "layout": as_pair(real.layout.kernel(rows["layout"], drawn=drawn)),
        "frechet": reference.frechet(features),
        "caption_fit": as_pair(mean_of(rows["caption_fit"], groups)) if "caption_fit" in rows else None,
        "precision": precision,
        "recall": recall,
    }


def kernel_pair(rows: Measurements, real: RealImages) -> tuple[float, float]:
    """Return (kernel distance to real images, standard error)."""
    return as_pair(real.reference.kernel(rows["features"]))


def as_pair(estimate: Estimate) -> tuple[float, float]:
    """Return (value, standard error), for JSON."""
    return estimate.value, estimate.standard_error


def copying_ratio(rows: Measurements, real: RealImages) -> float:
    """Measure how near samples come to training images: 1 is as near as unseen real images, 0 is copies.

    The median distance of thumbnails to their nearest training image, divided by that of the reference.
    """
    ours, unseen = (
        torch.cdist(part["thumbnails"], real.training.whole).min(1).values.median()
        for part in (rows, real.own)
    )
    return (ours / unseen).item()


def nearest_copies(rows: Measurements, real: RealImages) -> list[tuple[int, int, float]]:
    """Find the samples nearest to a training image: (sample, training image, distance), nearest first.

    The distance is that of thumbnails, mirrored and in parts too, divided by the median distance of unseen
    real images.
    """
    unseen = real.training.distances(real.own["thumbnails"]).median()
    distances, images = real.training.nearest(rows["thumbnails"])
    first = distances.argsort()[:NEAREST_SAMPLES]
    return [(int(i), int(images[i]), (distances[i] / unseen).item()) for i in first]


def check_image_count(result: dict[str, Any], real: RealImages) -> list[diagnosis.Finding]:
    """Return the doctor's finding if the Frechet distances were computed from too few images."""
    images = min(result["samples"], result["reference_images"])
    return diagnosis.few_images(images, real.own["features"].shape[1], result["real"]["frechet"])


def replace_findings(run: RunDir, found: list[dict[str, str]]) -> None:
    """Add findings to those of the training in status.json, replacing those of an earlier evaluation."""
    noted = run.status.read().get("findings", [])
    run.status.update(findings=[*(finding for finding in noted if finding["name"] != "few images"), *found])


def save_cells(run: RunDir, models: dict[str, ModelCells], sampled: Sampled, cache: SampleCache) -> None:
    """Write evaluation.png: the first prompts in every cell, base above, run below; white if not sampled."""
    samples = cache.config.evaluate.samples
    kept = {
        (name, cell): sampled[name, cell, samples]["kept"]
        for name, model in models.items()
        for cell in model.cells
    }
    every = list(dict.fromkeys(cell for model in reversed(models.values()) for cell in model.cells))
    few = min(4, len(cache.captions), *(len(images) for images in kept.values()))
    empty = torch.ones_like(next(iter(kept.values()))[:few], dtype=torch.float32)

    def tiles(name: str) -> list[torch.Tensor]:
        return [kept[name, cell][:few] / 255 if (name, cell) in kept else empty for cell in every]

    rows = [(name, torch.stack(tiles(name), dim=1)) for name in models]
    title = f"evaluation of {run.path.name}\nsame start noise in a row"
    grid = compose_grid(rows, cache.captions[:few], [cell.label for cell in every], title)
    write_atomically(run.evaluation_images, lambda file: grid.save(file, "PNG"))


def save_nearest(
    run: RunDir,
    model: ModelCells,
    sampled: Sampled,
    real: RealImages,
    cache: SampleCache,
    training: list[CaptionedImage],
) -> None:
    """Write evaluation_nearest.png: the samples nearest to a training image, each above that image.

    Of the last cell, at the run's own scale.
    """
    cell = model.cells[-1]
    found = nearest_copies(sampled["run", cell, cache.config.evaluate.samples], real)
    drawn = cache.draw(model.base, cell, [sample for sample, _, _ in found])
    originals = torch.stack([read_unit_image(training[image].path, cache.config) for _, image, _ in found])
    rows = [("sample", drawn[None]), ("nearest\ntraining\nimage", originals[None])]
    title = "copies? The samples that come nearest to a training image\n1 = as near as an unseen image is"
    grid = compose_grid(rows, [""], [f"{distance:.2f}" for _, _, distance in found], title)
    write_atomically(run.evaluation_nearest, lambda file: grid.save(file, "PNG"))
