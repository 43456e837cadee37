"""Training further from an adapter file, lora.init: which settings take it, and copying its weights."""

import re
from pathlib import Path

import torch
from torch import nn

from ghibli.adapters.files import Adapter
from ghibli.adapters.layers import Layer, LoHa, LoKr
from ghibli.adapters.lora import SCALED, layers_to_train, scale_of
from ghibli.adapters.names import layer_name as name_of_layer
from ghibli.adapters.names import named_layers
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.runtime.commands import command_here
from ghibli.runtime.errors import UserError

VARIANTS_OF = {  # kind of layer -> values of lora.variant that train it
    "LoRA": ("lora", "rslora"), "DoRA": ("dora",), "LoHa": ("loha",), "LoKr": ("lokr",),
    "OFT of the inputs": ("oft",),
}  # fmt: skip
PARAMETER = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+|oft_R)\.default(\.weight)?"
)
FIELDS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude", "oft_R": "angles"}


def why_not(adapter: Adapter, base: BaseModel) -> str | None:
    """Say why no settings of lora.* can train an adapter further; None if some can."""
    if any(layer.magnitude is not None and not layer.per_output for layer in adapter.layers.values()):
        return "its DoRA magnitudes are one an input; lora.variant=dora trains one an output"
    others = [kind for kind in adapter.kinds if kind not in VARIANTS_OF]
    if others:
        known = ", ".join(name for names in VARIANTS_OF.values() for name in names)
        return f"it holds {others[0]} layers, and lora.variant trains {known}"
    if len(adapter.kinds) > 1:
        return f"its layers are of several kinds: {', '.join(adapter.kinds)}"
    if len(adapter.ranks) > 1:
        return f"its layers differ in rank: {', '.join(map(str, adapter.ranks))}"
    if not adapter.ranks:
        return "its layers are whole matrices, without a rank"
    known_layers = named_layers(base)
    for name, layer in adapter.layers.items():
        if known_layers[name].weight.shape[2:].numel() > 1 and has_flat_kernel(layer):
            kind = layer.name
            return (
                f"lora.variant={kind.lower()} trains convolutions decomposed over the kernel, unlike {name}"
            )
    return None


def has_flat_kernel(layer: Layer) -> bool:
    """Tell whether a convolution's LoHa or LoKr has two factors, not three, where PEFT's has a core."""
    return (isinstance(layer, LoHa) and layer.t1 is None) or (
        isinstance(layer, LoKr) and layer.w2_a is not None and layer.t2 is None
    )


def check_same_shape(adapter: Adapter, options: LoraConfig, base: BaseModel) -> None:
    """Raise a UserError unless fresh layers with these settings can take an adapter's weights.

    alpha may differ: start_from rescales B.
    """
    what, reason = f"lora.init={options.init}", why_not(adapter, base)
    if reason is not None:
        raise UserError(f"{what} cannot be trained further: {reason}")
    trained = layers_to_train(base, options)

    def part(names: set[str], name: str) -> set[str]:
        return {each for each in names if each.startswith(name)}

    ours, its = trained, set(adapter.layers)
    wanted = {
        "lora.rank": ([options.rank], adapter.ranks),
        "lora.targets": (part(ours, "unet."), part(its, "unet.")),
        "lora.text_encoder": (options.text_encoder, adapter.has_text_encoder),
        "lora.text_encoder_targets": (part(ours, "text_encoder."), part(its, "text_encoder.")),
        "lora.variant": (True, options.variant in VARIANTS_OF[adapter.kinds[0]]),
    }
    differing = [key for key, (one, other) in wanted.items() if one != other]
    if "lora.text_encoder" in differing:
        differing.remove("lora.text_encoder_targets")
    if differing:
        command = command_here("ghibli", "import", Path(str(options.init)))
        raise UserError(
            f"{what}: {', '.join(differing)} of this run differ from those of the file; "
            f"`{command}` prints the settings to continue training from it"
        )


@torch.no_grad()
def start_from(adapter: Adapter, trainable: dict[str, nn.Parameter], options: LoraConfig) -> None:
    """Copy an adapter's weights into fresh layers of the same shape; a factor takes up a difference in scale.

    Args:
        trainable: from lora.trainable.

    Raises:
        UserError: the file has a layer that this run does not train, lacks a tensor, or has another shape.
    """
    filled = set()
    for name, parameter in trainable.items():
        layer_name, factor = parameter_of(name)
        layer, field = adapter.layers[layer_name], FIELDS.get(factor, factor.partition("_")[2])
        value = getattr(layer, field, None)
        if value is None:
            raise UserError(f"lora.init: the file has no {factor} for {layer_name}")
        if value.numel() != parameter.numel():
            raise UserError(
                f"lora.init: {factor} of {layer_name} is {tuple(value.shape)} in the file and "
                f"{tuple(parameter.shape)} in this run: its matrices are split in another way"
            )
        if factor in SCALED:
            value = value.float() * (layer.scale / scale_of(options))
        parameter.copy_(value.reshape(parameter.shape))
        filled.add(layer_name)
    if filled != set(adapter.layers):
        missing = min(set(adapter.layers) - filled)
        raise UserError(f"lora.init: this run does not train {missing}, which the file holds")


def parameter_of(name: str) -> tuple[str, str]:
    """Split the name of a trained weight into (layer as in Adapter.layers, PEFT's name of the factor)."""
    match = PARAMETER.fullmatch(name)
    assert match is not None, f"{name} is no weight of an adapter"
    part, _, path = match[1].partition(".")
    return name_of_layer(part, path), match[2]
