"""Exporting a run for other tools; each file is loaded into a fresh base and checked against the run."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ghibli.adapters import apply, kohya
from ghibli.adapters.apply import load_adapters
from ghibli.adapters.files import read_adapter
from ghibli.adapters.model_card import model_card
from ghibli.adapters.sidecar import clean_name, write_sidecar
from ghibli.adapters.trained import run_base, trained_base
from ghibli.config.paths import ADAPTER_FILE
from ghibli.config.schema import Config, at_full_precision, describe
from ghibli.inference.owned import check_ours, prepared
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.save import has_original_layout, save_folder, save_single_file
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_text
from ghibli.training.callbacks.checkpoints import load_weights
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4  # largest difference from the live model, relative to its largest noise_pred
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # latents, timesteps, input_ids
GRIDS = ("samples/adapter.png", "samples/fine-tuned.png", "evaluation.png")
MERGED = "merged"  # the folder of a complete pipeline
V_NOTE = (
    "{file} predicts v, which ComfyUI and A1111 cannot tell from the weights of a Stable Diffusion 1: "
    "in ComfyUI add ModelSamplingDiscrete with v_prediction; for A1111 copy its configs/v1-inference.yaml "
    'beside the file, under its name, with `parameterization: "v"` among the params'
)
PNG = b"\x89PNG\r\n\x1a\n"


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

    All of it is prepared and verified in a hidden folder first: after a refusal, `folder` is as it was.

    Args:
        merge: also write the complete model, as a diffusers pipeline and as one checkpoint file.

    Raises:
        UserError: nothing was trained, a file of the user would be replaced, the base is another one than in
            training, or a file does not reproduce the live model.
    """
    if config.finetune == "none":
        raise UserError(f"{run.path} only measured the base: there is nothing to export")
    if config.finetune == "full" and not merge:
        raise UserError(f"{run.path} trained all weights, which do not fit into an adapter: use --merge")
    name = clean_name(run.path.resolve().name)
    checkpoint = f"{name}_{MERGED}.safetensors"
    adapters = [ADAPTER_FILE, f"{name}_kohya.safetensors", f"{name}_kohya.json"]
    names = ["README.md", *GRIDS, *adapters, *([MERGED, checkpoint] if merge else [])]
    check_ours(folder, names)
    with prepared(folder, names) as staging:
        checks = prepare(run, config, staging, name, checkpoint if merge else None)
    return [replace(check, file=folder / check.file.name) for check in checks]


def prepare(run: RunDir, config: Config, folder: Path, name: str, checkpoint: str | None) -> list[Check]:
    """Write and verify all files of an export in a folder of its own.

    Args:
        name: of the adapter, for other programs.
        checkpoint: file name of the complete model; None = none is wanted.
    """
    base = run_base(run, config)
    inputs = probe_inputs(base)
    untouched = predict(base, inputs)
    files, notes = write_adapters(run, config, base, folder, name) if config.finetune == "lora" else ([], [])
    del base  # one model at a time: each Stable Diffusion 1.5 takes 4 GB
    live = predict(live_model(run, at_full_precision(config)), inputs)
    if config.model.frozen_bits is not None:
        notes.append(quantization_note(run, config, inputs, live))
    if checkpoint is not None:
        merged, more = write_merged(run, config, folder, checkpoint)
        files, notes = files + merged, notes + more
    for note in notes:
        logger.warning(note)
    checks = [check_file(file, config, inputs, live, untouched) for file in files]
    grids = [grid for grid in GRIDS if copy_grid(run.path / grid, folder / grid)]
    lines = [f"`{check.file.name}`: {check.summary}" for check in checks] + notes
    written = [file.name for file in files]
    write_text(folder / "README.md", model_card(run, config, name, lines, written, next(iter(grids), None)))
    return checks


def write_adapters(
    run: RunDir, config: Config, base: BaseModel, folder: Path, name: str
) -> tuple[list[Path], list[str]]:
    """Write the adapter in both layouts; return the files, and why one could not be written."""
    adapter = read_adapter(run.adapter, base, "export")
    diffusers_file, kohya_file = folder / ADAPTER_FILE, folder / f"{name}_kohya.safetensors"
    write_atomically(diffusers_file, lambda file: file.write(adapter.file.read_bytes()))
    try:
        metadata = kohya.metadata_of(adapter, base, config, run.status.read(), kohya_file.stem)
        kohya.write_kohya(adapter, kohya_file, metadata, base)
    except UserError as error:
        return [diffusers_file], [f"no kohya file: {error}".replace(str(adapter.file), "this")]
    write_sidecar(kohya_file, config, base)
    return [diffusers_file, kohya_file], []


def write_merged(run: RunDir, config: Config, folder: Path, checkpoint: str) -> tuple[list[Path], list[str]]:
    """Write the complete model as a pipeline and as one file; return them, and what users must know."""
    base = trained_base(run, config)
    save_folder(base, folder / MERGED)
    if not has_original_layout(base):
        return [folder / MERGED], [
            "no single checkpoint file: Stable Diffusion 2's text encoder has another layout there"
        ]
    save_single_file(base, folder / checkpoint, {"modelspec.title": describe(config)})
    notes = [V_NOTE.format(file=checkpoint)] if base.prediction_type == "v_prediction" else []
    return [folder / MERGED, folder / checkpoint], notes


def copy_grid(source: Path, target: Path) -> bool:
    """Copy a grid of the run, and return whether there is one.

    A link, or what is no PNG, did not come from training.
    """
    if source.is_symlink() or source.parent.is_symlink() or not source.is_file():
        return False
    content = source.read_bytes()
    if content.startswith(PNG):
        write_atomically(target, lambda file: file.write(content))
    return content.startswith(PNG)


def check_file(
    file: Path, config: Config, inputs: Inputs, live: torch.Tensor, untouched: torch.Tensor
) -> Check:
    """Load an exported file and compare its noise_pred.

    Raises:
        UserError: as check_prediction.
    """
    try:
        return check_prediction(file, predict(load_exported(file, config), inputs), live, untouched)
    except UserError as error:
        raise UserError(f"{error}; nothing was written".replace(f"{file.parent}/", "")) from error


def load_exported(file: Path, config: Config) -> BaseModel:
    """Load a complete model, or a fresh base with an adapter's file on it."""
    if file.is_dir():
        return load(str(file))
    if file.stem.endswith(f"_{MERGED}"):
        return load(str(file), str(file.parent / MERGED))
    base = apply.load_base(config.model)
    load_adapters(base, [(read_adapter(file, base, "export"), 1.0)])
    return base


def live_model(run: RunDir, config: Config) -> BaseModel:
    """Rebuild the model of the best epoch as in training: base, adapter layers, the checkpoint's weights.

    The base has full precision, unless `config` says how many bits it had in training.
    """
    module = GhibliModule(config, apply.load_base(config.model))
    load_weights(module, run.best_checkpoint)
    return module.eval().base


def quantization_note(run: RunDir, config: Config, inputs: Inputs, live: torch.Tensor) -> str:
    """Say how far the adapter on the base of training, in 8 or 4 bits, is from the same on the full base.

    Args:
        live: noise_pred on the full base.
    """
    text = f"trained on a base in {config.model.frozen_bits} bits, and checked on the full one"
    try:
        trained = predict(live_model(run, config), inputs)
    except UserError as error:
        return f"{text}; how far apart the two are was not measured ({error})"
    apart = ((trained - live).abs().max() / live.abs().max()).item()
    return f"{text}: there its predicted noise is within {apart:.2g} of that in training"


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
