"""Runs the doctor's rules while training, and reports each finding once."""

import logging
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ghibli.config.schema import Config
from ghibli.evaluation import diagnosis
from ghibli.evaluation.gain import Diverged
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.training.callbacks.checkpoints import between_steps
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)


class Examples(NamedTuple):
    """One forward pass of training: which images, at which timesteps, with which losses (B,)."""

    names: list[str]
    timesteps: torch.Tensor
    losses: torch.Tensor
    total: torch.Tensor  # (), what they and all terms of the loss make


class Update(NamedTuple):
    """An optimiser step, and whether its loss or gradient was finite: (), bool, on the device."""

    number: int
    examples: list[Examples]
    is_finite: torch.Tensor


class Doctor(Callback):
    """Diagnose a run before it starts, at every optimiser step and after every epoch.

    Each finding is reported once: in the terminal, in status.json, on the dashboards.
    """

    def __init__(self, config: Config, run: RunDir):
        self.config, self.run = config, run
        self.findings: list[diagnosis.Finding] = []
        self.examples: list[Examples] = []  # since the last optimiser step
        self.unchecked: list[Update] = []  # whose flags nobody has read yet

    def state_dict(self) -> dict[str, Any]:
        return {"findings": [vars(finding) for finding in self.findings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = [diagnosis.Finding(**stored) for stored in state_dict["findings"]]

    def setup(self, trainer: L.Trainer, pl_module: GhibliModule, stage: str) -> None:
        pl_module.loss_listeners.append(self.note)

    def note(self, batch: dict[str, Any], losses: torch.Tensor, total: torch.Tensor) -> None:
        """Remember a forward pass of training, to trace a loss that is not finite to its images."""
        self.examples.append(Examples(batch["name"], batch["timesteps"], losses, total))

    def on_fit_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        found = diagnosis.at_the_start(
            self.config.loss.own_guidance, pl_module.alphas_cumprod, pl_module.base_alphas_cumprod,
            pl_module.trainable.values(),
        )  # fmt: skip
        self.report(trainer, found)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: GhibliModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Stop a run whose loss or gradient is not finite: on the CPU before the update that it would spoil.

        A GPU would have to finish for the answer, so there it is read where a row is logged, before
        validation and before a checkpoint is written. In fp16 a gradient may overflow, and the scaler skips
        that step by itself; a loss may not.
        """
        if str(trainer.precision) == "16-mixed":
            total = torch.stack([seen.total for seen in self.examples]).double().sum()
            found = trainer.strategy.reduce(total, reduce_op="sum")
        else:
            gradients = [p.grad for p in pl_module.trainable.values() if p.grad is not None]
            found = torch.nn.utils.get_total_norm(gradients)
        self.unchecked.append(Update(trainer.global_step, list(self.examples), found.isfinite()))
        if not is_awaited(found) or (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self.check_updates(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.check_updates(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict) -> None:
        self.check_updates(trainer)

    def check_updates(self, trainer: L.Trainer) -> None:
        """Read the flags of the updates so far.

        Raises:
            UserError: one was not finite; the message names its images.
        """
        updates, self.unchecked = self.unchecked, []
        if not updates or torch.stack([update.is_finite for update in updates]).all():
            return
        first = next(update for update in updates if not update.is_finite)
        raise UserError(self.not_finite(trainer, first))

    def on_exception(self, trainer: L.Trainer, pl_module: GhibliModule, exception: BaseException) -> None:
        if isinstance(exception, Diverged):
            self.report(trainer, [diagnosis.Finding("not finite", str(exception))], say=False)

    def not_finite(self, trainer: L.Trainer, update: Update) -> str:
        examples = gather_examples(update.examples, trainer.world_size)
        text = diagnosis.not_finite(examples, update.number, self.config.optimizer.lr)
        self.report(trainer, [diagnosis.Finding("not finite", text)], say=False)
        return text

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if between_steps(trainer, batch_idx):
            self.examples.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.report(trainer, diagnosis.after_epoch(pl_module.probe.history, self.config))

    def report(self, trainer: L.Trainer, found: list[diagnosis.Finding], say: bool = True) -> None:
        """Report what has not been reported before."""
        known = {finding.name for finding in self.findings}
        new = [finding for finding in found if finding.name not in known]
        self.findings += new
        if not trainer.is_global_zero:
            return
        self.run.status.update(findings=[vars(finding) for finding in self.findings])
        for finding in new:
            if say:
                logger.warning(f"doctor: {finding.name}: {finding.text}")
            for dashboard in trainer.loggers:
                dashboard.log_finding(finding.name, finding.text, trainer.global_step)


def is_awaited(value: torch.Tensor) -> bool:
    """Tell whether Python would wait for this value: a GPU computes it later."""
    return value.is_cuda


def gather_examples(examples: list[Examples], world_size: int) -> list[diagnosis.TrainedExample]:
    """Return each of these examples, of all devices."""
    here = [
        diagnosis.TrainedExample(*example, seen.total.item())
        for seen in examples
        for example in zip(seen.names, seen.timesteps.tolist(), seen.losses.tolist(), strict=True)
    ]
    if world_size == 1:
        return here
    everywhere: list = [None] * world_size
    torch.distributed.all_gather_object(everywhere, here)
    return [example for examples in everywhere for example in examples]
