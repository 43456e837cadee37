r"""What is trained: LoRA adapters, all UNet weights or nothing; and the file of a trained adapter.

    x --> W (frozen) ------------------> + --> W x + (alpha / rank) B A x
      \-> A (rank rows) -> B (0 at first) -/

Hu et al. 2021, "LoRA", section 4.1. PEFT builds the layers; this module chooses and saves them.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from torch import nn

from ghibli.adapters.files import target_of
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.models.safetensors import ADAPTER_FILE, with_sorted_metadata
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically
from ghibli.runtime.seeding import Stream, seed_global_rng

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ADAPTER_NAME = "default"  # of the trained adapter, in PEFT


def add_lora(base: BaseModel, options: LoraConfig, seed: int) -> None:
    """Add fresh fp32 adapters to the UNet and, if asked, to the text encoder; B is zero, A follows the seed.

    The variant is lora, dora (Liu et al. 2024: direction and magnitude of W' apart) or rslora
    (Kalajdzievski 2023: B A is scaled by alpha / sqrt(rank)). The weights of options.init are copied in
    later (adapters.files.start_from).

    Raises:
        UserError: a target that names no linear or convolution layer of the UNet.
    """
    check_targets(base.unet, options.targets)
    with torch.random.fork_rng():
        seed_global_rng(Stream.ADAPTER_INIT, seed)
        base.unet.add_adapter(peft_config(options, options.targets), adapter_name=ADAPTER_NAME)
        if options.text_encoder:
            base.text_encoder.add_adapter(
                peft_config(options, TEXT_ENCODER_TARGETS), adapter_name=ADAPTER_NAME
            )
    for parameter in trainable(base).values():
        parameter.data = parameter.data.float()
    for part in base.adaptable.values():
        part.train(part.training)  # PEFT's new layers are in training mode, with dropout on


def peft_config(options: LoraConfig, targets: list[str]) -> PeftConfig:
    """Translate our settings into PEFT's for the layers whose names end in `targets`."""
    return PeftConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, bias="none",
        init_lora_weights=True, target_modules=targets,
        use_dora=options.variant == "dora", use_rslora=options.variant == "rslora",
    )  # fmt: skip


def check_targets(unet: nn.Module, targets: list[str]) -> None:
    """Raise a UserError for a target that matches no layer of the UNet."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({target_of(name) for name in layers}))
            raise UserError(f"lora.targets: no UNet layer is called {target}; there are {known}")


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


def save_adapter(base: BaseModel, folder: Path) -> Path:
    """Save the adapter as a diffusers safetensors file that `load_lora_weights(folder)` reads; return it.

    The file records rank and alpha, without which loaders assume alpha = rank. Dropout is recorded as 0,
    since some loaders would leave it on. The same weights give the same bytes in any process.
    """
    layers, metadata = {}, {}
    for part, module in base.adaptable.items():
        peft_config = getattr(module, "peft_config", None)
        if peft_config:
            state = get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
            state = convert_state_dict_to_diffusers(state)
            if part == "text_encoder":  # the prefix of every published file; transformers dropped it in 5.6
                state = {f"text_model.{key.removeprefix('text_model.')}": state[key] for key in state}
            layers[f"{part}_lora_layers"] = {key: value.detach().cpu() for key, value in state.items()}
            settings = peft_config[ADAPTER_NAME].to_dict()
            settings |= {"lora_dropout": 0.0, "base_model_name_or_path": None}  # a path on this machine
            settings["target_modules"] = sorted(settings["target_modules"])  # a set: its order is random
            metadata[f"{part}_lora_adapter_metadata"] = settings
    written = folder / "new"
    StableDiffusionPipeline.save_lora_weights(written, **layers, **metadata)
    content = with_sorted_metadata((written / ADAPTER_FILE).read_bytes())
    (written / ADAPTER_FILE).unlink()
    written.rmdir()
    write_atomically(folder / ADAPTER_FILE, lambda file: file.write(content))
    return folder / ADAPTER_FILE
