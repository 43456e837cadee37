"""Batches made ahead are those of the plain loader, and made while the consumer is busy."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from ghibli.data.ahead import AHEAD, AheadLoader, made_ahead


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.tensor(number**2)


def test_the_same_batches_as_without_a_thread() -> None:
    plain, ahead = DataLoader(Squares(), 3), AheadLoader(Squares(), 3)
    torch.manual_seed(0)
    wanted, state = [batch.tolist() for batch in plain], torch.get_rng_state()
    torch.manual_seed(0)
    assert [batch.tolist() for batch in ahead] == wanted
    assert torch.equal(torch.get_rng_state(), state)  # which dropout reads
    assert [batch.tolist() for batch in ahead] == wanted and len(ahead) == len(plain)


def test_they_are_made_while_the_consumer_is_busy() -> None:
    made: list[tuple[int, str]] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            made.append((number, threading.current_thread().name))
            yield number

    batches = made_ahead(numbers())
    assert next(batches) == 0
    ends = time.monotonic() + 10
    while len(made) < 1 + AHEAD and time.monotonic() < ends:
        time.sleep(0.001)  # stands in for the device's step
    assert [number for number, _ in made] == list(range(1 + AHEAD))  # and no more
    assert all(thread.startswith("batches") for _, thread in made)
    assert list(batches) == [1, 2, 3, 4]


def test_an_error_comes_where_its_batch_would_be() -> None:
    def broken() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("the third")

    batches = made_ahead(broken())
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(batches)


def test_leaving_early_ends_the_thread() -> None:
    batches = made_ahead(iter(range(100)))
    assert next(batches) == 0
    batches.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
