"""Reading adapter files, in the two common layouts, for a given base.

diffusers names a layer as the model does (unet.down_blocks.0...to_q.lora.down.weight), kohya's scripts
with underscores (lora_unet_down_blocks_0_..._to_q.lora_down.weight). In both, B A is scaled by alpha / rank.
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
KOHYA_TENSORS = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
PEFT_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight")
SDXL = ("lora_te1_", "lora_te2_", "lora_unet_input_blocks_", "text_encoder_2.")
TO_PEFT = {  # diffusers' older key names -> PEFT's
    "unet": convert_unet_state_dict_to_peft,
    "text_encoder": convert_state_dict_to_peft,
}
METADATA = "lora_adapter_metadata"  # where diffusers stores PEFT's settings in a file


@dataclass(frozen=True)
class Layer:
    """The update of one layer of the base: (alpha / rank) up down."""

    down: torch.Tensor  # (rank, in) or, for a convolution, (rank, in, k, k)
    up: torch.Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float
    magnitude: torch.Tensor | None = None  # (out,), for DoRA only

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter file whose layers all fit a given base."""

    file: Path
    layout: str  # diffusers or kohya
    layers: dict[str, Layer]  # by name: `unet.` or `text_encoder.`, then the layer's name in the base
    metadata: dict[str, str]  # of the file, unchanged

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
        """The kinds of UNet layers it changes, as lora.targets takes them."""
        return sorted({target_of(name) for name in self.layers if name.startswith("unet.")})

    @property
    def has_text_encoder(self) -> bool:
        return any(name.startswith("text_encoder.") for name in self.layers)


def target_of(name: str) -> str:
    """Return the ending of a layer's name that tells its kind: to_q, to_out.0, ff.net.0.proj, conv1."""
    parts = name.split(".")
    if "ff" in parts:
        return ".".join(parts[parts.index("ff") :])
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def format_number(value: float) -> str:
    """Format a number so that it reads back as the same one, whole numbers without a point."""
    return str(int(value)) if value == int(value) else repr(value)


def find_file(path: str | Path, what: str) -> Path:
    """Find an adapter file: the path itself, the only one in a folder, or the one of a run.

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
            there = (
                f"several: {', '.join(file.name for file in found[:4])}; name one of them"
                if found
                else "none"
            )
            raise UserError(f"{what} {path}: which .safetensors file? there are {there}")
        place = (named or found)[0]
    if not place.is_file():
        raise UserError(f"{what} {path}: no such file or run (`ghibli list` shows the runs)")
    if place.suffix in PICKLES:
        raise UserError(f"{what} {path}: {NO_PICKLE}; {convert_command([place])}")
    check_whole(place, what)
    return place


def read_adapter(path: str | Path, base: BaseModel, what: str) -> Adapter:
    """Read an adapter of either layout for a base; every tensor of the file is used, or it is refused.

    Args:
        path, what: as for find_file.

    Raises:
        UserError: as find_file, or the file is not an adapter, not of this base, or of an unknown kind.
    """
    file = find_file(path, what)
    state = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if any(key.startswith(SDXL) for key in state):
        raise UserError(f"{what} {path} is an adapter for SDXL; the base is Stable Diffusion 1 or 2")
    layout = "kohya" if any(key.startswith(tuple(KOHYA.values())) for key in state) else "diffusers"
    try:
        layers, unused = from_kohya(state, base) if layout == "kohya" else from_diffusers(state, metadata)
    except (ValueError, KeyError, AttributeError) as error:  # diffusers' conversion, or damaged metadata
        raise UserError(f"{what} {path} cannot be read as a LoRA: {first_line(error)}") from error
    known = named_layers(base)
    unknown = [name for name in layers if name not in known] or [key for key in state if not layers]
    if unknown:
        raise UserError(
            f"{what} {path} is not a LoRA of this base: it has `{unknown[0][:80]}`, which the base lacks"
        )
    if unused:
        raise UserError(
            f"{what} {path} holds more than LoRA layers: {len(unused)} tensors such as `{unused[0][:80]}` "
            "would be left out; LoHa, LoKr and other kinds are not supported"
        )
    for name, layer in layers.items():
        check_fits(layer, known[name], f"{what} {path}: {name}")
    return Adapter(file, layout, layers, metadata)


def named_layers(base: BaseModel) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name every linear and convolution layer of UNet and text encoder, except those of adapters."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for part, module in base.adaptable.items():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name:
                found[layer_name(part, name.removesuffix(".base_layer"))] = layer
    return found


def layer_name(part: str, name: str) -> str:
    """Name a layer as Adapter.layers does: without `text_model.`, which some versions put in front."""
    return f"{part}.{name.removeprefix('text_model.')}"


def check_fits(layer: Layer, target: nn.Linear | nn.Conv2d, where: str) -> None:
    """Raise a UserError unless an adapter's layer has the shape of the base's."""
    out_side, in_side = target.weight.shape[:2]
    shape = (layer.up.shape[0], layer.down.shape[1])
    if shape != (out_side, in_side):
        raise UserError(
            f"{where} maps {shape[1]} values to {shape[0]}, the base's layer {in_side} to {out_side}: it "
            "was made for another base"
        )


def from_kohya(state: dict[str, torch.Tensor], base: BaseModel) -> tuple[dict[str, Layer], list[str]]:
    """Read kohya's keys: layers by the base's names (an unknown one by its own), and the keys left over."""
    names = {kohya_name(name): name for name in named_layers(base)}
    layers, unused = {}, set(state)
    for key, down in state.items():
        prefix, _, rest = key.partition(".")
        up = state.get(f"{prefix}.lora_up.weight")
        if rest != "lora_down.weight" or up is None:
            continue
        stored_alpha, magnitude = state.get(f"{prefix}.alpha"), state.get(f"{prefix}.dora_scale")
        alpha = float(down.shape[0] if stored_alpha is None else stored_alpha)
        layers[names.get(prefix, prefix)] = Layer(down, up, alpha, magnitude)
        unused -= {f"{prefix}.{rest}" for rest in KOHYA_TENSORS}
    return layers, sorted(unused)


def kohya_name(name: str) -> str:
    """Translate a layer's name: unet.mid_block.attentions.0... to lora_unet_mid_block_attentions_0_..."""
    part, _, rest = name.partition(".")
    text = "text_model." if part == "text_encoder" else ""
    return KOHYA[part] + (text + rest).replace(".", "_")


def from_diffusers(
    state: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Layer], list[str]]:
    """Read diffusers' or PEFT's keys: layers by name (alpha defaults to the rank), and the keys left over."""
    settings = json.loads(metadata.get(METADATA, "{}"))
    layers = {}
    unused = {key for key in state if key.partition(".")[0] not in TO_PEFT}
    for part, to_peft in TO_PEFT.items():
        own = {key[len(part) + 1 :]: value for key, value in state.items() if key.startswith(f"{part}.")}
        tensors = to_peft(own) if own else {}
        unused |= {f"{part}.{key}" for key in tensors}
        for key, down in tensors.items():
            name = key.removesuffix(".lora_A.weight")
            up = tensors.get(f"{name}.lora_B.weight")
            if name == key or up is None:
                continue
            magnitude = tensors.get(
                f"{name}.lora_magnitude_vector", tensors.get(f"{name}.lora_magnitude_vector.weight")
            )
            alpha = alpha_in(settings, part, name, down.shape[0])
            layers[layer_name(part, name)] = Layer(down, up, alpha, magnitude)
            unused -= {f"{part}.{name}.{rest}" for rest in PEFT_TENSORS}
    return layers, sorted(unused)


def alpha_in(settings: dict[str, Any], part: str, name: str, rank: int) -> float:
    """Read a layer's alpha, of the scale alpha / rank, from PEFT's settings in the file."""
    pattern = settings.get(f"{part}.alpha_pattern") or {}
    alpha = pattern.get(name, settings.get(f"{part}.lora_alpha", rank))
    return float(alpha) * (rank**0.5 if settings.get(f"{part}.use_rslora") else 1.0)


def check_same_shape(adapter: Adapter, options: LoraConfig) -> None:
    """Raise a UserError unless fresh layers with these settings can take an adapter's weights."""
    alpha = options.alpha * (options.rank**0.5 if options.variant == "rslora" else 1)
    wanted = {
        "lora.rank": ([options.rank], adapter.ranks),
        "lora.alpha": ([alpha], adapter.alphas),
        "lora.targets": (sorted(options.targets), adapter.targets),
        "lora.text_encoder": ([options.text_encoder], [adapter.has_text_encoder]),
        "lora.variant": ([options.variant == "dora"], [is_dora(adapter)]),
    }  # fmt: skip
    differing = [key for key, (ours, its) in wanted.items() if ours != its]
    if differing:
        raise UserError(
            f"lora.init={options.init}: {', '.join(differing)} of this run differ from those of the file; "
            f"`ghibli import {options.init}` prints the settings to continue training from it"
        )


def is_dora(adapter: Adapter) -> bool:
    """Tell whether an adapter has DoRA's magnitudes."""
    return any(layer.magnitude is not None for layer in adapter.layers.values())


@torch.no_grad()
def start_from(adapter: Adapter, trainable: dict[str, nn.Parameter]) -> None:
    """Copy an adapter's weights into fresh layers of the same shape.

    Args:
        trainable: from lora.trainable.

    Raises:
        UserError: the file has a layer that this run does not train, or lacks a DoRA magnitude.
    """
    filled = set()
    for name, parameter in trainable.items():
        layer_name, _, kind = name.replace("text_encoder.text_model.", "text_encoder.").partition(".lora_")
        layer = adapter.layers[layer_name]
        value = {"A": layer.down, "B": layer.up, "m": layer.magnitude}[kind[0]]
        if value is None:
            raise UserError(f"lora.init: the file has DoRA magnitudes, but none for {layer_name}")
        parameter.copy_(value.reshape(parameter.shape))
        filled.add(layer_name)
    if filled != set(adapter.layers):
        missing = min(set(adapter.layers) - filled)
        raise UserError(f"lora.init: this run does not train {missing}, which the file holds")
