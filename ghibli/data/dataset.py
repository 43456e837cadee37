"""Training examples: a pure function of seed and running number, batched by shape, shared by devices."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ghibli.config.schema import Config
from ghibli.data.latents import Moments
from ghibli.images.resize import Size
from ghibli.runtime.seeding import Stream, chance, epoch_order, independent_timestep, normal, timestep


def batches_in(shapes: Sequence[Size], together: int) -> int:
    """Full batches of one shape each in an epoch of these images."""
    return sum(count // together for count in Counter(shapes).values())


def left_out(shapes: Sequence[Size], together: int) -> int:
    """Images whose shape has too few of them for any batch."""
    return sum(count for count in Counter(shapes).values() if count < together)


def in_batches(order: np.ndarray, shapes: Sequence[Size], together: int) -> list[int]:
    """The same order, laid so that each `together` images in a row have one shape.

    Images are dealt to their shape in turn, and a batch follows as soon as it is full; what is left
    at the end is left out. With a single shape the order stays as it is.
    """
    waiting: dict[Size, list[int]] = {}
    laid: list[int] = []
    for image in order:
        batch = waiting.setdefault(shapes[image], [])
        batch.append(int(image))
        if len(batch) == together:
            laid += batch
            batch.clear()
    return laid


class TrainExamples(Dataset):
    """Running example number -> one training example, a pure function of it and the seed."""

    def __init__(
        self,
        moments: Moments,
        mirrored: Moments | None,
        input_ids: torch.Tensor,
        empty_ids: torch.Tensor,
        names: list[str],
        config: Config,
        *,
        examples_per_epoch: int,
        num_train_timesteps: int,
        scaling_factor: float,
        shapes: list[Size] | None = None,
        together: int = 1,
    ):
        self.shapes = shapes or [(0, 0)] * len(names)  # of the images; `together` in a row have one shape
        self.together = together
        self.moments, self.mirrored = moments, mirrored
        self.input_ids, self.empty_ids, self.names = input_ids, empty_ids, names
        self.seed, self.loss = config.seed, config.loss
        self.timestep = {"spread": timestep, "independent": independent_timestep}[config.loss.timesteps]
        self.examples_per_epoch = examples_per_epoch
        self.num_train_timesteps = num_train_timesteps
        self.scaling_factor = scaling_factor
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.examples_per_epoch

    def image_of(self, example: int) -> int:
        """The index of the image shown as this running example number."""
        epoch, position = divmod(example, self.examples_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(len(self.names), self.seed, epoch)
            self._order = (epoch, in_batches(order, self.shapes, self.together))
        return self._order[1][position]

    def __getitem__(self, example: int) -> dict[str, object]:
        """latents, noise (4, h, w); timesteps (); input_ids (L,); example and name as they are."""
        image, seed = self.image_of(example), self.seed
        flipped = self.mirrored is not None and chance(0.5, Stream.FLIP, seed, example)
        moments = self.mirrored if flipped else self.moments
        shape = tuple(moments.mean[image].shape)
        noise = normal(shape, Stream.NOISE, seed, example)
        if self.loss.noise_offset > 0:
            offset = normal((shape[0], 1, 1), Stream.OFFSET, seed, example)
            noise = noise + self.loss.noise_offset * offset
        dropped = chance(self.loss.caption_dropout, Stream.CAPTION, seed, example)
        posterior_noise = normal(shape, Stream.POSTERIOR, seed, example)
        return {
            "latents": moments.sample(image, posterior_noise, self.scaling_factor),
            "noise": noise,
            "timesteps": torch.tensor(self.timestep(example, self.num_train_timesteps, seed)),
            "input_ids": self.empty_ids if dropped else self.input_ids[image],
            "example": example,
            "name": self.names[image],
        }


def collate(examples: list[dict[str, object]]) -> dict[str, object]:
    """Stacks the tensors; `example` and `name` stay lists on the CPU."""
    return {
        key: torch.stack([e[key] for e in examples])
        if isinstance(examples[0][key], torch.Tensor)
        else [e[key] for e in examples]
        for key in examples[0]
    }


class ExampleNumbers(Sampler[int]):
    """The running example numbers of one device, in order, from any optimiser step on.

    An epoch is a whole number of optimiser steps. In each forward pass the devices take
    neighbouring batches, so together they see what one device with the same global batch sees.
    """

    def __init__(self, *, batches: int, batch_size: int, rank: int, world_size: int, start_batch: int):
        self.batches, self.batch_size = batches, batch_size  # batches: forward passes in an epoch
        self.rank, self.world_size = rank, world_size
        self.first_epoch, self.first_batch = divmod(start_batch, batches)
        self.epoch = self.first_epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.first_batch if self.epoch == self.first_epoch else 0
        for batch in range(first, self.batches):
            start = ((self.epoch * self.batches + batch) * self.world_size + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)


def share_of_probe(count: int, rank: int, world_size: int) -> list[int]:
    """Which of `count` images a device scores: every world_size-th, and as many on each device.

    Laid side by side the shares are the images in their order, and behind them the first few again.
    """
    each = -(-count // world_size)
    return [index % count for index in range(rank, each * world_size, world_size)]
