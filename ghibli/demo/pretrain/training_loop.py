"""A resumable training loop: everything random follows from (seed, step), state is saved whole."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ghibli.demo.pretrain.muon import Muon


@dataclass(frozen=True)
class Plan:
    """How long and how fast one stage trains."""

    steps: int
    learning_rate: float
    warmup: int = 200
    muon: bool = False  # AdamW otherwise
    ema: float = 0.998  # share of the old average kept a step
    save_every: int = 250
    look_every: int = 700


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step of one stage, the same however often it is resumed."""
    word = sum((index + 1) * ord(letter) for index, letter in enumerate(stage))
    return torch.Generator().manual_seed((seed * 1_000_003 + word) * 10_000_019 + step)


def rate_at(plan: Plan, step: int) -> float:
    """Linear warm-up, a flat half, then a half cosine down to zero."""
    warm = min(1.0, (step + 1) / plan.warmup)
    late = max(0.0, 2 * step / plan.steps - 1)
    return plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * late))


def make_optimizer(model, plan: Plan) -> torch.optim.Optimizer:
    """Muon (Adam for embedding tables) or AdamW over all weights of the model."""
    if plan.muon:
        tables = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
        return Muon(model.parameters(), lr=plan.learning_rate, plain=tables)
    return torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99))


def start_or_resume(model, optimizer, average: list, checkpoint: Path) -> int:
    """Load a stage's state if there is one; returns the next step."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for kept, saved in zip(average, state["average"], strict=True):
        kept.copy_(saved)
    return state["step"]


def save(model, optimizer, average: list, step: int, checkpoint: Path) -> None:
    """Write the whole state of a stage in one move."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step},
        partial,
    )
    os.replace(partial, checkpoint)


def show(stage: str, step: int, steps: int, loss: float, seconds: float) -> None:
    """One progress line: where the stage is, its loss and the time left."""
    left = seconds * (steps - step)
    filled = 30 * step // steps
    print(
        f"{stage} [{'#' * filled}{'.' * (30 - filled)}] {step}/{steps} loss {loss:.4f} "
        f"{seconds:.2f} s a step, {left / 60:.0f} min left",
        flush=True,
    )


def train(
    stage: str,
    model: torch.nn.Module,
    loss_of: Callable,
    plan: Plan,
    checkpoint: Path,
    seed: int = 0,
    look: Callable | None = None,
    stop_at: int | None = None,
) -> None:
    """Train to plan.steps (or stop at `stop_at`) and leave the averaged weights in the model.

    loss_of(step, generator) gives the scalar loss of a step; look(step) is called with the
    averaged weights in place.
    """
    optimizer = make_optimizer(model, plan)
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    step = first = start_or_resume(model, optimizer, average, checkpoint)
    begin, recent = time.monotonic(), 0.0
    while step < (plan.steps if stop_at is None else stop_at):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(plan, step)
        loss = loss_of(step, generator_for(seed, stage, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(plan.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - keep)
        recent = loss.item() if step == first + 1 else recent * 0.97 + loss.item() * 0.03
        if step % 25 == 0:
            show(stage, step, plan.steps, recent, (time.monotonic() - begin) / (step - first))
        if step % plan.save_every == 0 or step == plan.steps:
            save(model, optimizer, average, step, checkpoint)
        if look is not None and (step % plan.look_every == 0 or step == plan.steps):
            with averaged(weights, average):
                look(step)
    if step >= plan.steps:
        put(weights, average)


def put(weights: list, values: list) -> None:
    """Copy values into weights."""
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


class averaged:
    """With the averaged weights in place, then the training ones again."""

    def __init__(self, weights: list, average: list):
        self.weights, self.average = weights, average

    def __enter__(self):
        self.kept = [weight.detach().clone() for weight in self.weights]
        put(self.weights, self.average)

    def __exit__(self, *error):
        put(self.weights, self.kept)
