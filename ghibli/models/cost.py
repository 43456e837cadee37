"""What a step takes of memory, measured on the model itself at a small size."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # has no public name yet (torch 2.14)

FRAGMENTS = 1.35  # bytes of a process for each byte of live tensors: fragmentation, libraries' buffers


class Live(TorchDispatchMode):
    """Count the bytes of the tensors that operations allocate inside it, until they are freed.

    Tensors that were there before count nothing, and views of one storage count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0  # bytes
        self._known: dict[int, weakref.ref] = {}  # id of a live storage -> reference to it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), counted=False)  # weights, and whatever else was there before
        result = func(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, values: Any, counted: bool) -> None:
        for tensor in tensors_in(values):
            if id(tensor.untyped_storage()) not in self._known:
                self._add(tensor.untyped_storage(), counted)

    def _add(self, storage: torch.UntypedStorage, counted: bool) -> None:
        key, size = id(storage), storage.nbytes() if counted else 0

        def on_freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, on_freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def tensors_in(values: Any) -> Iterable[torch.Tensor]:
    """Iterate over the tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)


@dataclass(frozen=True)
class Cost:
    """Bytes of one step: for each example, and for each px of its image."""

    example: float
    pixel: float

    def at(self, side: int, batch: int) -> float:
        """Return the bytes of a step on `batch` square images of `side` px."""
        return batch * (self.example + self.pixel * side**2)


def measure_cost(step: Callable[[int, int], Any], side: int) -> Cost:
    """Return the cost of step(height, width), which processes one example, from its peak at two small sizes.

    Every layer's tensors grow with the batch, and with the image's area or not at all: attention
    is computed in blocks and keeps no table of all pairs.
    """

    def bytes_of(height: int, width: int) -> int:
        with Live() as live:
            kept = step(height, width)
        del kept
        return live.peak

    one, two = bytes_of(side, side), bytes_of(side, 2 * side)
    return Cost(2 * one - two, (two - one) / side**2)
