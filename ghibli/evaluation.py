"""The slides' table: a run and its base sampled in every cell, and how far that is from real pictures.

All models draw the same prompts from the same start noise, so they compare in pairs. Every sampled
cell is kept in cache_dir/evaluation under what it depends on: an evaluation that was killed goes on
there, and the base's cells serve all its runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ghibli import doctor
from ghibli.base_model import BaseModel, weights_hash
from ghibli.captions import CaptionedPicture, open_picture, read_folder
from ghibli.data import draw_missing, first_by_content, split_by_content
from ghibli.latents import preprocess
from ghibli.metrics import mean_of, precision_recall
from ghibli.progress import counted
from ghibli.run_dir import RunDir, is_whole, write_atomically, write_json, write_sealed
from ghibli.sampling import Cell, cells_of, compose_grid, sample
from ghibli.scenes import EVALUATION_SEEDS
from ghibli.schema import Config
from ghibli.trained import starting_base, trained_base
from ghibli.validation import Estimate
from ghibli.yardstick import Reference, Yardstick

VERSION = 1  # to be raised when sampling or measuring changes
KEPT = 8  # pictures of a cell that are kept to look at
CHANGEABLE = ("evaluate", "sample", "data.reference", "model.clip", "cache_dir")
THUMBNAIL = 16  # px; copies of training pictures are looked for at this size

Measurements = dict[str, torch.Tensor]  # features (N, D), thumbnails (N, 768), kept; caption_fit (N,)


class Job(NamedTuple):
    """One cell of one model, sampled `count` times."""

    model: str
    base: BaseModel
    cell: Cell
    count: int


class Real(NamedTuple):
    """The real pictures, measured."""

    reference: Reference  # what samples are compared with
    own: Measurements  # of the reference
    training: Measurements  # what samples might be copies of


def evaluate(run: RunDir, config: Config) -> dict[str, Any]:
    """Samples and measures a run and its base; writes evaluation.json and evaluation.png into its folder.

    Args:
        config: the run's own, but for what CHANGEABLE names.

    Raises:
        UserMistake: a base, picture set or feature network that is not at hand.
    """
    options = config.evaluate
    bases = {"base": starting_base(config)}
    cells = {"base": cells_of(config.sample, 1)}
    if config.finetune != "none":
        bases["run"] = trained_base(run, config)
        cells["run"] = cells_of(config.sample, config.loss.guidance)
    reference_pictures, training_pictures = real_pictures(config)
    bench = Bench(config, Yardstick(config, bases["base"]), [p.caption for p in reference_pictures])
    own = bench.measure_real("measuring the reference", reference_pictures)
    training = bench.measure_real("measuring the training pictures", training_pictures[: options.samples])
    real = Real(Reference(own["features"], options.features == "style"), own, training)
    scan = [Cell("ddim", scale) for scale in options.scales]
    jobs = [Job(name, base, cell, options.samples) for name, base in bases.items() for cell in cells[name]]
    jobs += [Job(name, base, cell, options.scan_samples) for name, base in bases.items() for cell in scan]
    sampled = bench.sample_all(jobs)
    of_cells = {key[:2]: rows for key, rows in sampled.items() if key[2] == options.samples}
    result = {
        "features": options.features, "reference_pictures": len(reference_pictures),
        "samples": options.samples, "scan_samples": options.scan_samples,
        "num_inference_steps": config.sample.num_inference_steps, "training_guidance": config.loss.guidance,
        "real": numbers(training, real.reference),
        "models": {name: table_of(name, cells[name], of_cells, real) for name in bases},
        "scan": {
            name: {
                f"{cell.guidance:g}": pair(
                    real.reference.kernel(sampled[name, cell, options.scan_samples]["features"])
                )
                for cell in scan
            }
            for name in bases
        },
    }  # fmt: skip
    least = min(options.samples, len(reference_pictures))
    found = doctor.few_pictures(least, own["features"].shape[1], result["real"]["frechet"])
    result["findings"] = [vars(finding) for finding in found]
    write_json(run.evaluation, result)
    save_pictures(run, {key: rows["kept"] for key, rows in of_cells.items()}, bench.captions, cells)
    return result


def real_pictures(config: Config) -> tuple[list[CaptionedPicture], list[CaptionedPicture]]:
    """(reference, training pictures), each in an order that follows from their content alone.

    The reference is the folder data.reference, drawn first where it is to be drawn, else the held-out
    pictures. No training has seen either.
    """
    data = config.data
    options = {"style": data.style, "default_caption": data.caption, "min_side": data.min_side}
    draw_missing(data.root, data.draw, config.cache_dir)
    with counted("checking the pictures") as on_progress:
        found = read_folder(Path(data.root), on_progress=on_progress, **options).pictures
    training, held_out = split_by_content(found, data.val_fraction)
    if data.reference is not None:
        draw_missing(data.reference, data.reference_draw, config.cache_dir, EVALUATION_SEEDS)
        with counted("checking the reference") as on_progress:
            held_out = read_folder(Path(data.reference), on_progress=on_progress, **options).pictures
    return first_by_content(held_out, len(held_out)), first_by_content(training, len(training))


class Bench:
    """Measures real pictures and sampled cells, each once.

    Args:
        captions: what is drawn, again and again with other start noise where samples outnumber them.
    """

    def __init__(self, config: Config, yardstick: Yardstick, captions: list[str]):
        self.config, self.yardstick, self.captions = config, yardstick, captions
        self.folder = Path(config.cache_dir) / "evaluation"
        self.common = {
            "version": VERSION, "torch": torch.__version__, "features": config.evaluate.features,
            "inception": config.evaluate.inception, "clip": config.model.clip,
            "resolution": config.model.resolution, "vae": weights_hash(yardstick.base),
        }  # fmt: skip

    def measure_real(self, label: str, pictures: list[CaptionedPicture]) -> Measurements:
        """Measures picture files."""
        size = self.config.model.resolution, self.config.data.resize
        step = self.config.evaluate.batch_size

        def chunks() -> Iterable[tuple[torch.Tensor, list[str]]]:
            with counted(label) as on_progress:
                for start in range(0, len(pictures), step):
                    part = pictures[start : start + step]
                    values = [preprocess(open_picture(p.path), *size) / 2 + 0.5 for p in part]
                    yield torch.stack(values), [p.caption for p in part]
                    on_progress(start + len(part), len(pictures))

        key = {"pictures": [(p.content_hash, p.caption) for p in pictures], "resize": size[1]}
        return self._cached(key, lambda: self._measure(chunks()))

    def sample_all(self, jobs: list[Job]) -> dict[tuple[str, Cell, int], Measurements]:
        """Samples and measures every job that is not in the cache, with the time left for all."""
        steps = self.config.sample.num_inference_steps
        work = [self._passes(job) * steps for job in jobs]
        hashes = {id(base): weights_hash(base) for base in {id(job.base): job.base for job in jobs}.values()}
        results = {}
        with counted("sampling") as on_progress:
            for index, job in enumerate(jobs):
                done = [sum(work[:index])]

                def chunks(
                    job: Job = job, done: list[int] = done
                ) -> Iterable[tuple[torch.Tensor, list[str]]]:
                    def on_step() -> None:
                        done[0] += 1 if job.cell.guidance == 1 else 2
                        on_progress(done[0], sum(work))

                    return self._sampled(job, on_step)

                key = {"weights": hashes[id(job.base)], "cell": asdict(job.cell), "steps": steps}
                key["prompts"] = self._prompts(job.count)
                measured = self._cached(key, lambda chunks=chunks: self._measure(chunks()))
                results[job.model, job.cell, job.count] = measured
                on_progress(sum(work[: index + 1]), sum(work))
        return results

    def _passes(self, job: Job) -> int:
        batches = -(-job.count // self.config.evaluate.batch_size)
        return batches if job.cell.guidance == 1 else 2 * batches

    def _prompts(self, count: int) -> list[str]:
        return [self.captions[i % len(self.captions)] for i in range(count)]

    def _sampled(self, job: Job, on_step: Callable[[], None]) -> Iterable[tuple[torch.Tensor, list[str]]]:
        prompts, step = self._prompts(job.count), self.config.evaluate.batch_size
        for start in range(0, job.count, step):
            part = prompts[start : start + step]
            yield (
                sample(
                    job.base, part, job.cell, seeds=[start + i for i in range(len(part))],
                    num_inference_steps=self.config.sample.num_inference_steps,
                    resolution=self.config.model.resolution, on_step=on_step,
                ),
                part,
            )  # fmt: skip

    def _measure(self, chunks: Iterable[tuple[torch.Tensor, list[str]]]) -> Measurements:
        parts: dict[str, list[torch.Tensor]] = {}
        for pictures, captions in chunks:
            measured = self.yardstick.measure(pictures, captions)
            measured["thumbnails"] = torch.nn.functional.adaptive_avg_pool2d(pictures, THUMBNAIL).flatten(1)
            measured["kept"] = (pictures * 255).round().to(torch.uint8)
            for name, values in measured.items():
                parts.setdefault(name, []).append(values)
            parts["kept"] = [torch.cat(parts["kept"])[:KEPT]]
        return {name: torch.cat(values) for name, values in parts.items()}

    def _cached(self, key: dict[str, Any], make: Callable[[], Measurements]) -> Measurements:
        """The measurements under this key, made and kept when they are not there or damaged."""
        text = json.dumps(self.common | key, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pt"
        if is_whole(file):
            return torch.load(file, weights_only=True)
        measured = make()
        write_sealed(file, lambda opened: torch.save(measured, opened))
        return measured


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


def numbers(rows: Measurements, reference: Reference) -> dict[str, Any]:
    """What one set of pictures scores; kernel and caption_fit are (value, standard error)."""
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
    """How near samples come to the training pictures: 1 = as near as unseen real pictures, 0 = copies.

    The median distance of thumbnails to their nearest training picture, over that of the reference.
    """
    training = real.training["thumbnails"]
    ours, unseen = (
        torch.cdist(part["thumbnails"], training).min(1).values.median() for part in (rows, real.own)
    )
    return (ours / unseen).item()


def pair(estimate: Estimate) -> tuple[float, float]:
    """(value, standard error), for JSON."""
    return estimate.value, estimate.standard_error


def save_pictures(
    run: RunDir, kept: dict[tuple[str, Cell], torch.Tensor], prompts: list[str], cells: dict[str, list[Cell]]
) -> None:
    """evaluation.png: the first prompts in every cell that all models have, base above, run below."""
    shared = [cell for cell in cells["base"] if all(cell in own for own in cells.values())]
    few = min(4, len(prompts), *(len(pictures) for pictures in kept.values()))
    rows = [(name, torch.stack([kept[name, c][:few] / 255 for c in shared], dim=1)) for name in cells]
    title = f"evaluation of {run.path.name}\nsame start noise in a row"
    grid = compose_grid(rows, prompts[:few], shared, title)
    write_atomically(run.evaluation_pictures, lambda file: grid.save(file, "PNG"))
