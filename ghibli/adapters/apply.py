"""Adapters on a base: merged into its weights, or added beside them with weights that can be changed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ghibli.adapters.files import Adapter, layer_name, read_adapter
from ghibli.config.schema import ModelConfig
from ghibli.models.base import BaseModel, resolve_path
from ghibli.models.load import load, quiet
from ghibli.models.pipeline import make_pipeline
from ghibli.models.safetensors import ADAPTER_FILE, check_whole
from ghibli.runtime.errors import UserError, first_line


def load_base(model: ModelConfig) -> BaseModel:
    """Load the base that a run starts from: model.path, with model.adapter merged into it."""
    base = load(model.path, model.config)
    if model.adapter is not None:
        merge(base, resolve_path(model.adapter), model.adapter_scale)
    return base


def merge(base: BaseModel, folder: Path, scale: float) -> None:
    """Merge an adapter into the base's weights, in place: W + scale (alpha / rank) B A.

    Args:
        folder: holds pytorch_lora_weights.safetensors, in diffusers' or kohya's layout.

    Raises:
        UserError: no such file, or an adapter that does not fit this base.
    """
    file, what = folder / ADAPTER_FILE, f"model.adapter={folder}"
    if not file.is_file():
        others = [other.name for other in sorted(folder.glob("*.safetensors"))]
        hint = f"; rename {others[0]} to that" if others else ""
        raise UserError(f"{what}: no {ADAPTER_FILE} there{hint}")
    check_whole(file, what)
    try:
        adapter = read_adapter(file, base, "its file")
    except UserError as error:
        raise UserError(f"{what} does not fit the base: {error}") from error
    pipeline = make_pipeline(base)
    add_adapter(pipeline, base, adapter, "merged", what)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    freeze(base)


def load_adapters(base: BaseModel, adapters: Iterable[tuple[Adapter, float]]) -> None:
    """Add adapters to the base with diffusers' own loader, each at its weight; W stays as it is.

    Each layer adds the weighted sum of all adapters, so a weight of 0 is the base, bit for bit.

    Raises:
        UserError: a file that diffusers cannot read.
    """
    pipeline, weights = make_pipeline(base), {}
    for number, (adapter, weight) in enumerate(adapters):
        add_adapter(pipeline, base, adapter, f"adapter_{number}", str(adapter.file))
        weights[f"adapter_{number}"] = weight
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))
    freeze(base)


def add_adapter(pipeline: Any, base: BaseModel, adapter: Adapter, name: str, what: str) -> None:
    """Load an adapter's file into the pipeline of a base under a name, and check that all of it arrived.

    Raises:
        UserError: diffusers cannot read the file, or leaves some of it out.
    """
    try:
        # Silenced: diffusers and PEFT only log the layers that they leave out. read_adapter has matched
        # every tensor of the file with a layer of the base; that each layer arrived is checked below.
        with quiet("diffusers", "transformers", "peft"):
            pipeline.load_lora_weights(
                adapter.file.parent, weight_name=adapter.file.name, adapter_name=name, use_safetensors=True
            )
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{what} does not fit the base: {first_line(error)}") from error
    lost = sorted(set(adapter.layers) - adapted_layers(base, name))
    if lost:
        raise UserError(
            f"{what} does not fit the base: diffusers leaves out {len(lost)} of its {len(adapter.layers)} "
            f"layers, such as {lost[0]}"
        )


def adapted_layers(base: BaseModel, name: str) -> set[str]:
    """Name the layers that the adapter `name` changes, as Adapter.layers does."""
    return {
        layer_name(part, path)
        for part, module in base.adaptable.items()
        for path, layer in module.named_modules()
        if name in getattr(layer, "lora_A", ())
    }


def set_weights(base: BaseModel, weights: list[float]) -> None:
    """Change the weights of the adapters that load_adapters added, in their order."""
    make_pipeline(base).set_adapters([f"adapter_{number}" for number in range(len(weights))], weights)


def freeze(base: BaseModel) -> None:
    """Make everything that an adapter may have touched untrainable, in eval mode."""
    for part in base.adaptable.values():
        part.requires_grad_(False).eval()
