"""Adapters on a base: merged into its weights, or added beside them with weights that can be changed."""

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Layer, LoRA, to_factors
from ghibli.adapters.names import layer_name, layer_paths, named_layers
from ghibli.config.checks import require
from ghibli.config.paths import adapter_in
from ghibli.config.schema import ModelConfig
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.safetensors import check_whole
from ghibli.runtime.errors import UserError


def load_base(model: ModelConfig) -> BaseModel:
    """Load the base that a run starts from: model.path, with model.adapter merged into it, and clip_skip.

    Raises:
        UserError: as load and merge, or the text encoder has too few layers.
    """
    base = load(model.path, model.config)
    layers = base.text_encoder.config.num_hidden_layers
    require(model.clip_skip <= layers, "model.clip_skip", model.clip_skip, f"from 1 to {layers}, its layers")
    base.clip_skip = model.clip_skip
    if model.adapter is not None:
        merge(base, model.adapter, model.adapter_scale)
    return base


def merge(base: BaseModel, folder: str | Path, scale: float) -> None:
    """Merge an adapter into the base's weights, in place: W + scale (W' - W).

    Args:
        folder: as model.adapter; holds pytorch_lora_weights.safetensors, in any layout.

    Raises:
        UserError: no such file, or an adapter that does not fit this base.
    """
    file, what = adapter_in(str(folder)), f"model.adapter={folder}"
    check_whole(file, what)
    try:
        adapter = read_adapter(file, base, "its file")
    except UserError as error:
        raise UserError(f"{what} does not fit the base: {error}") from error
    add_to_weights(base, adapter, scale)
    freeze(base)


@torch.no_grad()
def add_to_weights(base: BaseModel, adapter: Adapter, scale: float) -> None:
    """Add scale (W' - W) to every weight that an adapter changes, one layer at a time.

    Raises:
        UserError: as change_of.
    """
    known = named_layers(base)
    for name, layer in adapter.layers.items():
        weight = known[name].weight
        weight.add_(change_of(layer, weight, scale, f"{adapter.file}: {name}"))


@torch.no_grad()
def change_of(layer: Layer, weight: torch.Tensor, scale: float, where: str) -> torch.Tensor:
    """Return scale (W' - W) in the dtype of the base's weight W.

    A plain LoRA's is computed in that dtype, as PEFT merges it; any other in float64.

    Args:
        where: the layer, for messages.

    Raises:
        UserError: an update that is not finite.
    """
    exact = weight if isinstance(layer, LoRA) and layer.is_plain else weight.double()
    change = (layer.delta(exact) * scale).to(weight)
    check_finite(change, where)
    return change


def load_adapters(base: BaseModel, adapters: Iterable[tuple[Adapter, float]]) -> None:
    """Add adapters to the base as PEFT's layers, each at its weight; W stays as it is.

    Each layer adds the weighted sum of all adapters, so a weight of 0 is the base, bit for bit. What is
    no plain LoRA is added as its whole difference W' - W, of the untouched base: any kind can be scaled
    and combined.

    Raises:
        UserError: an update or a weight that is not finite.
    """
    weights = []
    for number, (adapter, weight) in enumerate(adapters):
        add_adapter(base, adapter, adapter_name(number))
        weights.append(weight)
    if weights:
        set_weights(base, weights)
    freeze(base)


def adapter_name(number: int) -> str:
    """Name the adapters that load_adapters adds, in PEFT."""
    return f"adapter_{number}"


@torch.no_grad()
def add_adapter(base: BaseModel, adapter: Adapter, name: str) -> None:
    """Add the layers of an adapter under a name, at weight 1, and check that all of them arrived.

    PEFT makes the layers; their matrices are put in here, since its own loaders match names by patterns
    and only log what they leave out.

    Raises:
        UserError: an update that is not finite.
    """
    paths = layer_paths(base)
    for part, module in base.adaptable.items():
        own = {paths[each][1]: layer for each, layer in adapter.layers.items() if paths[each][0] == part}
        if not own:
            continue
        config = PeftConfig(r=1, lora_alpha=1, target_modules=list(own), init_lora_weights=False)
        inject_adapter_in_model(config, module, name, low_cpu_mem_usage=True)
        vars(module).pop("peft_config", None)  # a record that nothing reads; PEFT warns of a second one
        for path, layer in own.items():
            put_factors(module.get_submodule(path), name, layer, f"{adapter.file}: {path}")
    lost = set(adapter.layers) ^ adapted_layers(base, name)
    if lost:
        raise UserError(f"{adapter.file}: PEFT did not add its layer {min(lost)}; please report this")


def put_factors(target: Any, name: str, layer: Layer, where: str) -> None:
    """Put A and B of an update into a PEFT layer, at weight 1.

    Args:
        target: PEFT's layer around a linear or convolution layer of the base.
        where: the layer, for messages.

    Raises:
        UserError: an update that is not finite.
    """
    down, up = to_factors(layer, target.get_base_layer().weight)
    check_finite(down, where)
    check_finite(up, where)
    for factor, matrix in ((target.lora_A[name], down), (target.lora_B[name], up)):
        factor.weight = nn.Parameter(matrix, requires_grad=False)
        sizes = ("out_features", "in_features") if matrix.ndim == 2 else ("out_channels", "in_channels")
        for attribute, size in zip(sizes, matrix.shape, strict=False):
            setattr(factor, attribute, size)
    target.r[name] = target.lora_alpha[name] = down.shape[0]
    target.set_scale(name, 1.0)


def adapted_layers(base: BaseModel, name: str) -> set[str]:
    """Name the layers that the adapter `name` changes at its own weight, as Adapter.layers does."""
    return {
        layer_name(part, path)
        for part, module in base.adaptable.items()
        for path, layer in module.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A and layer.scaling[name] == 1
    }


def set_weights(base: BaseModel, weights: list[float]) -> None:
    """Change the weights of the adapters that load_adapters added, in their order.

    Raises:
        UserError: a weight that is not finite.
    """
    for weight in weights:
        if not isfinite(weight):
            raise UserError(f"an adapter cannot have the weight {weight}: give a finite number")
    names = [adapter_name(number) for number in range(len(weights))]
    for module in base.adaptable.values():
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(names)
                for name, weight in zip(names, weights, strict=True):
                    layer.set_scale(name, weight)


def check_finite(matrix: torch.Tensor, where: str) -> None:
    """Raise a UserError for an update whose numbers are finite in the file, but not multiplied out."""
    if not matrix.isfinite().all():
        raise UserError(f"{where}: its update is not finite (NaN or infinity) once multiplied out")


def freeze(base: BaseModel) -> None:
    """Make everything that an adapter may have touched untrainable, in eval mode."""
    for part in base.adaptable.values():
        part.requires_grad_(False).eval()
