"""Independent tasks on a CPU: two at a time, each with half the cores. Small networks leave cores waiting."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def two_at_a_time(tasks: Iterable[Callable[[], Result]], device: torch.device) -> Iterator[Result]:
    """What the tasks return, in their order; one after the other on a GPU or a single core.

    torch's operations release Python's lock, so two threads keep two halves of the cores busy: on the
    demo's UNet, whose operations are short, a third more pictures. A task's
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
