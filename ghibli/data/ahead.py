"""Batches made ahead by a thread while the device computes; the same batches in the same order."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader

AHEAD = 2  # batches: one to hand over, one in the making
END: Any = object()


class AheadLoader(DataLoader):
    """A DataLoader that makes its next batches in a thread, unless it has processes that do.

    What it yields depends on the numbers of the examples alone, so it does not matter when it is made.
    """

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.num_workers > 0 else made_ahead(batches)


def made_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield what an iterator yields, and raise what it raises, but ask a thread for the next AHEAD before."""
    thread = ThreadPoolExecutor(1, "batches")
    try:
        waiting = deque(thread.submit(next, batches, END) for _ in range(AHEAD))
        while (batch := waiting.popleft().result()) is not END:
            waiting.append(thread.submit(next, batches, END))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)
