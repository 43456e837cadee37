r"""What is trained: LoRA adapters, all UNet weights or nothing; and the file of a trained adapter.

    x --> W (frozen) ------------------> + --> W x + (alpha / rank) B A x
      \-> A (rank rows) -> B (0 at first) -/

Hu et al. 2021, "LoRA", section 4.1. PEFT builds the layers; this module chooses and saves them.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, get_peft_model_state_dict
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import nn

from ghibli.adapters.names import named_layers, target_of
from ghibli.adapters.settings import METADATA
from ghibli.config.paths import ADAPTER_FILE
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.models.safetensors import with_sorted_metadata
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically
from ghibli.runtime.seeding import Stream, seed_global_rng

ENCODER_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
ADAPTER_NAME = "default"  # of the trained adapter, in PEFT
SCALED = ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # the factor of each kind that takes up the scale


def add_lora(base: BaseModel, options: LoraConfig, seed: int) -> None:
    """Add fresh fp32 adapters to the UNet and, if asked, to the text encoder; B is zero, A follows the seed.

    The variant is lora, dora (Liu et al. 2024: direction and magnitude of W' apart), rslora (Kalajdzievski
    2023: B A is scaled by alpha / sqrt(rank)), loha, lokr or oft; the formulas are in adapters.layers. Every
    one starts as the base. The weights of options.init are copied in later (adapters.start.start_from).

    Raises:
        UserError: a target that names no linear or convolution layer, or layers that oft cannot turn.
    """
    check_targets(base, options)
    if options.variant == "oft":
        check_blocks(base, options)
    with torch.random.fork_rng():
        seed_global_rng(Stream.ADAPTER_INIT, seed)
        for part, targets in targets_of(options, base).items():
            adapted: Any = base.adaptable[part]
            adapted.add_adapter(peft_config(options, targets), adapter_name=ADAPTER_NAME)
    for parameter in trainable(base).values():
        parameter.data = parameter.data.float()
    for module in base.adaptable.values():
        module.train(module.training)  # PEFT's new layers are in training mode, with dropout on


@contextmanager
def without_adapters(base: BaseModel) -> Iterator[None]:
    """Let the base predict as if it had no adapter; outside, the adapter is trained as before.

    PEFT freezes the weights of a layer that it switches off, so no backward pass may run inside.
    """
    modules = [module for part in base.adaptable.values() for module in part.modules()]
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def peft_config(options: LoraConfig, targets: list[str]) -> PeftConfig:
    """Translate our settings into PEFT's for the layers whose names end in `targets`.

    loha and lokr drop outputs of the update (rank_dropout) instead of inputs of A, oft whole blocks. Their
    convolutions are decomposed over the kernel (Tucker), as `lora` does not.
    """
    lycoris = {
        "r": options.rank, "alpha": options.alpha, "rank_dropout": options.dropout,
        "target_modules": targets, "use_effective_conv2d": True,
    }  # fmt: skip
    if options.variant == "loha":
        return LoHaConfig(**lycoris)
    if options.variant == "lokr":
        return LoKrConfig(**lycoris)
    if options.variant == "oft":  # the exact Cayley transform: PEFT's default is a series cut off
        return OFTConfig(
            r=options.rank, oft_block_size=0, module_dropout=options.dropout, target_modules=targets,
            use_cayley_neumann=False,
        )  # fmt: skip
    return PeftLoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, bias="none",
        init_lora_weights=True, target_modules=targets,
        use_dora=options.variant == "dora", use_rslora=options.variant == "rslora",
    )  # fmt: skip


def endings_of(options: LoraConfig) -> dict[str, list[str]]:
    """Return the parts to adapt, the UNet first, each with the endings of its layers' names as configured."""
    of_text = options.text_encoder_targets if options.text_encoder else []
    targets = {"unet": options.targets, "text_encoder": of_text}
    return {part: endings for part, endings in targets.items() if endings}


def targets_of(options: LoraConfig, base: BaseModel) -> dict[str, list[str]]:
    """Return the parts to adapt as endings_of does, without the text encoder's layers that clip_skip skips.

    Where it skips some, the text encoder's other layers are named in full.
    """
    targets = endings_of(options)
    if base.clip_skip > 1 and "text_encoder" in targets:
        used = base.text_encoder.config.num_hidden_layers + 1 - base.clip_skip
        names = [name.removeprefix("text_encoder.") for name in named_layers(base)]
        wanted = [name for name in names if ends_in(f".{name}", targets["text_encoder"])]
        numbers = {name: ENCODER_LAYER.search(name) for name in wanted}
        targets["text_encoder"] = [
            name for name, number in numbers.items() if number is None or int(number[1]) < used
        ]
    return targets


def layers_to_train(base: BaseModel, options: LoraConfig) -> set[str]:
    """Name the layers that add_lora adapts, as Adapter.layers does."""
    return {
        name
        for part, endings in targets_of(options, base).items()
        for name in named_layers(base)
        if name.startswith(f"{part}.") and ends_in(name, endings)
    }


def ends_in(name: str, endings: list[str]) -> bool:
    """Tell whether a layer's name ends in one of some names, as PEFT matches them."""
    return any(name.endswith(f".{ending}") for ending in endings)


def check_targets(base: BaseModel, options: LoraConfig) -> None:
    """Raise a UserError for a target that matches no layer."""
    for part, endings in endings_of(options).items():
        layers = [name for name in named_layers(base) if name.startswith(f"{part}.")]
        for ending in endings:
            if not any(ends_in(name, [ending]) for name in layers):
                known = ", ".join(sorted({target_of(name) for name in layers}))
                key = (
                    "lora.targets: no UNet layer" if part == "unet" else "lora.text_encoder_targets: no layer"
                )
                raise UserError(f"{key} is called {ending}; there are {known}")


def check_blocks(base: BaseModel, options: LoraConfig) -> None:
    """Raise a UserError unless oft can turn every layer's inputs in options.rank blocks of equal size.

    PEFT would take the nearest number of blocks that fits, and its layer around a convolution with a kernel
    computes something else than the weights it merges.
    """
    layers = named_layers(base)
    for name in sorted(layers_to_train(base, options)):
        layer, inputs = layers[name], layers[name].weight.shape[1]
        if prod(layer.weight.shape[2:]) > 1:
            raise UserError(
                f"lora.variant=oft turns the inputs of linear layers; {name} is a convolution with a kernel: "
                "leave it out of lora.targets"
            )
        if inputs % options.rank or inputs == options.rank:
            fitting = [n for n in range(1, inputs) if inputs % n == 0]
            raise UserError(
                f"lora.rank={options.rank} is, for lora.variant=oft, the number of blocks of a layer's "
                f"inputs, and {name} has {inputs}: it takes one of {', '.join(map(str, fitting))}"
            )


def unfreeze_unet(base: BaseModel) -> None:
    """Make every UNet weight trainable, in fp32: full fine-tuning."""
    base.unet.requires_grad_(True)


def trainable(base: BaseModel) -> dict[str, nn.Parameter]:
    """Return everything that is trained as name -> parameter, in a fixed order, the UNet first."""
    return {
        f"{part}.{name}": parameter
        for part, module in base.adaptable.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def scale_of(options: LoraConfig) -> float:
    """Return what a run multiplies the product of a layer's factors by."""
    if options.variant == "oft":
        return 1.0
    return options.alpha / (options.rank**0.5 if options.variant == "rslora" else options.rank)


def save_adapter(base: BaseModel, folder: Path) -> Path:
    """Save the adapter as a safetensors file that diffusers' `load_lora_weights(folder)` reads; return it.

    Every layer has PEFT's key names, and one factor is multiplied by the scale, so that alpha is the rank:
    readers that look at one key only, or know no metadata, load the whole at its own strength. Dropout is
    recorded as 0, since some would leave it on. The same weights give the same bytes in any process.

    diffusers has no loader for loha, lokr and oft: PEFT reads their tensors, and so does this project.
    """
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for part, module in base.adaptable.items():
        config = getattr(module, "peft_config", {}).get(ADAPTER_NAME)
        if config is not None:
            state = get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
            scale = scale_in(config)
            for key, value in state.items():
                value = value.detach().cpu() * (scale if not set(SCALED).isdisjoint(key.split(".")) else 1)
                tensors[diffusers_key(part, key)] = value.contiguous()
            settings |= {f"{part}.{key}": value for key, value in published_settings(config).items()}
    metadata = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    if base.clip_skip > 1:
        metadata["ss_clip_skip"] = str(base.clip_skip)
    content = with_sorted_metadata(save(tensors, metadata))
    write_atomically(folder / ADAPTER_FILE, lambda file: file.write(content))
    return folder / ADAPTER_FILE


def diffusers_key(part: str, key: str) -> str:
    """Name a tensor of PEFT as diffusers' loader wants it.

    The text encoder has `text_model.`, as every published file has and transformers dropped in 5.6, and
    `.weight` after its magnitudes, as transformers 5 wants it.
    """
    key = key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
    if part != "text_encoder":
        return f"{part}.{key}"
    end = ".weight" if key.endswith("lora_magnitude_vector") else ""
    return f"{part}.text_model.{key.removeprefix('text_model.')}{end}"


def scale_in(config: PeftConfig) -> float:
    """Return what PEFT multiplies the product of a layer's factors by; 1 for OFT, which has no factors."""
    if isinstance(config, OFTConfig):
        return 1.0
    if isinstance(config, PeftLoraConfig):
        return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return config.alpha / config.r


def published_settings(config: PeftConfig) -> dict[str, Any]:
    """Return PEFT's settings as a file has them: scaled already, no dropout, no path of a machine.

    A setting that has PEFT's default is left out: it may be newer than the PEFT that reads the file, which
    takes no setting that it does not know, and diffusers then refuses the file.
    """
    settings, defaults = config.to_dict(), type(config)().to_dict()
    published = {
        "lora_alpha": config.r, "alpha": config.r, "use_rslora": False, "lora_dropout": 0.0,
        "rank_dropout": 0.0, "module_dropout": 0.0, "base_model_name_or_path": None,
        "target_modules": sorted(config.target_modules),  # a set: its order is random
    }  # fmt: skip
    always = {
        "peft_type",
        "r",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        *published,
    }  # diffusers asks for them
    settings |= published
    return {
        key: value for key, value in settings.items() if key in defaults
        and (key in always or value != defaults[key])
    }  # fmt: skip
