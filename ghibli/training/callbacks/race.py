"""Stop a trial that a sweep's race has decided; see ghibli.sweeps.race."""

from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback

from ghibli.evaluation.gain import Probe
from ghibli.training.module import GhibliModule

Judge = Callable[[list[Probe]], str | None]  # history -> why the run is stopped, or None


class Outrun(Exception):
    """The run lost its race: it is left as it is, with a checkpoint to resume from."""


class RaceStop(Callback):
    """Ask the judge when an epoch begins: the one before has its checkpoint then, and the last one none."""

    def __init__(self, judge: Judge):
        self.judge = judge

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        reason = self.judge(pl_module.probe.history)
        if reason is not None:
            raise Outrun(reason)
