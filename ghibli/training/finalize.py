"""The end of a run: best weights, adapter file, last grid, status, and the closing lines."""

import math
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger

from ghibli.adapters import lora
from ghibli.adapters.files import is_dora, read_adapter
from ghibli.adapters.kohya import metadata_of, write_kohya
from ghibli.adapters.model_card import model_card
from ghibli.config.schema import Config, describe
from ghibli.evaluation.gain import Gain
from ghibli.runs import identity
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import console, relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text
from ghibli.runtime.provenance import now
from ghibli.training import wandb_logger
from ghibli.training.callbacks.checkpoints import StopRequested, load_weights, requeue
from ghibli.training.callbacks.diagnosis import Doctor
from ghibli.training.callbacks.metrics import Records
from ghibli.training.callbacks.samples import SampleGrid
from ghibli.training.module import GhibliModule


def finish(
    config: Config,
    run: RunDir,
    trainer: L.Trainer,
    module: GhibliModule,
    logger: WandbLogger | None,
) -> float:
    """Exports the best weights, draws them, writes the status, says where all is.

    Returns:
        The best validation gain: the objective.
    """
    module.to(trainer.strategy.root_device)
    grid_drawer = next(c for c in trainer.callbacks if isinstance(c, SampleGrid))
    best = best_row(next(c for c in trainer.callbacks if isinstance(c, Records)).probe_rows)
    gain, best_epoch = Gain(best["probe/val_gain"], best["probe/val_gain_se"]), best["epoch"]
    lines = [f"trained  {describe(config)}, {trainer.global_step} steps, {trainer.current_epoch} epochs"]
    if config.finetune == "none":
        lines = ["measured the untouched base (finetune=none): nothing was trained"]
    else:
        if config.finetune == "lora":
            lora.save_adapter(module.base, run.last_adapter)
        load_weights(module, run.best_checkpoint, best_epoch)
        lines.append(f"gain     {gain}, after epoch {best_epoch}")
    label = {"lora": "adapter", "full": "fine-tuned", "none": "base"}[config.finetune]
    if grid_drawer.base_images is not None:
        lines.append(f"grid     {relative_path(grid_drawer.save(trainer, module, label, label))}")
    if config.finetune == "lora":
        lines.append(f"adapter  {relative_path(lora.save_adapter(module.base, run.adapter))}")
        facts = run.read_status() | {"step": trainer.global_step, "best_epoch": best_epoch, "ended": None}
        lines.append(
            f"         {relative_path(save_kohya(config, run, module, facts))} for ComfyUI and A1111"
        )
    elif config.finetune == "full":
        module.base.unet.save_pretrained(run.unet)
        lines.append(f"UNet     {relative_path(run.unet)}")
    lines.append(f"run      {relative_path(run.path)}")
    run.update_status(
        state="finished", ended=now(), step=trainer.global_step, epoch=trainer.current_epoch,
        gain=gain.value, gain_se=gain.standard_error, best_epoch=best_epoch, objective=gain.value,
    )  # fmt: skip
    run.update_status(seal=identity.result_checksum(run.read_status()))
    if config.finetune == "lora":
        files = [f"`{file.name}`" for file in sorted(run.adapter.glob("*.safetensors"))]
        write_text(run.adapter / "README.md", model_card(run, config, run.path.name, files))
    if logger is not None:
        logger.experiment.summary.update({"best/val_gain": gain.value, "best/epoch": best_epoch})
        lines.append(wandb_logger.how_to_look(run, logger))
    findings = next(c for c in trainer.callbacks if isinstance(c, Doctor)).findings
    lines.append(f"doctor   {', '.join(f.name for f in findings) or 'nothing to report'}")
    console.print("\n".join(["", *lines, f"next     {next_command(config)}"]))
    return gain.value


def save_kohya(config: Config, run: RunDir, module: GhibliModule, facts: dict[str, Any]) -> Path:
    """The best adapter in kohya's layout, read back and compared; the diffusers file where that cannot be.

    Raises:
        UserError: what was written is not what was trained.
    """
    adapter = read_adapter(run.adapter, module.base, "adapter")
    if is_dora(adapter):
        return adapter.file
    file = run.adapter / "kohya.safetensors"
    write_kohya(adapter, file, metadata_of(adapter, config, facts, describe(config)))
    again = read_adapter(file, module.base, "adapter").layers
    for name, layer in adapter.layers.items():
        same_alpha = math.isclose(again[name].alpha, layer.alpha, rel_tol=1e-3)  # in the file's dtype
        if not same_alpha or not torch.equal(again[name].up, layer.up):
            raise UserError(f"{file} was written wrongly: {name} differs; please report this")
    return file


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of probe.csv with the highest gain after an epoch; of the base when nothing was trained."""
    trained = [row for row in rows if row["epoch"] > 0]
    return max(trained or rows, key=lambda row: row["probe/val_gain"])


def next_command(config: Config) -> str:
    """What to try after this run."""
    if config.finetune == "none":
        return "python train.py"
    if config.loss.guidance == 1:
        return "python train.py loss.guidance=7.5   (the slides' other training), then: ghibli list"
    return "ghibli list"


def interrupted(run: RunDir, request: StopRequested) -> int:
    """Notes the interruption, says how to go on, and returns the exit code (130 or 143; 138 in Slurm)."""
    if request.signal_number == signal.SIGUSR1:
        go_on_later()
    if run.state == "finished":
        console.print("stopped; this run is finished")
        return 128 + request.signal_number
    run.update_status(state="interrupted", reason=str(request), ended=now())
    if run.last_checkpoint.exists():
        console.print(f"stopped; go on with: python train.py resume={relative_path(run.path)}")
    else:
        console.print("stopped before the first checkpoint: start the same command again")
    return 128 + request.signal_number


def go_on_later() -> None:
    """Asks Slurm to start this job again, whose command then goes on in the same folder."""
    try:
        requeue()
        console.print("Slurm was asked to start this job again: the same command goes on")
    except (OSError, subprocess.SubprocessError) as error:
        console.print(f"scontrol requeue failed ({error}): submit the job again", style="yellow")
