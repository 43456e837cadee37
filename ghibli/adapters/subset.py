"""Part of an adapter: some of its layers, of some only the largest singular values; and its file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save

from ghibli.adapters.factorize import singular, to_lora, update_of
from ghibli.adapters.files import Adapter, is_plain
from ghibli.adapters.layers import Layer, LoRA, at_alpha
from ghibli.adapters.lora import diffusers_key
from ghibli.adapters.names import named_layers
from ghibli.adapters.read import sort_keys
from ghibli.adapters.settings import METADATA
from ghibli.models.base import BaseModel
from ghibli.models.safetensors import with_sorted_metadata
from ghibli.runtime.files import write_atomically

L = TypeVar("L", bound=Layer)


@dataclass(frozen=True)
class Parts:
    """What a layer can be cut down to: its singular values, or, of what is no plain LoRA, only all of it."""

    layer: Layer
    weight: torch.Tensor  # of the base, whose shape the update has
    values: torch.Tensor  # singular values (r,), largest first; one value for a layer that stays whole
    left: torch.Tensor | None = None  # (out, r)
    right: torch.Tensor | None = None  # (r, inputs)

    @property
    def shares(self) -> list[float]:
        """The share of the squared norm in each part, largest first; those of 0 are left out."""
        energy = self.values.double().square()
        total = float(energy.sum())
        return [float(each) / total for each in energy if float(each) > 1e-12 * total]

    @property
    def parameters(self) -> int:
        """Numbers in the file for one part."""
        if self.left is None or self.right is None:
            return parameters_of(self.layer)
        return self.left.shape[0] + self.right.shape[1]

    def first(self, count: int) -> Layer:
        """Return the layer cut down to its `count` largest parts; with all of them, the layer itself."""
        if self.left is None or self.right is None or count >= len(self.shares) == self.layer.rank:
            return self.layer
        root = self.values[:count].sqrt()
        factors = self.left[:, :count] * root, root[:, None] * self.right[:count]
        return to_lora(factors, self.weight, self.layer.dtype)


def parameters_of(layer: Layer) -> int:
    """Count the numbers that a layer takes in a file."""
    tensors = [*layer.tensors.values(), *([] if layer.magnitude is None else [layer.magnitude])]
    return sum(tensor.numel() for tensor in tensors)


def at_rank(layer: L) -> L:
    """Return a plain LoRA with alpha / rank multiplied into B, so that alpha is the rank; else the layer."""
    return at_alpha(layer, float(layer.rank)) if isinstance(layer, LoRA) else layer


@torch.no_grad()
def split(adapter: Adapter, base: BaseModel) -> dict[str, Parts]:
    """Split every layer into its singular values, on the CPU in float64.

    Only a plain LoRA keeps its kind at a smaller rank; any other layer is one part, whose size is 1, or 0
    where it changes nothing.
    """
    known, found = named_layers(base), {}
    for name, layer in adapter.layers.items():
        layer, weight = at_rank(layer), known[name].weight.detach().cpu()
        if isinstance(layer, LoRA) and layer.is_plain:
            left, values, right = singular(update_of(layer, weight))
            found[name] = Parts(layer, weight, values, left, right)
        else:
            changes = bool(layer.delta(weight.double()).any())
            found[name] = Parts(layer, weight, torch.tensor([float(changes)]))
    return found


def write_subset(whole: Adapter, layers: dict[str, Layer], base: BaseModel, file: Path) -> None:
    """Write part of an adapter for diffusers' `load_lora_weights`, as lora.save_adapter writes the whole.

    A plain LoRA's layers all get alpha = rank, each its own rank, which the settings name too, for versions
    of diffusers that do not take alpha for the rank. Of any other kind the tensors are copied.

    Args:
        whole: the adapter that the layers are of.
        layers: by name, those to write.
    """
    settings = json.loads(whole.metadata.get(METADATA, "{}"))
    if is_plain(whole):
        plain = {name: layer for name, layer in layers.items() if isinstance(layer, LoRA)}
        tensors = plain_tensors(plain)
        settings |= rank_settings(plain)
    else:
        content = load_file(whole.file)
        found = sort_keys(content, base, str(whole.file))
        tensors = {key: content[key] for name in layers for key in found[name].keys.values()}
    settings |= {f"{part}.target_modules": paths_in(part, layers) for part in parts_in(layers)}
    settings = {key: value for key, value in settings.items() if key.partition(".")[0] in parts_in(layers)}
    metadata = {"format": "pt"}
    if METADATA in whole.metadata:
        metadata[METADATA] = json.dumps(settings, indent=2, sort_keys=True)
    content_written = with_sorted_metadata(save(tensors, metadata))
    write_atomically(file, lambda opened: opened.write(content_written))


def parts_in(layers: dict[str, Layer]) -> set[str]:
    """Return the parts of the base, unet or text_encoder, that some layers are in."""
    return {name.partition(".")[0] for name in layers}


def paths_in(part: str, layers: dict[str, Layer]) -> list[str]:
    """Return the names of the layers in one part, as they are called there."""
    return sorted(name.partition(".")[2] for name in layers if name.startswith(f"{part}."))


def plain_tensors(layers: dict[str, LoRA]) -> dict[str, torch.Tensor]:
    """Return the tensors of a diffusers file; alpha is the rank there."""
    tensors = {}
    for name, layer in layers.items():
        part, _, path = name.partition(".")
        tensors[diffusers_key(part, f"{path}.lora_A.weight")] = layer.down.contiguous()
        tensors[diffusers_key(part, f"{path}.lora_B.weight")] = at_rank(layer).up.contiguous()
    return tensors


def rank_settings(layers: dict[str, LoRA]) -> dict[str, Any]:
    """Return PEFT's settings of the ranks, and of alphas that equal them."""
    found: dict[str, Any] = {}
    for part in parts_in(dict(layers)):
        ranks = {
            name.partition(".")[2]: layer.rank
            for name, layer in sorted(layers.items())
            if name.startswith(f"{part}.")
        }
        usual = max(ranks.values())
        others = {path: rank for path, rank in ranks.items() if rank != usual}
        found |= {
            f"{part}.r": usual, f"{part}.lora_alpha": usual, f"{part}.rank_pattern": others,
            f"{part}.alpha_pattern": others, f"{part}.use_rslora": False, f"{part}.lora_dropout": 0.0,
        }  # fmt: skip
    return found
