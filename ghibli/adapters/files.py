"""Adapter files in the two layouts people pass around, read for a given base.

diffusers names a layer as the model does (unet.down_blocks.0...to_q.lora.down.weight), kohya's scripts
with underscores (lora_unet_down_blocks_0_..._to_q.lora_down.weight). B A is scaled by alpha / rank.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ghibli.config.paths import NO_PICKLE, PICKLES, convert_command
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.models.safetensors import ADAPTER_FILE, check_whole
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError, first_line

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
SDXL = ("lora_te1_", "lora_te2_", "lora_unet_input_blocks_", "text_encoder_2.")
CONVERTED = {"unet": convert_unet_state_dict_to_peft, "text_encoder": convert_state_dict_to_peft}
METADATA = "lora_adapter_metadata"  # diffusers' name for PEFT's settings in a file


@dataclass(frozen=True)
class Layer:
    """What is added to one layer of the base: (alpha / rank) up down."""

    down: torch.Tensor  # (rank, in) or, for a convolution, (rank, in, k, k)
    up: torch.Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float
    magnitude: torch.Tensor | None = None  # (out,), DoRA alone

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One file, as it fits a base."""

    file: Path
    layout: str  # diffusers or kohya
    layers: dict[str, Layer]  # `unet.` or `text_encoder.` and the layer's name in the base
    metadata: dict[str, str]  # of the file, as it is

    @property
    def hash(self) -> str:
        """sha256 of the file, hex."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    @property
    def ranks(self) -> list[int]:
        return sorted({layer.rank for layer in self.layers.values()})

    @property
    def alphas(self) -> list[float]:
        return sorted({layer.alpha for layer in self.layers.values()})

    @property
    def targets(self) -> list[str]:
        """Endings of the names of its UNet layers, as lora.targets takes them."""
        return sorted({ending(name) for name in self.layers if name.startswith("unet.")})

    @property
    def has_text_encoder(self) -> bool:
        return any(name.startswith("text_encoder.") for name in self.layers)


def ending(name: str) -> str:
    """The part of a layer's name that says what it is: to_q, to_out.0, ff.net.0.proj, conv1."""
    parts = name.split(".")
    if "ff" in parts:
        return ".".join(parts[parts.index("ff") :])
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def written(value: float) -> str:
    """A number that reads back as the same one."""
    return str(int(value)) if value == int(value) else repr(value)


def find_file(path: str | Path, what: str) -> Path:
    """The adapter's file in a run's folder, in a folder, or itself.

    Args:
        what: the key or flag that named it, for messages.

    Raises:
        UserError: nothing there, several files, a pickle, or a file that is cut off.
    """
    place = Path(path).expanduser()
    if RunDir(place).config.is_file():
        place = RunDir(place).adapter
    if place.is_dir():
        found = sorted(place.glob("*.safetensors"))
        named = [file for file in found if file.name == ADAPTER_FILE]
        if not found or (len(found) > 1 and not named):
            which = f"several: {', '.join(file.name for file in found[:4])}; name one" if found else "none"
            raise UserError(f"{what} {path}: which .safetensors file? there is {which}")
        place = (named or found)[0]
    if not place.is_file():
        raise UserError(f"{what} {path}: no such file or run (`ghibli list` shows the runs)")
    if place.suffix in PICKLES:
        raise UserError(f"{what} {path}: {NO_PICKLE}; {convert_command([place])}")
    check_whole(place, what)
    return place


def read_adapter(path: str | Path, base: BaseModel, what: str) -> Adapter:
    """Reads an adapter of either layout for a base.

    Raises:
        UserError: as find_file, or the file is no adapter, or one of another base.
    """
    file = find_file(path, what)
    state = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if any(key.startswith(SDXL) for key in state):
        raise UserError(f"{what} {path} is an adapter of SDXL, and the base is Stable Diffusion 1 or 2")
    layout = "kohya" if any(key.startswith(tuple(KOHYA.values())) for key in state) else "diffusers"
    try:
        found = from_kohya(state, base) if layout == "kohya" else from_diffusers(state, metadata)
    except UserError:
        raise
    except (ValueError, KeyError, AttributeError) as error:  # of diffusers' conversion, of damaged notes
        raise UserError(f"{what} {path} cannot be read as a LoRA: {first_line(error)}") from error
    known = named_layers(base)
    strange = [name for name in found if name not in known] or [key for key in state if not found]
    if strange:
        raise UserError(
            f"{what} {path} is no LoRA of this base: it has `{strange[0][:80]}`, which the base has not"
        )
    for name, layer in found.items():
        check_fits(layer, known[name], f"{what} {path}: {name}")
    return Adapter(file, layout, found, metadata)


def named_layers(base: BaseModel) -> dict[str, nn.Module]:
    """Every linear and convolution layer of UNet and text encoder, those of an adapter left out."""
    found = {}
    for part, module in (("unet", base.unet), ("text_encoder", base.text_encoder)):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name:
                plain = name.removesuffix(".base_layer").removeprefix("text_model.")
                found[f"{part}.{plain}"] = layer
    return found


def check_fits(layer: Layer, target: nn.Module, where: str) -> None:
    """Raises a UserError unless an adapter's layer has the shape of the base's."""
    out_side, in_side = target.weight.shape[:2]
    shape = (layer.up.shape[0], layer.down.shape[1])
    if shape != (out_side, in_side):
        raise UserError(
            f"{where} maps {shape[1]} values to {shape[0]}, and the base's layer {in_side} to {out_side}: it "
            "was made for another base"
        )


def from_kohya(state: dict[str, torch.Tensor], base: BaseModel) -> dict[str, Layer]:
    """Layers by the base's own names; an unknown name stays as it is."""
    names = {kohya_name(name): name for name in named_layers(base)}
    found = {}
    for key, down in state.items():
        prefix, _, rest = key.partition(".")
        if rest != "lora_down.weight" or f"{prefix}.lora_up.weight" not in state:
            continue
        alpha = state.get(f"{prefix}.alpha")
        found[names.get(prefix, prefix)] = Layer(
            down, state[f"{prefix}.lora_up.weight"],
            float(down.shape[0] if alpha is None else alpha), state.get(f"{prefix}.dora_scale"),
        )  # fmt: skip
    return found


def kohya_name(name: str) -> str:
    """unet.mid_block.attentions.0... -> lora_unet_mid_block_attentions_0_..."""
    part, _, rest = name.partition(".")
    text = "text_model." if part == "text_encoder" else ""
    return KOHYA[part] + (text + rest).replace(".", "_")


def from_diffusers(state: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Layer]:
    """Layers by name, from diffusers' or PEFT's keys; without a note of alpha it is the rank."""
    notes = json.loads(metadata.get(METADATA, "{}"))
    found = {}
    for part, converted in CONVERTED.items():
        own = {key[len(part) + 1 :]: value for key, value in state.items() if key.startswith(f"{part}.")}
        plain = converted(own) if own else {}
        for key, down in plain.items():
            name = key.removesuffix(".lora_A.weight")
            if name == key or f"{name}.lora_B.weight" not in plain:
                continue
            found[f"{part}.{name.removeprefix('text_model.')}"] = Layer(
                down, plain[f"{name}.lora_B.weight"], noted_alpha(notes, part, name, down.shape[0]),
                plain.get(f"{name}.lora_magnitude_vector", plain.get(f"{name}.lora_magnitude_vector.weight")),
            )  # fmt: skip
    return found


def noted_alpha(notes: dict[str, Any], part: str, name: str, rank: int) -> float:
    """The alpha that scales a layer by alpha / rank, from PEFT's settings in the file."""
    pattern = notes.get(f"{part}.alpha_pattern") or {}
    alpha = pattern.get(name, notes.get(f"{part}.lora_alpha", rank))
    return float(alpha) * (rank**0.5 if notes.get(f"{part}.use_rslora") else 1.0)


def check_same_shape(adapter: Adapter, options: LoraConfig) -> None:
    """Raises a UserError unless fresh layers with these settings can take an adapter's weights."""
    alpha = options.alpha * (options.rank**0.5 if options.variant == "rslora" else 1)
    wanted = {
        "lora.rank": ([options.rank], adapter.ranks),
        "lora.alpha": ([alpha], adapter.alphas),
        "lora.targets": (sorted(options.targets), adapter.targets),
        "lora.text_encoder": ([options.text_encoder], [adapter.has_text_encoder]),
        "lora.variant": ([options.variant == "dora"], [is_dora(adapter)]),
    }  # fmt: skip
    other = [key for key, (ours, its) in wanted.items() if ours != its]
    if other:
        raise UserError(
            f"lora.init={options.init}: {', '.join(other)} of this run are not those of the file; "
            f"`ghibli import {options.init}` prints the settings to train on from it"
        )


def is_dora(adapter: Adapter) -> bool:
    return any(layer.magnitude is not None for layer in adapter.layers.values())


@torch.no_grad()
def start_from(adapter: Adapter, trainable: dict[str, nn.Parameter]) -> None:
    """Copies an adapter's weights into fresh layers of the same shape.

    Args:
        trainable: of lora.trainable.
    """
    filled = set()
    for name, parameter in trainable.items():
        layer_name, _, kind = name.replace("text_encoder.text_model.", "text_encoder.").partition(".lora_")
        layer = adapter.layers[layer_name]
        value = {"A": layer.down, "B": layer.up, "m": layer.magnitude}[kind[0]]
        parameter.copy_(value.reshape(parameter.shape))
        filled.add(layer_name)
    if filled != set(adapter.layers):
        missing = min(set(adapter.layers) - filled)
        raise UserError(f"lora.init: this run trains no {missing}, which the file has")
