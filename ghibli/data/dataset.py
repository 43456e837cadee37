"""Training examples: pure functions of seed and running number, batched by shape, shared among devices."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ghibli.config.schema import LossConfig
from ghibli.data.latents import Moments
from ghibli.diffusion.timesteps import timestep_function
from ghibli.images.read import Size
from ghibli.runtime.errors import UserError
from ghibli.runtime.seeding import Stream, chance, epoch_order, normal, rng

SHARED_MEMORY = Path("/dev/shm")  # through which loader processes hand over tensors, on Linux
PREFETCHED = 3  # batches of one worker: two ahead, and the one in use
SPARE = 2**20  # bytes, for queues and semaphores
WORKER_TIMEOUT = 120  # seconds without a batch, after which loader processes are given up


def example_bytes(shape: Size) -> int:
    """Return the bytes of an example's tensors, most of which are latents and noise; its image is in px."""
    return 2 * 4 * 4 * (shape[0] // 8) * (shape[1] // 8) + 2**12


def check_shared_memory(workers: int, batch_bytes: int, folder: Path = SHARED_MEMORY) -> None:
    """Require room in shared memory for the batches that loader processes hand over.

    Without it the thread that sends a batch fails, unheard, and training would wait for ever.

    Args:
        batch_bytes: of one batch; every worker has PREFETCHED of them on their way.

    Raises:
        UserError: there is too little.
    """
    needed = workers * PREFETCHED * batch_bytes + SPARE
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"data.workers={workers}: loader processes need {needed / 2**20:.1f} MiB in {folder}, which has "
            f"{free / 2**20:.1f} MiB free: empty it, or set data.workers=0, which is as fast"
        )


def batches_in(shapes: Sequence[Size], together: int) -> int:
    """Return the number of full batches of `together` images of one shape in an epoch."""
    return sum(count // together for count in Counter(shapes).values())


def left_out(shapes: Sequence[Size], together: int) -> int:
    """Return the number of images whose shape is too rare to fill a batch."""
    return sum(count for count in Counter(shapes).values() if count < together)


def order_in_batches(order: np.ndarray, shapes: Sequence[Size], together: int) -> list[int]:
    """Rearrange an order of images so that every `together` in a row have one shape.

    Images are dealt to their shape in turn, and a batch follows as soon as it is full; incomplete
    batches at the end are dropped. With a single shape the order stays as it is.
    """
    waiting: dict[Size, list[int]] = {}
    rearranged: list[int] = []
    for image in order:
        batch = waiting.setdefault(shapes[image], [])
        batch.append(int(image))
        if len(batch) == together:
            rearranged += batch
            batch.clear()
    return rearranged


@dataclass(frozen=True)
class EncodedImages:
    """The N training images as the UNet sees them, in one order."""

    names: list[str]  # paths inside the image folder
    moments: Moments
    mirrored: Moments | None  # of the images flipped left to right; None = never flip
    input_ids: torch.Tensor  # (N, L) int64
    empty_ids: torch.Tensor  # (L,) int64, of the empty caption
    shapes: list[Size]  # (width, height) in px
    scaling_factor: float  # the VAE's: latents are sampled moments times this
    repeats: Sequence[int] = ()  # times that an epoch has each; empty = once
    keep_ids: torch.Tensor | None = None  # (N, L) of captions on which the base is kept (loss.keep)
    regularization: "EncodedImages | None" = None  # images of what is to be kept, all of one shape

    @property
    def rows(self) -> list[int]:
        """The images of an epoch, by their indices, unshuffled: each as often as it is repeated."""
        repeats = self.repeats or [1] * len(self.names)
        return [row for row, times in enumerate(repeats) for _ in range(times)]


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is laid out, over all devices."""

    examples: int  # in an epoch
    together: int  # examples of one forward pass on all devices, which share a shape
    num_train_timesteps: int  # T


class TrainExamples(Dataset):
    """Running example number -> one training example, a pure function of it and the seed."""

    def __init__(self, images: EncodedImages, plan: EpochPlan, loss: LossConfig, seed: int):
        self.images, self.plan, self.loss, self.seed = images, plan, loss, seed
        self.timestep = timestep_function(loss, plan.num_train_timesteps)
        self.rows = images.rows
        self.rows_beside = [] if images.regularization is None else images.regularization.rows
        self._order: tuple[int, list[int]] = (-1, [])  # (epoch, its images in order)

    def __len__(self) -> int:
        return self.plan.examples

    def image_of(self, example: int) -> int:
        """Return the index of the image behind a running example number."""
        epoch, position = divmod(example, self.plan.examples)
        if self._order[0] != epoch:
            shapes = [self.images.shapes[row] for row in self.rows]
            order = epoch_order(len(self.rows), self.seed, epoch)
            places = order_in_batches(order, shapes, self.plan.together)
            self._order = (epoch, [self.rows[place] for place in places])
        return self._order[1][position]

    def __getitem__(self, example: int) -> dict[str, Any]:
        """Return one example: latents and noise (4, h, w) float32, timesteps () and input_ids (L,) int64.

        Beside them `example`, the running number, `name`, the image's path inside the image folder, and with
        loss.keep `keep_ids` (L,), like input_ids; with data.regularization what `beside` returns.
        """
        images, image, seed = self.images, self.image_of(example), self.seed
        moments = images.moments
        if images.mirrored is not None and chance(0.5, Stream.FLIP, seed, example):
            moments = images.mirrored
        shape = tuple(moments.mean[image].shape)
        noise = normal(shape, Stream.NOISE, seed, example)
        if self.loss.noise_offset > 0:
            offset = normal((shape[0], 1, 1), Stream.OFFSET, seed, example)
            noise = noise + self.loss.noise_offset * offset
        dropped = chance(self.loss.caption_dropout, Stream.CAPTION, seed, example)
        posterior_noise = normal(shape, Stream.POSTERIOR, seed, example)
        return {
            "latents": moments.sample(image, posterior_noise, images.scaling_factor),
            "noise": noise,
            "timesteps": torch.tensor(self.timestep(example, seed)),
            "input_ids": images.empty_ids if dropped else images.input_ids[image],
            "example": example,
            "name": images.names[image],
            **({} if images.keep_ids is None else {"keep_ids": images.keep_ids[image]}),
            **({} if images.regularization is None else self.beside(images.regularization, example, dropped)),
        }

    def beside(self, images: EncodedImages, example: int, dropped: bool) -> dict[str, torch.Tensor]:
        """Return the image of data.regularization that is trained beside an example, at its timestep.

        They take turns in an order that depends on the seed, each as often as it is repeated.

        Args:
            dropped: train it without its caption.
        """
        count, seed = len(self.rows_beside), self.seed
        image = self.rows_beside[int(rng(Stream.REGULARIZATION, seed).permutation(count)[example % count])]
        shape = tuple(images.moments.mean[image].shape)
        noise, posterior_noise = (normal(shape, Stream.REGULARIZATION, seed, example, k) for k in range(2))
        if self.loss.noise_offset > 0:
            offset = normal((shape[0], 1, 1), Stream.REGULARIZATION, seed, example, 2)
            noise = noise + self.loss.noise_offset * offset
        return {
            "regularization_latents": images.moments.sample(image, posterior_noise, images.scaling_factor),
            "regularization_noise": noise,
            "regularization_ids": images.empty_ids if dropped else images.input_ids[image],
        }


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of some examples, (B, ...); `example` and `name` become lists."""
    return {
        key: torch.stack([e[key] for e in examples])
        if isinstance(examples[0][key], torch.Tensor)
        else [e[key] for e in examples]
        for key in examples[0]
    }


class ExampleNumbers(Sampler[int]):
    """The running example numbers of one device, in order, from any optimiser step on.

    An epoch is a whole number of optimiser steps. In each forward pass the devices take neighbouring
    batches, so together they see what one device with the same global batch sees.

    Args:
        batches: forward passes in an epoch.
        batch_size: examples in one forward pass of one device.
        start_batch: forward passes done before, over all epochs.
    """

    def __init__(self, *, batches: int, batch_size: int, rank: int, world_size: int, start_batch: int):
        self.batches, self.batch_size = batches, batch_size
        self.rank, self.world_size = rank, world_size
        self.first_epoch, self.first_batch = divmod(start_batch, batches)
        self.epoch = self.first_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.first_batch if self.epoch == self.first_epoch else 0
        for batch in range(first, self.batches):
            start = ((self.epoch * self.batches + batch) * self.world_size + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)


def share_of_probe(count: int, rank: int, world_size: int) -> list[int]:
    """Return which of `count` images a device scores: every world_size-th, equally many on each device.

    Interleaved, the shares are the images in their order, followed by the first few again as padding.
    """
    each = -(-count // world_size)
    return [index % count for index in range(rank, each * world_size, world_size)]
