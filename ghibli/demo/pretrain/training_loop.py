"""A resumable training loop: all randomness follows from (seed, stage, step), and checkpoints are atomic."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ghibli.demo.pretrain.muon import Muon


@dataclass(frozen=True)
class Plan:
    """Hyperparameters of one stage."""

    steps: int
    learning_rate: float
    warmup: int = 200
    muon: bool = False  # AdamW otherwise
    ema: float = 0.998  # decay of the weight average per step
    save_every: int = 250  # steps between checkpoints
    preview_every: int = 700  # steps between previews
    seed: int = 0


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """Make the random generator of one step of one stage, the same after any number of resumes."""
    word = sum((index + 1) * ord(letter) for index, letter in enumerate(stage))
    return torch.Generator().manual_seed((seed * 1_000_003 + word) * 10_000_019 + step)


def rate_at(plan: Plan, step: int) -> float:
    """Learning rate of a step: linear warm-up, constant up to half-way, then a half cosine down to zero."""
    warm = min(1.0, (step + 1) / plan.warmup)
    late = max(0.0, 2 * step / plan.steps - 1)
    return plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * late))


def stage_optimizer(model, plan: Plan) -> torch.optim.Optimizer:
    """Make Muon (with Adam for embedding tables) or AdamW for all weights of the model."""
    if plan.muon:
        tables = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
        return Muon(model.parameters(), lr=plan.learning_rate, plain=tables)
    return torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99))


def start_or_resume(model, optimizer, average: list, checkpoint: Path) -> int:
    """Load a stage's checkpoint if there is one; return the next step."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for kept, saved in zip(average, state["average"], strict=True):
        kept.copy_(saved)
    return state["step"]


def save(model, optimizer, average: list, step: int, checkpoint: Path) -> None:
    """Save the complete state of a stage, atomically."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step},
        partial,
    )
    os.replace(partial, checkpoint)


def print_progress(stage: str, step: int, steps: int, loss: float, seconds: float) -> None:
    """Print one line: step, loss, seconds per step and minutes left."""
    left = seconds * (steps - step)
    filled = 30 * step // steps
    print(
        f"{stage} [{'#' * filled}{'.' * (30 - filled)}] {step}/{steps} loss {loss:.4f} "
        f"{seconds:.2f} s a step, {left / 60:.0f} min left",
        flush=True,
    )


def train_stage(
    stage: str,
    model: torch.nn.Module,
    loss_of: Callable[[int, torch.Generator], torch.Tensor],
    plan: Plan,
    checkpoint: Path,
    preview: Callable[[int], None] | None = None,
    stop_at: int | None = None,
) -> None:
    """Train for plan.steps and leave the averaged weights in the model.

    Args:
        loss_of: returns the scalar loss of a step.
        preview: called with the step while the averaged weights are in place.
        stop_at: step at which to stop early, as if interrupted.
    """
    optimizer = stage_optimizer(model, plan)
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    step = first = start_or_resume(model, optimizer, average, checkpoint)
    begin, recent = time.monotonic(), 0.0
    while step < (plan.steps if stop_at is None else stop_at):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(plan, step)
        loss = loss_of(step, generator_for(plan.seed, stage, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(plan.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - keep)
        recent = loss.item() if step == first + 1 else recent * 0.97 + loss.item() * 0.03
        if step % 25 == 0:
            print_progress(stage, step, plan.steps, recent, (time.monotonic() - begin) / (step - first))
        if step % plan.save_every == 0 or step == plan.steps:
            save(model, optimizer, average, step, checkpoint)
        if preview is not None and (step % plan.preview_every == 0 or step == plan.steps):
            with swapped(weights, average):
                preview(step)
    if step >= plan.steps:
        copy_into(weights, average)


def copy_into(weights: list, values: list) -> None:
    """Copy values into weights."""
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


@contextmanager
def swapped(weights: list, average: list) -> Iterator[None]:
    """Put the averaged weights in place for a while, then the training ones again."""
    kept = [weight.detach().clone() for weight in weights]
    copy_into(weights, average)
    try:
        yield
    finally:
        copy_into(weights, kept)
