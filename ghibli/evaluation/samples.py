"""Sample images and measure them and real ones: features, thumbnails and caption fit, kept in the cache."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ghibli.config.schema import Config
from ghibli.data.folder import CaptionedImage
from ghibli.diffusion.samplers import Cell, sample, steps_key
from ghibli.evaluation.copies import CROPS, TrainingThumbnails, crops_of, thumbnails_of
from ghibli.evaluation.features import FeatureExtractor
from ghibli.images.read import READING, open_image
from ghibli.images.resize import preprocess
from ghibli.models.base import BaseModel, results_key, weights_hash
from ghibli.runtime.cache import cached, file_of
from ghibli.runtime.console import counted

VERSION = 4  # part of the cache keys; raise it when sampling or measuring changes
KEPT_IMAGES = 8  # images of each cell that are kept to look at

# features (N, D), layout (N, D'), thumbnails (N, 768), caption_fit (N,) with a CLIP, and kept
# (<= KEPT_IMAGES, 3, H, W) uint8
Measurements = dict[str, torch.Tensor]
Result = TypeVar("Result")


def two_at_a_time(tasks: Iterable[Callable[[], Result]], device: torch.device) -> Iterator[Result]:
    """Yield what the tasks return, in order, running two at a time; one at a time on a GPU or a single core.

    torch releases Python's lock in its operations, so two threads with half the cores each keep all cores
    busy: a third more images per second with the demo's UNet, whose operations are short. The result of a
    task depends on the number of threads only by rounding.

    Args:
        device: where the tasks compute.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for task in tasks:
            yield task()
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads // 2,))
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2:  # results are large: hold no more of them than needed
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Job:
    """One cell of one model, sampled `count` times."""

    model: str
    base: BaseModel
    cell: Cell
    count: int

    @property
    def name(self) -> tuple[str, Cell, int]:
        """Its key among the results."""
        return self.model, self.cell, self.count

    def covering(self, jobs: list["Job"]) -> "Job":
        """Return the first of these jobs, itself among them, whose images start with all of this one's."""
        return next(job for job in jobs if job.name[:2] == self.name[:2] and job.count >= self.count)


class SampleCache:
    """Measures real images and sampled cells, each once, and keeps the measurements on disk.

    Args:
        captions: the prompts; if there are more samples than captions, they repeat with new start noise.
    """

    def __init__(self, config: Config, extractor: FeatureExtractor, captions: list[str]):
        self.config, self.extractor, self.captions = config, extractor, captions
        self.folder = Path(config.cache_dir) / "evaluation"
        self.common = {"version": VERSION, "resolution": config.model.resolution} | extractor.hashes
        self.files: dict[Any, str] = {}  # label or Job.name -> the name of the file with its measurements

    def measure_real(self, label: str, images: list[CaptionedImage]) -> Measurements:
        """Measure image files.

        Args:
            label: names the progress bar and, in `files`, the cache file.
        """
        step = self.config.evaluate.batch_size

        def parts() -> Iterable[Measurements]:
            with counted(label) as on_progress:
                for start in range(0, len(images), step):
                    part = images[start : start + step]
                    values = [read_unit_image(image.path, self.config) for image in part]
                    yield self._measure_batch(torch.stack(values), [image.caption for image in part])
                    on_progress(start + len(part), len(images))

        key = {
            "images": [(image.content_hash, image.caption) for image in images],
            "resize": self.config.data.square_resize,
            "reading": READING,
        }
        return self._cached(label, key, lambda: concatenated(parts()))

    def thumbnails(self, label: str, images: list[CaptionedImage]) -> TrainingThumbnails:
        """Return thumbnails of image files and of their parts, without the features."""

        def make() -> dict[str, torch.Tensor]:
            with counted(label) as on_progress:
                rows, crops = [], []
                for image in images:
                    read = read_unit_image(image.path, self.config)
                    rows.append(thumbnails_of(read[None]))
                    crops.append(crops_of(read))
                    on_progress(len(rows), len(images))
            return {"thumbnails": torch.cat(rows), "crops": torch.stack(crops)}

        key = {
            "thumbnails": [image.content_hash for image in images],
            "resize": self.config.data.square_resize, "crops": CROPS,
        }  # fmt: skip
        found = self._cached(label, key, make)
        return TrainingThumbnails(found["thumbnails"], found["crops"])

    def sample_all(self, jobs: list[Job]) -> dict[tuple[str, Cell, int], Measurements]:
        """Sample and measure every job that is not in the cache, under one progress bar.

        A job whose images are the first ones of another job is not sampled again.
        """
        covering = {job.name: job.covering(jobs) for job in jobs}
        sampled = self._sample_each([job for job in jobs if covering[job.name] is job])
        return {
            name: {what: rows[: name[2]] for what, rows in sampled[larger.name].items()}
            for name, larger in covering.items()
        }

    def _sample_each(self, jobs: list[Job]) -> dict[tuple[str, Cell, int], Measurements]:
        work = [self._passes(job) * self.steps_of(job.cell) for job in jobs]
        bases = {id(job.base): job.base for job in jobs}
        hashes = {known: results_key(weights_hash(base), base) for known, base in bases.items()}
        results = {}
        with counted("sampling") as on_progress:
            for index, job in enumerate(jobs):
                done = [sum(work[:index])]

                def measure(job: Job = job, done: list[int] = done) -> Measurements:
                    def on_step() -> None:
                        done[0] += 1 if job.cell.guidance == 1 else 2
                        on_progress(done[0], sum(work))

                    return concatenated(self._sample_batches(job, on_step))

                key: dict[str, Any] = {"weights": hashes[id(job.base)], "cell": asdict(job.cell)}
                key["steps"] = steps_key(job.base, self.steps_of(job.cell))
                key["prompts"] = self._prompts(job.count)
                key["seed"] = self.config.sample.seed
                results[job.name] = self._cached(job.name, key, measure)
                on_progress(sum(work[: index + 1]), sum(work))
        return results

    def measure_model(self, base: BaseModel, cell: Cell, count: int) -> Measurements:
        """Sample and measure a model as it is now, without the cache."""
        job = Job("", base, cell, count)
        passes, done = self._passes(job) * self.steps_of(cell), [0]
        with counted(f"drawing {count} images to measure") as on_progress:

            def on_step() -> None:
                done[0] += 1 if cell.guidance == 1 else 2
                on_progress(done[0], passes)

            return concatenated(self._sample_batches(job, on_step))

    def draw(self, base: BaseModel, cell: Cell, indices: list[int]) -> torch.Tensor:
        """Sample single images of a cell again, (len(indices), 3, H, W) in 0 .. 1; equal up to rounding."""
        prompts = self._prompts(max(indices) + 1)
        return sample(
            base, [prompts[index] for index in indices], cell,
            seeds=[self.config.sample.seed + index for index in indices],
            num_inference_steps=self.steps_of(cell),
            resolution=self.config.model.resolution,
        )  # fmt: skip

    def steps_of(self, cell: Cell) -> int:
        """Return the denoising steps of a cell's images."""
        steps = self.config.evaluate.sampler_steps or {}
        return steps.get(cell.sampler, self.config.sample.num_inference_steps)

    def _passes(self, job: Job) -> int:
        batches = -(-job.count // self.config.evaluate.batch_size)
        return batches if job.cell.guidance == 1 else 2 * batches

    def _prompts(self, count: int) -> list[str]:
        return [self.captions[i % len(self.captions)] for i in range(count)]

    def _sample_batches(self, job: Job, on_step: Callable[[], None]) -> Iterable[Measurements]:
        prompts, step = self._prompts(job.count), self.config.evaluate.batch_size

        def sample_and_measure(start: int) -> Measurements:
            part = prompts[start : start + step]
            images = sample(
                job.base, part, job.cell,
                seeds=[self.config.sample.seed + start + i for i in range(len(part))],
                num_inference_steps=self.steps_of(job.cell),
                resolution=self.config.model.resolution, on_step=on_step,
            )  # fmt: skip
            return self._measure_batch(images, part)

        batches = [partial(sample_and_measure, start) for start in range(0, job.count, step)]
        yield from two_at_a_time(batches, next(job.base.unet.parameters()).device)

    def _measure_batch(self, images: torch.Tensor, captions: list[str]) -> Measurements:
        """Measure images (N, 3, H, W) in 0 .. 1."""
        return self.extractor.measure(images, captions) | {
            "thumbnails": thumbnails_of(images),
            "kept": (images * 255).round().to(torch.uint8),
        }

    def _cached(self, what: Any, key: dict[str, Any], make: Callable[[], Measurements]) -> Measurements:
        """Return the measurements under this key, made and stored if they are missing or damaged."""
        self.files[what] = file_of(self.folder, self.common | key).name
        return cached(self.folder, self.common | key, make)


def read_unit_image(path: Path, config: Config) -> torch.Tensor:
    """Read an image file as training does, but in 0 .. 1: (3, H, W) float32."""
    pixel_values = preprocess(open_image(path), config.model.resolution, config.data.square_resize)
    return pixel_values / 2 + 0.5


def concatenated(parts: Iterable[Measurements]) -> Measurements:
    """Concatenate the rows of all parts in order; of `kept`, only the first KEPT_IMAGES."""
    rows: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, values in part.items():
            rows.setdefault(name, []).append(values)
        rows["kept"] = [torch.cat(rows["kept"])[:KEPT_IMAGES]]
    return {name: torch.cat(values) for name, values in rows.items()}
