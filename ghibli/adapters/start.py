"""Training further from an adapter file, lora.init: which settings take it, and copying its weights."""

import torch
from torch import nn

from ghibli.adapters.files import Adapter, is_dora
from ghibli.adapters.layers import LoRA
from ghibli.adapters.lora import layers_to_train, scale_of
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError


def why_not(adapter: Adapter) -> str | None:
    """Say why no settings of lora.* can train an adapter further; None if some can."""
    others = [kind for kind in adapter.kinds if kind not in ("LoRA", "DoRA")]
    if others:
        return f"it holds {others[0]} layers, and lora.variant trains lora, dora and rslora"
    if any(layer.magnitude is not None and not layer.per_output for layer in adapter.layers.values()):
        return "its DoRA magnitudes are one an input; lora.variant=dora trains one an output"
    if len(adapter.kinds) > 1:
        return "some of its layers have DoRA magnitudes, others none"
    if len(adapter.ranks) > 1:
        return f"its layers differ in rank: {', '.join(map(str, adapter.ranks))}"
    return None


def check_same_shape(adapter: Adapter, options: LoraConfig, base: BaseModel) -> None:
    """Raise a UserError unless fresh layers with these settings can take an adapter's weights.

    alpha may differ: start_from rescales B.
    """
    what, reason = f"lora.init={options.init}", why_not(adapter)
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
        "lora.variant": (options.variant == "dora", is_dora(adapter)),
    }
    differing = [key for key, (one, other) in wanted.items() if one != other]
    if "lora.text_encoder" in differing:
        differing.remove("lora.text_encoder_targets")
    if differing:
        raise UserError(
            f"{what}: {', '.join(differing)} of this run differ from those of the file; "
            f"`ghibli import {options.init}` prints the settings to continue training from it"
        )


@torch.no_grad()
def start_from(adapter: Adapter, trainable: dict[str, nn.Parameter], options: LoraConfig) -> None:
    """Copy an adapter's weights into fresh layers of the same shape; B takes up a difference in alpha.

    Args:
        trainable: from lora.trainable.

    Raises:
        UserError: the file has a layer that this run does not train, or lacks a DoRA magnitude.
    """
    filled = set()
    for name, parameter in trainable.items():
        layer_name, _, kind = name.replace("text_encoder.text_model.", "text_encoder.").partition(".lora_")
        layer = adapter.layers[layer_name]
        assert isinstance(layer, LoRA), "check_same_shape refuses other kinds"
        ratio = scale_of(options) / (layer.alpha / layer.rank)
        value = {"A": layer.down, "B": layer.up, "m": layer.magnitude}[kind[0]]
        if value is None:
            raise UserError(f"lora.init: the file has DoRA magnitudes, but none for {layer_name}")
        value = value.float() / ratio if kind[0] == "B" else value
        parameter.copy_(value.reshape(parameter.shape))
        filled.add(layer_name)
    if filled != set(adapter.layers):
        missing = min(set(adapter.layers) - filled)
        raise UserError(f"lora.init: this run does not train {missing}, which the file holds")
