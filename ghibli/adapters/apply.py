"""Adapters on a base: merged into its weights, or loaded into a pipeline and scaled."""

from collections.abc import Iterable
from pathlib import Path

from diffusers import DDPMScheduler, StableDiffusionPipeline

from ghibli.adapters.files import Adapter
from ghibli.config.schema import ModelConfig
from ghibli.models.base import BaseModel, resolve_path
from ghibli.models.load import load, quiet
from ghibli.models.safetensors import ADAPTER_FILE, check_whole
from ghibli.runtime.errors import UserError, first_line


def load_base(model: ModelConfig) -> BaseModel:
    """The base that a run starts from: model.path, with model.adapter merged into it."""
    base = load(model.path, model.config)
    if model.adapter is not None:
        merge(base, resolve_path(model.adapter), model.adapter_scale)
    return base


def merge(base: BaseModel, folder: Path, scale: float) -> None:
    """Adds `scale` times an adapter to the base's own weights, for good: W + scale (alpha / rank) B A.

    Args:
        folder: holds pytorch_lora_weights.safetensors, in any layout diffusers reads.

    Raises:
        UserError: no such file, or an adapter that does not fit this base.
    """
    if not (folder / ADAPTER_FILE).is_file():
        others = [file.name for file in sorted(folder.glob("*.safetensors"))]
        hint = f"; rename {others[0]} to that" if others else ""
        raise UserError(f"model.adapter={folder}: no {ADAPTER_FILE} there{hint}")
    check_whole(folder / ADAPTER_FILE, f"model.adapter={folder}")
    pipeline = StableDiffusionPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet,
        DDPMScheduler.from_config(base.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    try:
        with quiet("diffusers", "transformers", "peft"):
            pipeline.load_lora_weights(folder, weight_name=ADAPTER_FILE, use_safetensors=True)
            pipeline.fuse_lora(lora_scale=scale)
            pipeline.unload_lora_weights()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"model.adapter={folder} does not fit the base: {first_line(error)}") from error
    for part in (base.text_encoder, base.unet):
        part.requires_grad_(False).eval()


def pipeline_of(base: BaseModel) -> StableDiffusionPipeline:
    """diffusers' pipeline around the base's own parts."""
    return StableDiffusionPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet,
        DDPMScheduler.from_config(base.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def load_adapters(base: BaseModel, adapters: Iterable[tuple[Adapter, float]]) -> None:
    """Puts adapters on the base, each at its weight, by diffusers' own loader; W itself stays as it is.

    The sum of all is added to each layer, so the weights act linearly and 0 is the base to the bit.

    Raises:
        UserError: a file that diffusers cannot read.
    """
    pipeline, weights = pipeline_of(base), {}
    for number, (adapter, weight) in enumerate(adapters):
        name = f"adapter_{number}"
        try:
            with quiet("diffusers", "transformers", "peft"):
                pipeline.load_lora_weights(
                    adapter.file.parent, weight_name=adapter.file.name, adapter_name=name,
                    use_safetensors=True,
                )  # fmt: skip
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{adapter.file} does not fit the base: {first_line(error)}") from error
        weights[name] = weight
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))
    for part in (base.unet, base.text_encoder):
        part.requires_grad_(False).eval()


def scale(base: BaseModel, weights: list[float]) -> None:
    """Changes the weights of the adapters that it wears, in their order."""
    names = [f"adapter_{number}" for number in range(len(weights))]
    pipeline_of(base).set_adapters(names, weights)
