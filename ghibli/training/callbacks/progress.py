"""The terminal while training: one bar over the whole run, one line per epoch; status.json."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ghibli.evaluation.gain import Probe
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import console, make_bar
from ghibli.runtime.provenance import now
from ghibli.training.callbacks.metrics import Records, gain_by_timestep
from ghibli.training.module import GhibliModule


class ProgressLine(Callback):
    """Show one bar over the whole run, with loss and time left, and print one line per epoch."""

    def __init__(self, records: Records):
        self.records = records
        self.bar = make_bar()
        self.task = self.bar.add_task("training", total=None, note="")

    def on_train_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:
            self.say_start(pl_module)
        total = int(trainer.estimated_stepping_batches)
        self.bar.reset(self.task, total=total, completed=trainer.global_step)
        self.bar.start()

    def say_start(self, pl_module: GhibliModule) -> None:
        """Say where a guided training starts; at guidance 1 that is the base itself, with a gain of 0."""
        guidance = pl_module.config.loss.own_guidance
        if guidance == 1:
            return
        start = pl_module.probe.history[0]
        why = "guided, it is no predictor of the noise" if guidance > 1 else "a guided target is judged there"
        console.print(
            f"start    at guidance {guidance:.3g} the untouched base scores {start.val.mean():.2f}, at 1 "
            f"{start.base_val.mean():.2f}: {why}, so the gain starts at {100 * start.val_gain.value:.0f} %"
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GhibliModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        note = f"epoch {trainer.current_epoch + 1}"
        if self.records.rows:
            note += f"  loss {float(self.records.rows[-1]['train/loss']):.4f}"
        self.bar.update(self.task, completed=trainer.global_step, note=note)

    def on_validation_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        if not trainer.is_global_zero or len(pl_module.probe.history) < 2:
            return
        probe = pl_module.probe.history[-1]
        train = f"(train {100 * probe.train_gain.value:.1f} %)"
        price = "" if probe.forgotten is None else f", forgot {probe.forgotten.signed_size}"
        console.print(f"epoch {len(pl_module.probe.history) - 1}  {probe.val_gain} {train}{price}")
        if worse := worse_range_line(probe, trainer.datamodule.num_train_timesteps):
            console.print(worse)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.bar.refresh()

    def teardown(self, trainer: L.Trainer, pl_module: GhibliModule, stage: str) -> None:
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: GhibliModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")


def worse_range_line(probe: Probe, num_train_timesteps: int) -> str:
    """Return the gain in every range of timesteps for the terminal; empty if none is below the base.

    With more than four ranges, only those that are below it. The error stands where the gain is negative.
    """
    gains = gain_by_timestep(probe, num_train_timesteps)
    worse = {name for name, gain in gains.items() if gain.high < 0}
    if not worse:
        return ""
    shown = {name: gain for name, gain in gains.items() if name in worse or len(gains) <= 4}
    texts = [
        f"{name} {100 * gain.value:+.0f}" + (f" +- {100 * gain.standard_error:.0f}" * (name in worse)) + " %"
        for name, gain in shown.items()
    ]
    return f"  by timestep: {', '.join(texts)}"


class StatusWriter(Callback):
    """Keep status.json up to date while training."""

    def __init__(self, run: RunDir):
        self.run = run

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: GhibliModule, checkpoint: dict) -> None:
        if trainer.is_global_zero:
            gain = pl_module.probe.history[-1].val_gain if len(pl_module.probe.history) > 1 else None
            self.run.status.update(
                step=trainer.global_step, epoch=trainer.current_epoch, updated=now(),
                gain=gain.value if gain else None, gain_se=gain.standard_error if gain else None,
            )  # fmt: skip
