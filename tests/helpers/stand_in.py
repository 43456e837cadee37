"""A training in this process that is stopped at a chosen forward pass."""

import pytest
import torch

from ghibli.training.module import GhibliModule

QUICK = ("data.draw=null", "sample.every_n_epochs=0", "lora.rank=4")


class StandIn(Exception):
    """Stands in for whatever stops a run."""


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Lets a training in this process end with StandIn at its n-th forward pass."""
    original, seen = GhibliModule.training_step, 0

    def step(module: GhibliModule, batch: dict, batch_idx: int) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == call:
            raise StandIn
        return original(module, batch, batch_idx)

    monkeypatch.setattr(GhibliModule, "training_step", step)
