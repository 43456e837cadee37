"""Checks before a run: `ghibli check` reports every finding, train.py only what is wrong."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ghibli.adapters import apply
from ghibli.config.paths import check_images, check_model
from ghibli.config.schema import Config, describe
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.dataset import left_out
from ghibli.data.folder import summarise
from ghibli.data.validation_items import images_in_a_pass
from ghibli.diffusion.samplers import cells_of
from ghibli.evaluation import diagnosis
from ghibli.evaluation.diagnosis import Finding
from ghibli.models.base import BaseModel, weights_hash
from ghibli.models.hub import hub_answers
from ghibli.models.load import is_here
from ghibli.models.sd15 import sd15_shapes
from ghibli.prepare import dataset_checks, memory
from ghibli.prepare.cards import GB, card_size, choose, nothing_fits
from ghibli.prepare.rehearsal import predict
from ghibli.runs.compose import check_overrides, conf_folder
from ghibli.runs.folder import RunDir
from ghibli.runtime import resources
from ghibli.runtime.errors import UserError, disk_trouble
from ghibli.runtime.wording import number_of
from ghibli.training.callbacks.checkpoints import CleanStop
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import lr_factor
from ghibli.training.trainer import make_callbacks, make_trainer

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}  # in this order
PREPARED = "prepared.json"  # in conf/local: the base that `ghibli prepare` checked
REPORTED_LATER = {
    "unusable images",
    "missing captions",
    "regularization",
}  # by the run itself, when it encodes the images
T = TypeVar("T")

logger = logging.getLogger(__name__)


def check(overrides: list[str], card: str | None = None) -> list[Finding]:
    """Return everything that can be found without training, for the settings of `train.py OVERRIDES`.

    Args:
        card: memory of a GPU that need not be there, such as 8GB; what fits on it is a finding.

    Raises:
        UserError: `card` is no size.
    """
    config, run, errors = check_overrides(overrides)
    if config is None or run is None:
        return [Finding("config", error, "error") for error in errors]
    return check_run(config, run, card)


def check_run(config: Config, run: RunDir, card: str | None = None) -> list[Finding]:
    """Return what check does, for settings that are composed already.

    Raises:
        UserError: `card` is no size.
    """
    size = None if card is None else card_size(card)
    found = [Finding("config", f"{describe(config)}, seed {config.seed}; every value is in range", "note")]
    base = result_or_finding(found, "base", lambda: load_present_base(config, found))
    of_base: list[Finding] = []
    if size is not None:
        found += about_card(config, base, size)
    if base:  # before adapter layers change it
        found += changed_since_prepared(config, base)
        of_base.append(about_base(config, base))
    data = GhibliDataModule(config, base, run, 0)
    is_read = result_or_finding(found, "images", lambda: read_dataset(data))
    trainer = result_or_finding(
        found, "device", lambda: make_trainer(config, run, make_callbacks(config, run, CleanStop(run)))
    )
    module = base and result_or_finding(found, "model", lambda: GhibliModule(config, base))
    found += of_base
    if module:
        alphas = module.alphas_cumprod, module.base_alphas_cumprod
        found += diagnosis.at_the_start(config.loss.own_guidance, *alphas, module.trainable.values())
    if trainer:
        found.append(about_device(trainer))
    if is_read:
        found += about_images(data, base)
        found += result_or_finding(found, "regularization", lambda: about_regularization(data)) or []
    if is_read and module and trainer:
        found += about_run(module, data, trainer, run.path)
    return by_level(found)


def before_training(module: GhibliModule, data: GhibliDataModule, trainer: L.Trainer, run: RunDir) -> None:
    """Run the checks on what train.py has loaded; log errors and warnings.

    A prediction, such as too little memory, does not stop a run; a certain failure does.

    Raises:
        UserError: no usable images, fewer than one optimiser step takes, or held-out ones in
            data.regularization.
    """
    if not trainer.is_global_zero:
        return
    read_dataset(data)
    found = about_images(data, data.base) + about_regularization(data)
    if module.config.finetune != "none":
        data.steps_per_epoch(trainer.accumulate_grad_batches, trainer.world_size)
        data.check_workers()
    found += about_run(module, data, trainer, run.path)
    log_findings(
        finding
        for finding in by_level(found)
        if finding.level != "note" and finding.name not in REPORTED_LATER
    )


def by_level(found: list[Finding]) -> list[Finding]:
    """Sort findings: errors, then warnings, then notes."""
    return sorted(found, key=lambda finding: list(LEVELS).index(finding.level))


def log_findings(found: Iterable[Finding]) -> None:
    """Log one line per finding at its level."""
    for finding in found:
        logger.log(LEVELS[finding.level], f"{finding.level}: {finding.name}: {finding.text}")


def result_or_finding(found: list[Finding], name: str, function: Callable[[], T]) -> T | None:
    """Return the result of a function; turn a user error or a disk error into a finding, and return None."""
    try:
        return function()
    except (UserError, MisconfigurationException) as error:
        text = str(error)
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        text = trouble
    found.append(Finding(name, " ".join(text.split()), "error"))
    return None


def load_present_base(config: Config, found: list[Finding]) -> BaseModel | None:
    """Load the base as train.py does, with its adapter merged; return None where it would be downloaded."""
    model = config.model
    check_model(model)
    if not is_here(model.path) and hub_answers():
        text = (
            f"model.path={model.path} is not downloaded yet, so it and what depends on it are not checked; "
            "train.py downloads it first (4 GB for Stable Diffusion 1.5)"
        )
        found.append(Finding("base", text))
        return None
    return apply.load_base(model)


def read_dataset(data: GhibliDataModule) -> bool:
    """Draw the demo images if they are missing, read the image folder and split it; return True."""
    check_images(data.config)
    data.prepare_data()
    data.read()
    return True


def changed_since_prepared(config: Config, base: BaseModel) -> list[Finding]:
    """Warn if the base has other weights than when `ghibli prepare` checked it."""
    note = conf_folder() / "local" / PREPARED
    if not note.is_file():
        return []
    prepared = json.loads(note.read_text(encoding="utf-8"))
    if prepared["base"] != config.model.path or config.model.adapter is not None:
        return []
    if prepared["base_hash"] == weights_hash(base):
        return []
    text = (
        f"model.path={config.model.path} has changed since `ghibli prepare` checked it: run that again if "
        "the change is intended"
    )
    return [Finding("base", text)]


def about_base(config: Config, base: BaseModel) -> Finding:
    """Describe the base: sizes, prediction type, VAE."""
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (base.unet, base.text_encoder)]
    merged = "" if config.model.adapter is None else f", {config.model.adapter} merged in"
    return Finding(
        "base",
        f"model.path={config.model.path} has the parts of Stable Diffusion 1 or 2: UNet of {millions[0]:.1f} "
        f"million weights, text encoder of {millions[1]:.1f} million; it predicts {base.prediction_type}, "
        f"its VAE encodes {base.vae_factor}x{base.vae_factor} px as one latent{merged}",
        "note",
    )


def about_images(data: GhibliDataModule, base: BaseModel | None) -> list[Finding]:
    """Check images and captions; without a base, all but the captions' length."""
    folder = data.folder
    assert folder is not None, "read_dataset comes first"
    found = dataset_checks.check_dataset(
        folder, data.train_images, data.held_out, data.thumbnails, data.moved
    )
    if base is not None:
        long = dataset_checks.long_captions(folder.images, base.tokenizer)
        found += [long] if long else []
    return found


def about_regularization(data: GhibliDataModule) -> list[Finding]:
    """Describe the images of data.regularization; an empty list without it.

    Raises:
        UserError: as GhibliDataModule.read_regularization.
    """
    folder = data.read_regularization()
    if folder is None:
        return []
    skipped = f"; {summarise(folder.unusable, elsewhere='')}" if folder.unusable else ""
    text = (
        f"data.regularization={data.config.data.regularization}: {len(folder.images)} usable images{skipped}"
    )
    return [Finding("regularization", text, "warning" if skipped else "note")]


def about_device(trainer: L.Trainer) -> Finding:
    """Describe the device and the precision."""
    device = trainer.strategy.root_device
    where = f"the CPU with {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    many = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return Finding("device", f"{where}{many}, trainer.precision={trainer.precision}", "note")


def about_card(config: Config, base: BaseModel | None, size: float) -> list[Finding]:
    """Say which settings fit on a card of `size` bytes, for training in 16 bits; trains nothing there.

    Without a base, one of the size of Stable Diffusion 1.5 is taken.
    """
    like = sd15_shapes() if base is None else base
    of = "" if base is not None else " with Stable Diffusion 1.5's size"
    choices = choose(config, like, "bf16-mixed", size)
    if not choices:
        return [Finding("card", nothing_fits(config, like, "bf16-mixed", size), "error")]
    fits = "; or ".join(f"{choice.words} ({choice.size / GB:.1f} GB)" for choice in choices)
    return [Finding("card", f"on a card of {size / GB:.3g} GB this fits{of}: {fits}", "note")]


def about_run(
    module: GhibliModule, data: GhibliDataModule, trainer: L.Trainer, folder: Path
) -> list[Finding]:
    """Check the training plan, memory, disk and cache."""
    config = module.config
    found: list[Finding] = []
    epochs = trainer.max_epochs if config.finetune != "none" else 0
    if config.finetune != "none":
        result_or_finding(found, "plan", lambda: found.extend(about_plan(data, trainer)))
        result_or_finding(found, "workers", data.check_workers)
    beside = 0 if data.beside is None else len(data.beside.images)
    found.append(about_memory(module, data, trainer, beside))
    shapes = [tuple(p.shape) for p in module.trainable.values()]
    cells = len(cells_of(config.sample, config.loss.own_guidance))
    found.append(about_disk(memory.estimate_disk(config, shapes, epochs, cells), folder))
    side, own = config.model.resolution, len(data.train_images) + len(data.val_images)
    size = memory.latents_size(side, own, config.data.flip) + memory.latents_size(side, beside)
    return found + about_cache(size, config.cache_dir)


def about_plan(data: GhibliDataModule, trainer: L.Trainer) -> list[Finding]:
    """Describe steps, epochs and the learning rate schedule; warn about a warm-up that is too long.

    Raises:
        UserError: fewer training images than one optimiser step takes.
    """
    accumulate, devices = trainer.accumulate_grad_batches, trainer.world_size
    steps, options = data.steps_per_epoch(accumulate, devices), data.config.optimizer
    batch_size = data.config.data.batch_size
    total = steps * trainer.max_epochs
    if trainer.max_steps > 0:
        total = min(total, trainer.max_steps)

    def rate(share: float) -> float:
        step = min(int(share * total), total - 1)
        return options.lr * lr_factor(
            step, schedule=options.schedule, warmup_steps=options.warmup_steps, steps_per_epoch=steps,
            epochs=trainer.max_epochs,
        )  # fmt: skip

    rates = ", ".join(f"{rate(share):.3g} at {100 * share:.0f} %" for share in (0, 0.25, 0.5, 0.75, 1))
    text = (
        f"{images_in_words(data)}, batch size {batch_size} x accumulation {accumulate} x "
        f"{number_of(devices, 'device')}: {number_of(steps, 'optimiser step')} per epoch, "
        f"{number_of(trainer.max_epochs, 'epoch')}, {number_of(total, 'step')}; learning rate {rates}"
    )
    found = [Finding("plan", text, "note")]
    if options.warmup_steps >= total:
        text = (
            f"optimizer.warmup_steps={options.warmup_steps}, but there are {total} steps: the learning rate "
            "never reaches its peak; lower it"
        )
        found.append(Finding("warm-up", text))
    unused = left_out(data.shapes, batch_size * devices)
    if unused:
        text = (
            f"{unused} training images have shapes with fewer images than a batch of "
            f"{batch_size * devices}, so they are never trained on: lower data.batch_size (and "
            "raise data.accumulate), or set data.resize=center_crop"
        )
        found.append(Finding("shapes", text))
    return found


def images_in_words(data: GhibliDataModule) -> str:
    """Count the training images, and what an epoch has of them where kohya's folders repeat some."""
    count, examples = len(data.train_images), len(data.shapes)
    return f"{count} images" if count == examples else f"{count} images, {examples} with their repeats"


def about_memory(
    module: GhibliModule, data: GhibliDataModule, trainer: L.Trainer, beside: int = 0
) -> Finding:
    """Compare the memory that training, probe and grids need with what is free.

    Args:
        beside: number of images in data.regularization.
    """
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    if device.type == "cuda":
        return about_gpu_memory(module, precision, resources.free_memory(device))
    images = len(data.train_images) + len(data.val_images)
    need = memory.estimate_memory(module, images, precision, beside)
    further = trainer.num_devices - 1  # processes, each of which needs what this one holds already, too
    total = need.total + further * (need.total + resources.resident_memory())
    free, peak = resources.free_memory(device), peak_of_process(need.total)
    phases = ", ".join(f"{name} {format_bytes(size)}" for name, size in need.phases.items())
    text = (
        f"the run needs about {format_bytes(total)} more, its process {peak / 2**30:.2f} GiB at its peak "
        f"with all it loads: {format_bytes(need.kept)} throughout for optimiser and latents, and one at a "
        f"time for {phases}; {format_bytes(free)} are free"
    )
    if total <= free:
        return Finding("memory", text + larger_batch(need, module, free - total), "note")
    return Finding("memory", f"{text}: {memory_advice(need.highest, module.config)}", "error")


def peak_of_process(more: float) -> float:
    """Return the bytes of a run's process at its peak: while the base is loaded, or with `more` beside it."""
    loading = resources.peak_resident_memory() or 0  # None where there is no /proc
    return max(loading, resources.resident_memory() + more)


def about_gpu_memory(module: GhibliModule, precision: str, free: float) -> Finding:
    """Compare what the rehearsal of a run says that it takes on a GPU with the bytes that are free there."""
    config = module.config
    found = predict(config, module.base, precision)
    phases = found.phases(config.compute.checkpoint_every, config.data.batch_size)
    if config.finetune == "none":
        del phases["training"]
    highest = max(phases, key=phases.__getitem__)
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in phases.items())
    text = (
        f"the run takes about {format_bytes(phases[highest])} of the GPU's memory, one at a time for "
        f"{listed}, weights included; {format_bytes(free)} are free"
    )
    if phases[highest] <= free:
        return Finding("memory", text, "note")
    return Finding("memory", f"{text}: {memory_advice(highest, config)}", "error")


def larger_batch(need: memory.Memory, module: GhibliModule, spare: float) -> str:
    """Suggest settings that merge accumulated passes, where memory allows: the same gradient, sooner.

    Args:
        spare: bytes that would be left free.
    """
    batch, accumulate = module.config.data.batch_size, module.config.data.accumulate
    one_pass = need.phases.get("training", math.inf)
    fits = [
        factor
        for factor in range(2, accumulate + 1)
        if accumulate % factor == 0 and memory.FRAGMENTS * (factor - 1) * one_pass <= spare
    ]
    if not fits:
        return ""
    factor = max(fits)
    return (
        f"; data.batch_size={factor * batch} data.accumulate={accumulate // factor} fits too and gives the "
        "same gradients, faster on a GPU"
    )


def format_bytes(size: float) -> str:
    """Format a number of bytes: `1.2 GiB` or `300 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def memory_advice(phase: str, config: Config) -> str:
    """Suggest the setting that lowers the memory of the phase that needs most."""
    if phase == "training" and config.data.batch_size > 1:
        half = config.data.batch_size // 2
        more = 2 * config.data.accumulate
        return f"lower data.batch_size to {half} with data.accumulate={more}, which gives the same gradients"
    if phase == "training" and config.compute.checkpoint_every == 0:
        return "set compute.checkpoint_every=1, which saves memory and computes a third more"
    shares = images_in_a_pass(config.model.resolution, config.validation.items_per_image) > 1
    if phase == "the probe" and config.validation.items_per_image > 1 and not shares:
        return f"lower validation.items_per_image to {config.validation.items_per_image // 2}"
    if phase == "drawing the grid" and len(config.sample.prompts) > 1:
        return "give fewer sample.prompts, or draw no grids with sample.every_n_epochs=0"
    return f"lower model.resolution (it is {config.model.resolution}), or free some memory"


def about_disk(need: memory.Disk, folder: Path) -> Finding:
    """Compare the disk space that checkpoints, adapters and grids need with what is free."""
    free = resources.free_disk(folder)
    text = (
        f"the run writes about {need.total / 1e6:.0f} MB below {folder.parent}: checkpoints "
        f"{need.checkpoints / 1e6:.0f}, adapters {need.adapters / 1e6:.0f}, grids {need.grids / 1e6:.0f}; "
        f"{free / 1e6:.0f} MB are free"
    )
    if need.total <= free:
        return Finding("disk", text, "note")
    return Finding("disk", f"{text}: free some space, or choose another disk, hydra.run.dir=DIR", "error")


def about_cache(need: int, cache_dir: str) -> list[Finding]:
    """Report an error if the cached latents, in bytes, do not fit on the disk."""
    free = resources.free_disk(Path(cache_dir))
    if need <= free:
        return []
    text = (
        f"the cached latents need {need / 1e6:.1f} MB below cache_dir={cache_dir}, where "
        f"{free / 1e6:.1f} MB are free: free some space, or choose another disk, cache_dir=DIR"
    )
    return [Finding("cache", text, "error")]
