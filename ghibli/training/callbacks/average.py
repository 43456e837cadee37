"""An exponential moving average of the trained weights, to be judged, drawn and kept in their place."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ghibli.training.callbacks.checkpoints import between_steps
from ghibli.training.module import GhibliModule


class WeightAverage(Callback):
    """Average the trained weights over the optimiser steps: average = d average + (1 - d) weights.

    The first average is the weights after the first step, as in torch.optim.swa_utils.AveragedModel.
    From the end of an epoch to the next batch the network holds the average: so the probe, the grids, the
    checkpoints of an epoch and the adapter are those of the average. A checkpoint holds both, the other
    one in this callback's state, so a resumed run equals one that was never stopped.

    Lightning's EMAWeightAveraging copies and swaps the whole module, with the frozen base, and stores
    all of it in every checkpoint; ours hold what is trained.

    Args:
        decay: d, 0 .. 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.other: dict[str, torch.Tensor] = {}  # of average and trained weights those not in the network
        self.shown = False  # whether the network holds the average

    def state_dict(self) -> dict[str, Any]:
        return {"other": self.other, "shown": self.shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.other, self.shown = dict(state_dict["other"]), bool(state_dict["shown"])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: GhibliModule, batch: Any, batch_idx: int
    ) -> None:
        self.show(pl_module, wanted=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if between_steps(trainer, batch_idx):
            self.update(pl_module.trainable)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.show(pl_module, wanted=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.show(pl_module, wanted=True)

    @torch.no_grad()
    def update(self, weights: dict[str, torch.nn.Parameter]) -> None:
        """Take the weights after an optimiser step into the average."""
        for name, weight in weights.items():
            if name in self.other:
                self.other[name] = self.other[name].to(weight.device).lerp_(weight, 1 - self.decay)
            else:
                self.other[name] = weight.detach().clone()

    @torch.no_grad()
    def show(self, module: GhibliModule, wanted: bool) -> None:
        """Put the average into the network, or the weights that train; nothing if they are there."""
        if wanted == self.shown or not self.other:
            return
        for name, weight in module.trainable.items():
            kept = weight.detach().clone()
            weight.copy_(self.other[name])
            self.other[name] = kept
        self.shown = wanted
