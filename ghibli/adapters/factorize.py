r"""Updates as few singular values as they need: shrink an adapter, add several, extract one from a model.

By Eckart and Young (1936), the r largest singular values and their vectors are the matrix of rank r nearest
to an update, and the squares of the values left out add up to its squared distance. An update in factors,
B A, is not multiplied out: with B = Q R and A^T = P T, its singular values are those of the small R T^T.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ghibli.adapters.files import Adapter
from ghibli.adapters.layers import Full, Layer, LoRA
from ghibli.adapters.names import named_layers
from ghibli.adapters.request import Size
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError
from ghibli.runtime.wording import number_of

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r) and A (r, inputs), float64


@dataclass(frozen=True)
class Reworked:
    """Layers in factors, and the share of the whole update's squared norm that they keep."""

    layers: dict[str, Layer]
    kept: float

    @property
    def summary(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers.values() if layer.rank is not None})
        sizes = f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "whole differences"
        sizes = f"rank {ranks[0]}" if len(ranks) == 1 else sizes
        layers, kept = number_of(len(self.layers), "layer"), f"{100 * self.kept:.4g} %"
        return f"{layers}, {sizes}, {kept} of the update's squared norm"


def resize(adapter: Adapter, base: BaseModel, size: Size) -> Reworked:
    """Shrink every layer of an adapter to its largest singular values.

    A plain LoRA is split from its factors, any other kind from its difference W' - W.
    """
    known = named_layers(base)
    updates = (
        (name, update_of(layer, known[name].weight), layer.dtype) for name, layer in adapter.layers.items()
    )
    return shrink(updates, base, size)


def combine(adapters: list[tuple[Adapter, float]], base: BaseModel, size: Size | None) -> Reworked:
    """Add adapters, each at its weight: exactly, by concatenating their factors, or at a smaller size.

    A layer in which one of them is no plain LoRA becomes the sum of the differences. The factors are float32.

    Args:
        size: None = exactly.

    Raises:
        UserError: a weight that is not finite.
    """
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise UserError(f"{adapter.file}: its weight {weight} is not a finite number")
    known = named_layers(base)
    names = sorted({name for adapter, _ in adapters for name in adapter.layers})
    sums: dict[str, Factors | torch.Tensor] = {}
    for name in names:
        parts = [(adapter.layers[name], weight) for adapter, weight in adapters if name in adapter.layers]
        updates = [(update_of(layer, known[name].weight), weight) for layer, weight in parts]
        pairs = [(update, weight) for update, weight in updates if isinstance(update, tuple)]
        if len(pairs) == len(updates):
            sums[name] = (
                torch.cat([update[0] * weight for update, weight in pairs], dim=1),
                torch.cat([update[1] for update, _ in pairs]),
            )
        else:
            sums[name] = torch.stack([weight * multiplied(update) for update, weight in updates]).sum(dim=0)
    if size is not None:
        return shrink(((name, update, torch.float32) for name, update in sums.items()), base, size)
    layers: dict[str, Layer] = {}
    for name, update in sums.items():
        weight = known[name].weight
        if isinstance(update, tuple):
            layers[name] = to_lora(update, weight)
        else:
            layers[name] = Full(diff=update.float().reshape(weight.shape))
    return Reworked(layers, 1.0)


def extract(tuned: BaseModel, base: BaseModel, size: Size) -> tuple[Reworked, list[str]]:
    """Extract what a fully fine-tuned model adds to its base, layer by layer.

    Returns:
        The layers that differ, and the names of other weights that differ (norms, biases, the VAE), which no
        LoRA can hold.

    Raises:
        UserError: the two have different shapes, or are equal.
    """
    ours, theirs = named_layers(base), named_layers(tuned)
    differing = []
    for name, layer in theirs.items():
        if name not in ours or ours[name].weight.shape != layer.weight.shape:
            raise UserError(f"{name} has another shape in the base: the model was not trained from it")
        if not torch.equal(layer.weight, ours[name].weight):
            differing.append(name)
    if not differing:
        raise UserError("the two models have the same weights in every layer: there is nothing to extract")
    changes = (
        (name, theirs[name].weight.double().flatten(1) - ours[name].weight.double().flatten(1), torch.float32)
        for name in differing
    )
    return shrink(changes, base, size), other_differences(tuned, base)


def other_differences(tuned: BaseModel, base: BaseModel) -> list[str]:
    """Name the weights that differ between two models, but for those of linear and convolution layers."""
    found = []
    for part in ("unet", "text_encoder", "vae"):
        one, other = getattr(tuned, part), getattr(base, part).state_dict()
        own = {id(layer.weight) for layer in named_layers(tuned).values()}
        for name, weight in one.named_parameters():
            if id(weight) not in own and (name not in other or not torch.equal(weight, other[name])):
                found.append(f"{part}.{name}")
    return found


@torch.no_grad()
def shrink(
    updates: Iterable[tuple[str, Factors | torch.Tensor, torch.dtype]], base: BaseModel, size: Size
) -> Reworked:
    """Reduce updates to a size, one layer at a time.

    Args:
        updates: (name of the layer, its update, the dtype of its new factors).
    """
    known = named_layers(base)
    layers: dict[str, Layer] = {}
    kept = whole = 0.0
    for name, update, dtype in updates:
        left, values, right = singular(update)
        rank = size.rank_of(values)
        root = values[:rank].sqrt()
        factors = (left[:, :rank] * root, root[:, None] * right[:rank])
        layers[name] = to_lora(factors, known[name].weight, dtype)
        kept += float(values[:rank].square().sum())
        whole += float(values.square().sum())
    return Reworked(layers, kept / whole if whole else 1.0)


def singular(update: Factors | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (out, r), the singular values (r,), largest first, and V^T (r, inputs) of an update."""
    if isinstance(update, torch.Tensor):
        return torch.linalg.svd(update, full_matrices=False)
    up, down = update
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return torch.linalg.svd(up @ down, full_matrices=False)
    (left, inner), (right, other) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    rotation, values, turned = torch.linalg.svd(inner @ other.T)
    return left @ rotation, values, turned @ right.T


@torch.no_grad()
def update_of(layer: Layer, weight: torch.Tensor) -> Factors | torch.Tensor:
    """Return an update in float64: the two factors of a plain LoRA, else W' - W as a matrix (out, inputs)."""
    if isinstance(layer, LoRA) and layer.is_plain:
        return layer.up.double().flatten(1) * layer.scale, layer.down.double().flatten(1)
    return layer.delta(weight.double()).flatten(1)


def multiplied(update: Factors | torch.Tensor) -> torch.Tensor:
    """Return an update as one matrix."""
    return update if isinstance(update, torch.Tensor) else update[0] @ update[1]


def to_lora(factors: Factors, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> LoRA:
    """Return factors as a plain LoRA with alpha = rank, for a layer with the shape of `weight`."""
    up, down = (factor.to(dtype) for factor in factors)
    rank, ones = len(down), (1,) * (weight.ndim - 2)
    return LoRA(
        down=down.reshape(rank, *weight.shape[1:]), up=up.reshape(len(up), rank, *ones), alpha=float(rank)
    )


def metadata_after(adapters: list[Adapter], reworked: Reworked, title: str) -> dict[str, str]:
    """Keep the first file's metadata of training and model, with rank, alpha and title of the new file."""
    first = adapters[0].metadata if adapters else {}
    is_plain = all(isinstance(layer, LoRA) for layer in reworked.layers.values())
    own = {key: text for key, text in first.items() if key.startswith(("ss_", "modelspec."))}
    ranks = sorted({layer.rank for layer in reworked.layers.values() if layer.rank is not None})
    size = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    return own | {
        "ss_network_module": "networks.lora" if is_plain else "lycoris.kohya",
        "ss_network_dim": size, "ss_network_alpha": size,
        "ss_output_name": title, "modelspec.title": title,
    }  # fmt: skip
