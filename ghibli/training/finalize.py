"""The end of a run: best weights, adapter files, last grid, status, model card."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghibli.adapters import lora
from ghibli.adapters.files import read_adapter
from ghibli.adapters.kohya import metadata_of, only_as_a_whole, write_kohya, written_layers
from ghibli.adapters.layers import same_update
from ghibli.adapters.model_card import model_card
from ghibli.adapters.sidecar import write_sidecar
from ghibli.config.schema import Config, describe
from ghibli.diffusion.samplers import NotFinite
from ghibli.evaluation.gain import Gain
from ghibli.runs import identity
from ghibli.runtime.commands import command_here
from ghibli.runtime.console import relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text
from ghibli.runtime.provenance import now
from ghibli.runtime.resources import peak_memory
from ghibli.runtime.wording import number_of
from ghibli.training.callbacks.checkpoints import load_weights
from ghibli.training.loggers.dashboard import DashboardLogger
from ghibli.training.session import Training

BRIEF = ("trained ", "measured ", "gain ", "price ")  # how the lines begin that a trial of many prints
ROW_NAMES = {"lora": "adapter", "full": "fine-tuned", "none": "base"}  # of the last grid


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    gain: Gain  # the best epoch's, over the base on held-out images
    best_epoch: int  # 0 when nothing was trained
    lines: list[str]  # for the terminal: what was trained, where everything is, what to try next

    @property
    def objective(self) -> float:
        """What sweeps maximise."""
        return self.gain.value

    @property
    def summary(self) -> str:
        """The closing lines of a run."""
        return "\n".join(["", *self.lines])

    @property
    def brief(self) -> str:
        """The closing lines of one trial of many: what was trained, and its gain."""
        return "\n".join(line for line in self.lines if line.startswith(BRIEF))


def finalize(training: Training, dashboards: list[DashboardLogger]) -> Result:
    """Export the best weights, draw them, write status and model card; return the result."""
    config, run, trainer, module = training.config, training.run, training.trainer, training.module
    run.status.update(peak_memory=peak_memory())
    module.to(trainer.strategy.root_device)
    best = best_row(training.callbacks.records.probe_rows)
    gain, price, best_epoch = gain_of(best), price_of(best), best["epoch"]
    lines = [headline(training)]
    if config.finetune != "none":
        if config.finetune == "lora":
            lora.save_adapter(module.base, run.last_adapter)
        load_weights(module, run.best_checkpoint, best_epoch)
        lines.append(f"gain     {gain}, after epoch {best_epoch}")
        if price is not None:
            lines.append(f"price    forgot {price.signed_size} of what the base was made for")
    else:
        lines.append(base_loss_line(training))
    lines += draw_last_grid(training)
    lines += save_weights(training, {"step": trainer.global_step, "best_epoch": best_epoch})
    lines.append(f"run      {relative_path(run.path)}")
    run.status.update(
        state="finished", ended=now(), step=trainer.global_step, epoch=trainer.current_epoch,
        gain=gain.value, gain_se=gain.standard_error, best_epoch=best_epoch, objective=gain.value,
    )  # fmt: skip
    if price is not None:
        run.status.update(price=price.value, price_se=price.standard_error)
    run.status.update(seal=identity.result_checksum(run.status.read()))
    if config.finetune == "lora":
        write_card(training)
    for dashboard in dashboards:
        best_values = {"best/val_gain": gain.value, "best/epoch": best_epoch}
        best_values |= {} if price is None else {"best/price": price.value}
        dashboard.log_summary(best_values, trainer.global_step)
        lines += dashboard.how_to_look()
    names = [finding.name for finding in training.callbacks.doctor.findings]
    lines.append(f"doctor   {', '.join(names) or 'nothing to report'}")
    lines += closing_lines(config, run.path, gain, training.callbacks.records.probe_rows[0]["probe/val_gain"])
    return Result(gain, best_epoch, lines)


def write_card(training: Training) -> None:
    """Write the model card beside the adapter, with the last grid."""
    run = training.run
    names = [file.name for file in sorted(run.adapter.glob("*.safetensors"))]
    last = run.samples / f"{ROW_NAMES['lora']}.png"
    grid = f"../{last.relative_to(run.path).as_posix()}" if last.is_file() else None
    lines = [f"`{name}`" for name in names]
    card = model_card(run, training.config, run.path.resolve().name, lines, names, grid)
    write_text(run.adapter / "README.md", card)


def headline(training: Training) -> str:
    """Say what was trained, and for how long."""
    if training.config.finetune == "none":
        return "measured the untouched base (finetune=none): nothing was trained"
    trainer = training.trainer
    what = describe(training.config)
    steps, epochs = number_of(trainer.global_step, "step"), number_of(trainer.current_epoch, "epoch")
    return f"trained  {what}, {steps}, {epochs}"


def base_loss_line(training: Training) -> str:
    """Say what the base scores: its loss on held-out images, with the standard error over images."""
    loss = training.module.probe.history[0].val.mean(dim=1)  # (P,): an image each
    error = loss.std() / math.sqrt(len(loss))
    return (
        f"loss     {loss.mean():.4f} +- {error:.4f} on {len(loss)} held-out images: what training has to get "
        "below"
    )


def draw_last_grid(training: Training) -> list[str]:
    """Draw the model below the base, if grids are wanted; return the line that names the file."""
    if training.callbacks.samples.base_images is None:
        return []
    name = ROW_NAMES[training.config.finetune]
    try:
        file = training.callbacks.samples.save(training.trainer, training.module, name, name)
    except NotFinite as error:
        return [f"grid     none: {error}"]
    return [f"grid     {relative_path(file)}"]


def save_weights(training: Training, facts: dict[str, Any]) -> list[str]:
    """Write the best adapter in both layouts, or the whole UNet; return the lines that name the files."""
    config, run, module = training.config, training.run, training.module
    if config.finetune == "full":
        module.base.unet.save_pretrained(run.unet)
        return [f"UNet     {relative_path(run.unet)}"]
    if config.finetune == "none":
        return []
    file = lora.save_adapter(module.base, run.adapter)
    kohya = save_kohya(training, run.status.read() | facts | {"ended": None})
    export = command_here("ghibli", "export", Path(relative_path(run.path)))
    elsewhere = f"`{export}` writes a file" if kohya is None else relative_path(kohya)
    return [f"adapter  {relative_path(file)}", f"         {elsewhere} for ComfyUI and A1111"]


def save_kohya(training: Training, facts: dict[str, Any]) -> Path | None:
    """Write the best adapter in kohya's layout, read it back and compare.

    Returns:
        The file; None for an adapter that needs as much space there as the layers of the base that it
        changes, which is left to `ghibli export`.

    Raises:
        UserError: what was written is not what was trained.
    """
    config, folder, base = training.config, training.run.adapter, training.module.base
    adapter = read_adapter(folder, base, "adapter")
    if any(only_as_a_whole(layer) for layer in adapter.layers.values()):
        return None
    file = folder / "kohya.safetensors"
    write_kohya(adapter, file, metadata_of(adapter, base, config, facts, describe(config)))
    write_sidecar(file, config, base)
    again = read_adapter(file, base, "adapter").layers
    for name, layer in written_layers(adapter, base).items():
        written = again.get(name)
        if written is None or not same_update(written, layer):
            raise UserError(f"{file} was written wrongly: {name} differs; please report this")
    return file


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of probe.csv with the highest gain; the base's when nothing was trained."""
    trained = [row for row in rows if row["epoch"] > 0]
    return max(trained or rows, key=lambda row: row["probe/val_gain"])


def gain_of(row: dict[str, Any]) -> Gain:
    """Return the held-out gain of a row of probe.csv; rows of before do not say of how many images it is."""
    freedom = row.get("probe/val_images", math.inf) - 1
    return Gain(row["probe/val_gain"], row["probe/val_gain_se"], freedom=freedom)


def price_of(row: dict[str, Any]) -> Gain | None:
    """Return the price of a row of probe.csv; None where it was not measured."""
    if "probe/price" not in row:
        return None
    return Gain(row["probe/price"], row["probe/price_se"], freedom=row["probe/price_groups"] - 1)


def closing_lines(config: Config, folder: Path, gain: Gain, start: float) -> list[str]:
    """Say what a gain below 0 means, and what to do with this run.

    Args:
        start: the gain before the first step, a share.
    """
    name = Path(relative_path(folder))
    if config.finetune == "none":
        return [f"next     {command_here('python', 'train.py')}"]
    commands = [command_here("ghibli", "report", name)]
    guidance = config.loss.own_guidance
    if gain.value >= 0 or guidance != 1:
        commands.append(
            command_here("ghibli", "generate", name, "--prompt", f"a red train{config.data.style}")
        )
    else:
        commands.append("lower optimizer.lr, or give it more images or epochs")
    lines = [
        f"next     {command}" if at == 0 else f"         {command}" for at, command in enumerate(commands)
    ]
    if gain.value < 0 and guidance > 1:
        lines.append(
            f"below 0  guided training gives up predicting the noise: it started at {100 * start:.0f} %, not "
            "at 0 (docs/loss-anomaly.md); judge its images"
        )
    elif gain.value < 0 and guidance < 1:
        lines.append(
            f"below 0  a guided target is judged at guidance {guidance:.3g}, where it started at "
            f"{100 * start:.0f} %, not at 0: judge its images"
        )
    elif gain.value < 0:
        lines.append("below 0  the trained model predicts the noise of held-out images worse than the base")
    return lines
