"""Randomness as pure functions: every random number is determined by (purpose, seed, example number).

No generator state is read or kept, so a resumed run needs none, and batch size, loader workers and the
number of devices change no example's noise, timestep, flip or caption.
Examples are numbered over the whole run: epoch * examples_per_epoch + position in the epoch.
"""

from enum import IntEnum

import numpy as np
import torch

GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, made odd: step of the timestep sequence
POINTS = 2**64  # points of 0 .. 1, of which the example numbers take one each


class Stream(IntEnum):
    """Purpose of a random number. The values are part of every result: never renumber them."""

    ORDER = 0
    NOISE = 1
    POSTERIOR = 2
    FLIP = 3
    CAPTION = 4
    OFFSET = 5
    TIMESTEP = 6
    ADAPTER_INIT = 7
    DROPOUT = 8
    PROBE = 9
    REGULARIZATION = 10


def rng(stream: Stream, *key: int) -> np.random.Generator:
    """Create a generator for one purpose and key (seed, example number, ...; each >= 0)."""
    return np.random.default_rng([int(stream), *key])


def normal(shape: tuple[int, ...], stream: Stream, *key: int) -> torch.Tensor:
    """Draw standard normal float32 numbers of the given shape for this purpose and key."""
    return torch.from_numpy(rng(stream, *key).standard_normal(shape, dtype=np.float32))


def chance(probability: float, stream: Stream, *key: int) -> bool:
    """Return True with the given probability, 0 .. 1, for this purpose and key."""
    return bool(rng(stream, *key).random() < probability)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `count` images in an epoch: a permutation of 0 .. count-1, shape (count,)."""
    return rng(Stream.ORDER, seed, epoch).permutation(count)


def timestep(example: int, num_train_timesteps: int, seed: int) -> int:
    """Return the timestep of an example number: 0 .. num_train_timesteps-1.

    A Kronecker sequence with the golden ratio, shifted by the seed: uniform over all examples, and any
    few consecutive examples are spread evenly (Niederreiter 1992, section 3.1). Computed in 64-bit
    integers, so it is the same on every machine.
    """
    return spread_point(example, seed) * num_train_timesteps >> 64


def spread_point(example: int, seed: int) -> int:
    """Return the point 0 .. POINTS-1 of an example number, from which `timestep` is made."""
    shift = int(rng(Stream.TIMESTEP, seed).integers(POINTS, dtype=np.uint64))
    return (example * GOLDEN_RATIO + shift) % POINTS


def independent_timestep(example: int, num_train_timesteps: int, seed: int) -> int:
    """Draw the timestep of an example number independently of all others: 0 .. num_train_timesteps-1.

    Most trainers do this; the mean loss of an epoch then fluctuates far more.
    """
    return int(rng(Stream.TIMESTEP, seed, example).integers(num_train_timesteps))


def independent_point(example: int, seed: int) -> int:
    """Draw a point 0 .. POINTS-1 for an example number, independently of all others."""
    return int(rng(Stream.TIMESTEP, seed, example).integers(POINTS, dtype=np.uint64))


def seed_global_rng(stream: Stream, *key: int) -> None:
    """Seed torch's global generators from the key, for code that reads only those: dropout, initial A."""
    torch.manual_seed(int(rng(stream, *key).integers(2**63)))


def content_key(content_hash: str) -> int:
    """Convert an image's hex sha256 to an integer key for `rng`."""
    return int(content_hash, 16)


def hash_fraction(content_hash: str) -> float:
    """Map an image's hex sha256 to a number in 0 .. 1 that does not depend on the other images."""
    return int(content_hash[:13], 16) / 16**13
