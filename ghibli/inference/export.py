"""Exporting a run for other tools; each file is loaded into a fresh base and checked against the run."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from ghibli.adapters import apply, kohya
from ghibli.adapters.apply import load_adapters
from ghibli.adapters.files import read_adapter
from ghibli.adapters.model_card import model_card
from ghibli.adapters.trained import trained_base
from ghibli.config.schema import Config
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.pipeline import make_pipeline
from ghibli.models.safetensors import ADAPTER_FILE
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_text
from ghibli.training.callbacks.checkpoints import load_weights
from ghibli.training.module import GhibliModule

TOLERANCE = 1e-4  # largest difference from the live model, relative to its largest noise_pred
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # latents, timesteps, input_ids
GRIDS = ("samples/adapter.png", "samples/fine-tuned.png", "evaluation.png")


@dataclass(frozen=True)
class Check:
    """Largest differences of an exported file's noise_pred, relative to the live model's largest value."""

    file: Path
    from_live: float  # from the live model: about 0
    from_base: float  # from the untouched base: what the adapter changes

    @property
    def summary(self) -> str:
        return (
            f"loaded into a fresh base, its predicted noise is within {self.from_live:.1g} of the trained "
            f"model's and {self.from_base:.2g} from the base's (relative to the largest value)"
        )


def export(run: RunDir, config: Config, folder: Path, *, merge: bool) -> list[Check]:
    """Write a run's files for other tools, a model card and its sample grids into `folder`.

    Args:
        merge: also write a complete diffusers pipeline with the adapter merged in.

    Raises:
        UserError: nothing was trained, or a file does not reproduce the live model.
    """
    if config.finetune == "none":
        raise UserError(f"{run.path} only measured the base: there is nothing to export")
    if config.finetune == "full" and not merge:
        raise UserError(f"{run.path} trained all weights, which do not fit into an adapter: use --merge")
    base = apply.load_base(config.model)
    inputs = probe_inputs(base)
    untouched = predict(base, inputs)
    files: list[Path] = []
    failures: list[str] = []
    if config.finetune == "lora":
        files, failures = write_adapters(run, config, base, folder)
    del base  # one model at a time: each Stable Diffusion 1.5 takes 4 GB
    live = predict(live_model(run, config), inputs)
    if merge:
        save_pipeline(trained_base(run, config), folder / "merged")
        files.append(folder / "merged")
    checks = [check_file(file, config, inputs, live, untouched) for file in files]
    for name in GRIDS:
        copy_or_remove(run.path / name, folder / name)
    lines = [f"`{check.file.name}`: {check.summary}" for check in checks] + failures
    write_text(folder / "README.md", model_card(run, config, run.path.name, lines))
    return checks


def write_adapters(
    run: RunDir, config: Config, base: BaseModel, folder: Path
) -> tuple[list[Path], list[str]]:
    """Write the adapter in both layouts; return the files, and why one could not be written."""
    adapter = read_adapter(run.adapter, base, "export")
    diffusers_file, kohya_file = folder / ADAPTER_FILE, folder / f"{run.path.name}_kohya.safetensors"
    write_atomically(diffusers_file, lambda file: file.write(adapter.file.read_bytes()))
    try:
        metadata = kohya.metadata_of(adapter, config, run.status.read(), run.path.name)
        kohya.write_kohya(adapter, kohya_file, metadata)
    except UserError as error:
        return [diffusers_file], [str(error)]
    return [diffusers_file, kohya_file], []


def save_pipeline(base: BaseModel, folder: Path) -> None:
    """Save a base as a complete diffusers pipeline with its own scheduler, replacing the folder."""
    pipeline = make_pipeline(base)
    name = base.scheduler_config.get("_class_name", "")
    scheduler_class = getattr(diffusers, name, diffusers.DDIMScheduler)
    pipeline.scheduler = scheduler_class.from_config(base.scheduler_config)
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def copy_or_remove(source: Path, target: Path) -> None:
    """Copy a file, or remove the target if there is no source."""
    if source.is_file():
        write_atomically(target, lambda file: file.write(source.read_bytes()))
    else:
        target.unlink(missing_ok=True)


def remove(place: Path) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def check_file(
    file: Path, config: Config, inputs: Inputs, live: torch.Tensor, untouched: torch.Tensor
) -> Check:
    """Load an exported file and compare its noise_pred; remove the file if it is wrong.

    Raises:
        UserError: as check_prediction.
    """
    try:
        return check_prediction(file, predict(load_exported(file, config), inputs), live, untouched)
    except UserError as error:
        remove(file)
        raise UserError(f"{error}; the file was removed") from error


def load_exported(file: Path, config: Config) -> BaseModel:
    """Load a pipeline's folder, or a fresh base with an adapter's file on it."""
    if file.is_dir():
        return load(str(file))
    base = apply.load_base(config.model)
    load_adapters(base, [(read_adapter(file, base, "export"), 1.0)])
    return base


def live_model(run: RunDir, config: Config) -> BaseModel:
    """Rebuild the model of the best epoch as in training: base, adapter layers, the checkpoint's weights."""
    module = GhibliModule(config, apply.load_base(config.model))
    load_weights(module, run.best_checkpoint)
    return module.eval().base


def probe_inputs(base: BaseModel) -> Inputs:
    """Make fixed inputs: latents (2, 4, 16, 16), timesteps (2,), input_ids (2, 77)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, base.unet.config.in_channels, 16, 16, generator=generator)
    return latents, torch.tensor([250, 750]), base.tokenize(["a house by a lake", ""])


@torch.inference_mode()
def predict(base: BaseModel, inputs: Inputs) -> torch.Tensor:
    """Predict the noise of probe_inputs on the CPU: (2, 4, 16, 16)."""
    latents, timesteps, input_ids = inputs
    base.to(torch.device("cpu"))
    return base.unet(latents, timesteps, base.encode_prompts(input_ids), return_dict=False)[0].clone()


def check_prediction(
    file: Path, noise_pred: torch.Tensor, live: torch.Tensor, untouched: torch.Tensor
) -> Check:
    """Compare a file's noise_pred with those of the live model and of the untouched base.

    Raises:
        UserError: too far from the live model, or no different from the base.
    """
    largest = live.abs().max().item()
    check = Check(
        file,
        (noise_pred - live).abs().max().item() / largest,
        (noise_pred - untouched).abs().max().item() / largest,
    )
    if not check.from_live < TOLERANCE:
        raise UserError(
            f"{file} does not reproduce the trained model: its predicted noise is off by "
            f"{check.from_live:.1g} of the largest value (please report this)"
        )
    if not check.from_base > 10 * max(check.from_live, 1e-7):
        raise UserError(
            f"{file} changes nothing: the base's predicted noise is within {check.from_base:.1g}; was the "
            "learning rate zero?"
        )
    return check
