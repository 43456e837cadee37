"""Sampled and real images as rows of measurements, kept in the cache."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ghibli.config.schema import Config
from ghibli.data.folder import CaptionedImage
from ghibli.diffusion.samplers import Cell, sample
from ghibli.evaluation.features import FeatureExtractor
from ghibli.images.read import open_image
from ghibli.images.resize import preprocess
from ghibli.models.base import BaseModel, weights_hash
from ghibli.runtime.cache import cached, file_of
from ghibli.runtime.console import counted

Result = TypeVar("Result")


def two_at_a_time(tasks: Iterable[Callable[[], Result]], device: torch.device) -> Iterator[Result]:
    """What the tasks return, in their order; one after the other on a GPU or a single core.

    torch's operations release Python's lock, so two threads keep two halves of the cores busy: on the
    demo's UNet, whose operations are short, a third more images. A task's
    result depends on the number of threads by rounding, and on nothing else.

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
            if len(waiting) > 2:  # results are large: no more of them than needed
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


VERSION = 3  # to be raised when sampling or measuring changes
KEPT = 8  # images of a cell that are kept to look at
THUMBNAIL = 16  # px; copies of training images are looked for at this size

Measurements = dict[str, torch.Tensor]  # features (N, D), thumbnails (N, 768), kept; caption_fit (N,)


class Job(NamedTuple):
    """One cell of one model, sampled `count` times."""

    model: str
    base: BaseModel
    cell: Cell
    count: int

    @property
    def name(self) -> tuple[str, Cell, int]:
        """What it is called among the results."""
        return self.model, self.cell, self.count

    def whole(self, jobs: list["Job"]) -> "Job":
        """The first of these jobs, itself among them, that draws its images, and maybe more after them."""
        return next(job for job in jobs if job.name[:2] == self.name[:2] and job.count >= self.count)


class SampleCache:
    """Measures real images and sampled cells, each once.

    Args:
        captions: what is drawn, again and again with other start noise where samples outnumber them.
    """

    def __init__(self, config: Config, extractor: FeatureExtractor, captions: list[str]):
        self.config, self.extractor, self.captions = config, extractor, captions
        self.folder = Path(config.cache_dir) / "evaluation"
        self.common = {"version": VERSION, "resolution": config.model.resolution} | extractor.hashes
        self.files: dict[Any, str] = {}  # label or (model, cell, count) -> the file of its measurements

    def measure_real(self, label: str, images: list[CaptionedImage]) -> Measurements:
        """Measures image files."""
        size = self.config.model.resolution, self.config.data.square_resize
        step = self.config.evaluate.batch_size

        def parts() -> Iterable[Measurements]:
            with counted(label) as on_progress:
                for start in range(0, len(images), step):
                    part = images[start : start + step]
                    values = [preprocess(open_image(p.path), *size) / 2 + 0.5 for p in part]
                    yield self._measured(torch.stack(values), [p.caption for p in part])
                    on_progress(start + len(part), len(images))

        key = {"images": [(p.content_hash, p.caption) for p in images], "resize": size[1]}
        return self._cached(label, key, lambda: joined(parts()))

    def thumbnails(self, label: str, images: list[CaptionedImage]) -> torch.Tensor:
        """Thumbnails (N, 768) of image files, which need no network."""
        size = self.config.model.resolution, self.config.data.square_resize

        def make() -> dict[str, torch.Tensor]:
            with counted(label) as on_progress:
                rows = []
                for image in images:
                    rows.append(thumbnails_of(preprocess(open_image(image.path), *size)[None] / 2 + 0.5))
                    on_progress(len(rows), len(images))
            return {"thumbnails": torch.cat(rows)}

        key = {"thumbnails": [image.content_hash for image in images], "resize": size[1]}
        return self._cached(label, key, make)["thumbnails"]

    def sample_all(self, jobs: list[Job]) -> dict[tuple[str, Cell, int], Measurements]:
        """Samples and measures every job that is not in the cache, with the time left for all.

        A job that is the beginning of another one is not drawn again.
        """
        wholes = {job.name: job.whole(jobs) for job in jobs}
        drawn = self._sample_each([job for job in jobs if wholes[job.name] is job])
        return {
            name: {what: rows[: name[2]] for what, rows in drawn[whole.name].items()}
            for name, whole in wholes.items()
        }

    def _sample_each(self, jobs: list[Job]) -> dict[tuple[str, Cell, int], Measurements]:
        steps = self.config.sample.num_inference_steps
        work = [self._passes(job) * steps for job in jobs]
        hashes = {id(base): weights_hash(base) for base in {id(job.base): job.base for job in jobs}.values()}
        results = {}
        with counted("sampling") as on_progress:
            for index, job in enumerate(jobs):
                done = [sum(work[:index])]

                def measure(job: Job = job, done: list[int] = done) -> Measurements:
                    def on_step() -> None:
                        done[0] += 1 if job.cell.guidance == 1 else 2
                        on_progress(done[0], sum(work))

                    return joined(self._sampled(job, on_step))

                key = {"weights": hashes[id(job.base)], "cell": asdict(job.cell), "steps": steps}
                key["prompts"] = self._prompts(job.count)
                key["seed"] = self.config.sample.seed
                results[job.name] = self._cached(job.name, key, measure)
                on_progress(sum(work[: index + 1]), sum(work))
        return results

    def measure_model(self, base: BaseModel, cell: Cell, count: int) -> Measurements:
        """Samples and measures a model as it is now; nothing is kept."""
        job = Job("", base, cell, count)
        passes, done = self._passes(job) * self.config.sample.num_inference_steps, [0]
        with counted(f"drawing {count} images to measure") as on_progress:

            def on_step() -> None:
                done[0] += 1 if cell.guidance == 1 else 2
                on_progress(done[0], passes)

            return joined(self._sampled(job, on_step))

    def draw(self, base: BaseModel, cell: Cell, places: list[int]) -> torch.Tensor:
        """Single samples of a cell again, (len(places), 3, H, W); but for rounding as they were measured."""
        prompts = self._prompts(max(places) + 1)
        return sample(
            base, [prompts[place] for place in places], cell,
            seeds=[self.config.sample.seed + place for place in places],
            num_inference_steps=self.config.sample.num_inference_steps,
            resolution=self.config.model.resolution,
        )  # fmt: skip

    def _passes(self, job: Job) -> int:
        batches = -(-job.count // self.config.evaluate.batch_size)
        return batches if job.cell.guidance == 1 else 2 * batches

    def _prompts(self, count: int) -> list[str]:
        return [self.captions[i % len(self.captions)] for i in range(count)]

    def _sampled(self, job: Job, on_step: Callable[[], None]) -> Iterable[Measurements]:
        prompts, step = self._prompts(job.count), self.config.evaluate.batch_size

        def measured(start: int) -> Measurements:
            part = prompts[start : start + step]
            images = sample(
                job.base, part, job.cell,
                seeds=[self.config.sample.seed + start + i for i in range(len(part))],
                num_inference_steps=self.config.sample.num_inference_steps,
                resolution=self.config.model.resolution, on_step=on_step,
            )  # fmt: skip
            return self._measured(images, part)

        batches = [partial(measured, start) for start in range(0, job.count, step)]
        yield from two_at_a_time(batches, next(job.base.unet.parameters()).device)

    def _measured(self, images: torch.Tensor, captions: list[str]) -> Measurements:
        """A row for each image."""
        return self.extractor.measure(images, captions) | {
            "thumbnails": thumbnails_of(images),
            "kept": (images * 255).round().to(torch.uint8),
        }

    def _cached(self, what: Any, key: dict[str, Any], make: Callable[[], Measurements]) -> Measurements:
        """The measurements under this key, made and kept when they are not there or damaged."""
        self.files[what] = file_of(self.folder, self.common | key).name
        return cached(self.folder, self.common | key, make)


def joined(parts: Iterable[Measurements]) -> Measurements:
    """The rows of all parts in their order, the first KEPT images."""
    rows: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, values in part.items():
            rows.setdefault(name, []).append(values)
        rows["kept"] = [torch.cat(rows["kept"])[:KEPT]]
    return {name: torch.cat(values) for name, values in rows.items()}


def thumbnails_of(images: torch.Tensor) -> torch.Tensor:
    """Small copies (N, 768) of images (N, 3, H, W)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
