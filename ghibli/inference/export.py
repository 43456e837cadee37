"""A run's result as files for other tools, each loaded into a clean base and compared before it counts."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from ghibli.adapters import apply, kohya
from ghibli.adapters.apply import load_adapters, pipeline_of
from ghibli.adapters.files import read_adapter
from ghibli.adapters.model_card import model_card
from ghibli.adapters.trained import trained_base
from ghibli.config.schema import Config
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.safetensors import ADAPTER_FILE
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_text
from ghibli.training.callbacks.checkpoints import load_weights
from ghibli.training.module import GhibliModule

SAME = 1e-4  # of the largest predicted noise: a file that differs more from the live model is refused
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # latents, timesteps, input_ids
IMAGES = ("samples/adapter.png", "samples/fine-tuned.png", "evaluation.png")


@dataclass(frozen=True)
class Proof:
    """How a file compares, relative to the largest value of the live model's predicted noise."""

    file: Path
    from_live: float  # largest difference from the live model: about 0
    from_base: float  # from the untouched base: what the file changes

    @property
    def words(self) -> str:
        return (
            f"loaded anew, its predicted noise is within {self.from_live:.1g} of the trained model's and "
            f"{self.from_base:.2g} from the base's (of the largest value)"
        )


def export(run: RunDir, config: Config, folder: Path, *, merge: bool) -> list[Proof]:
    """Writes a run's files for other tools, a model card and its grids into `folder`.

    Args:
        merge: also the whole pipeline with the adapter merged in, as a diffusers folder.

    Raises:
        UserError: nothing was trained, or a written file does not do what the live model does.
    """
    if config.finetune == "none":
        raise UserError(f"{run.path} only measured the base: there is nothing to export")
    if config.finetune == "full" and not merge:
        raise UserError(f"{run.path} trained all weights, which no adapter holds: ghibli export --merge")
    base = apply.load_base(config.model)
    inputs = probe_inputs(base)
    untouched = predict(base, inputs)
    files, notes = [], []
    if config.finetune == "lora":
        files, notes = write_adapters(run, config, base, folder)
    del base  # one model at a time: with Stable Diffusion 1.5 each takes 4 GB
    live = predict(live_model(run, config), inputs)
    if merge:
        save_pipeline(trained_base(run, config), folder / "merged")
        files.append(folder / "merged")
    proofs = [prove(file, config, inputs, live, untouched) for file in files]
    for name in IMAGES:
        copy_or_remove(run.path / name, folder / name)
    lines = [f"`{proof.file.name}`: {proof.words}" for proof in proofs] + notes
    write_text(folder / "README.md", model_card(run, config, run.path.name, lines))
    return proofs


def write_adapters(
    run: RunDir, config: Config, base: BaseModel, folder: Path
) -> tuple[list[Path], list[str]]:
    """The adapter in diffusers' and kohya's layout: files, and why one of them cannot be written."""
    adapter = read_adapter(run.adapter, base, "export")
    plain, other = folder / ADAPTER_FILE, folder / f"{run.path.name}_kohya.safetensors"
    write_atomically(plain, lambda file: file.write(adapter.file.read_bytes()))
    try:
        metadata = kohya.metadata_of(adapter, config, run.read_status(), run.path.name)
        kohya.write_kohya(adapter, other, metadata)
    except UserError as mistake:
        return [plain], [str(mistake)]
    return [plain, other], []


def save_pipeline(base: BaseModel, folder: Path) -> None:
    """A base as a whole diffusers pipeline, with the scheduler it came with; replaces what is there."""
    pipeline = pipeline_of(base)
    kind = getattr(diffusers, base.scheduler_config.get("_class_name", ""), diffusers.DDIMScheduler)
    pipeline.scheduler = kind.from_config(base.scheduler_config)
    started = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(started, ignore_errors=True)
    pipeline.save_pretrained(started, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    started.rename(folder)


def copy_or_remove(source: Path, target: Path) -> None:
    """The target as the source is: a copy, or not there."""
    if source.is_file():
        write_atomically(target, lambda file: file.write(source.read_bytes()))
    else:
        target.unlink(missing_ok=True)


def remove(place: Path) -> None:
    """A file or a folder."""
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def prove(file: Path, config: Config, inputs: Inputs, live: torch.Tensor, untouched: torch.Tensor) -> Proof:
    """Loads what was written and compares it.

    Raises:
        UserError: it does not do its work, and is taken away again.
    """
    try:
        return compare(file, predict(loaded(file, config), inputs), live, untouched)
    except UserError:
        remove(file)
        raise


def loaded(file: Path, config: Config) -> BaseModel:
    """A pipeline's folder, or a fresh base that wears an adapter's file."""
    if file.is_dir():
        return load(str(file))
    base = apply.load_base(config.model)
    load_adapters(base, [(read_adapter(file, base, "export"), 1.0)])
    return base


def live_model(run: RunDir, config: Config) -> BaseModel:
    """The model as training had it at its best: base, fresh adapter layers, the checkpoint's weights."""
    module = GhibliModule(config, apply.load_base(config.model))
    load_weights(module, run.best_checkpoint)
    return module.eval().base


def probe_inputs(base: BaseModel) -> Inputs:
    """Fixed (latents (2, 4, 16, 16), timesteps (2,), input_ids (2, 77))."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, base.unet.config.in_channels, 16, 16, generator=generator)
    return latents, torch.tensor([250, 750]), base.tokenize(["a house by a lake", ""])


@torch.inference_mode()
def predict(base: BaseModel, inputs: Inputs) -> torch.Tensor:
    """noise_pred of probe_inputs, on the CPU."""
    latents, timesteps, input_ids = inputs
    base.to(torch.device("cpu"))
    return base.unet(latents, timesteps, base.encode_prompts(input_ids), return_dict=False)[0].clone()


def compare(file: Path, found: torch.Tensor, live: torch.Tensor, untouched: torch.Tensor) -> Proof:
    """How far a written file is from the live model and from the base.

    Raises:
        UserError: too far from the live model, or it changes nothing.
    """
    largest = live.abs().max().item()
    proof = Proof(
        file, (found - live).abs().max().item() / largest, (found - untouched).abs().max().item() / largest
    )
    if not proof.from_live < SAME:
        raise UserError(
            f"{file} was written and does not do what the trained model does: its predicted noise is off by "
            f"{proof.from_live:.1g} of the largest value; please report this"
        )
    if not proof.from_base > 10 * max(proof.from_live, 1e-7):
        raise UserError(
            f"{file} changes nothing: the base's predicted noise is within {proof.from_base:.1g}; was the "
            "learning rate zero?"
        )
    return proof
