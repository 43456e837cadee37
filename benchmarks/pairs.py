"""Compare settings in one process: every pair of steps, one with each, sees the same machine."""

import time
from collections.abc import Callable

import steps
import torch
from ratios import Ratio, ratio


def step_of(overrides: list[str], batch_size: int) -> Callable[[], None]:
    """Return a training step of `train.py OVERRIDES`: forward, backward, AdamW."""
    module = steps.make_module(overrides)
    batch = steps.make_batch(module, batch_size)
    optimizer = torch.optim.AdamW(module.trainable.values())

    def step() -> None:
        with steps.computing(overrides, module.device):
            loss = module.losses(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.synchronize()

    return step


def time_pairs(before: Callable[[], None], after: Callable[[], None], count: int) -> Ratio:
    """Call two functions in turns, the order changing; compare their times. The first calls do not count."""
    for call in (before, after):
        call()
    seconds: dict[Callable[[], None], list[float]] = {before: [], after: []}
    for number in range(count):
        for call in (before, after) if number % 2 == 0 else (after, before):
            start = time.perf_counter()
            call()
            seconds[call].append(time.perf_counter() - start)
    return ratio(seconds[before], seconds[after])


def compare_options(
    words: list[str], options: dict[str, list[str]], batch_size: int, count: int
) -> dict[str, Ratio]:
    """Compare each of some settings with none of them, one after the other."""
    plain = step_of(words, batch_size)
    return {
        name: time_pairs(plain, step_of([*words, *more], batch_size), count) for name, more in options.items()
    }
