"""Measure whether making training examples hides behind the device's steps."""

import time
from statistics import median

import torch

from ghibli.config.schema import Config
from ghibli.data.ahead import AheadLoader
from ghibli.data.dataset import EncodedImages, EpochPlan, TrainExamples, collate
from ghibli.data.latents import Moments

DEVICE_STEP = 0.005  # seconds: a fake step, during which Python is free as while a GPU computes


def examples_of(config: Config, count: int) -> TrainExamples:
    """Make training examples of empty latents of the run's resolution."""
    side = config.model.resolution // 8
    mean = torch.zeros(1, 4, side, side).expand(count, -1, -1, -1)
    ids = torch.zeros(count, 77, dtype=torch.long)
    shapes = [(config.model.resolution, config.model.resolution)] * count
    encoded = EncodedImages([""] * count, Moments(mean, mean), None, ids, ids[0], shapes, 0.18215)
    return TrainExamples(encoded, EpochPlan(count, 1, 1000), config.loss, config.seed)


def time_loading(config: Config, batch_size: int, steps: int) -> dict[str, float]:
    """Measure seconds, medians: to make a batch, and of a step of DEVICE_STEP with batches made ahead."""
    examples = examples_of(config, batch_size * steps)
    loader = AheadLoader(examples, batch_size, collate_fn=collate)
    made, stepped = [], []
    for start in range(0, len(examples), batch_size):
        begin = time.perf_counter()
        collate([examples[number] for number in range(start, start + batch_size)])
        made.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for _ in loader:
        time.sleep(DEVICE_STEP)
        now = time.perf_counter()
        stepped.append(now - begin)
        begin = now
    return {"batch": median(made), "step": median(stepped), "device": median(sleeps(steps))}


def sleeps(count: int) -> list[float]:
    """Measure how long a sleep of DEVICE_STEP takes here without anything beside it, in seconds."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        time.sleep(DEVICE_STEP)
        found.append(time.perf_counter() - begin)
    return found
