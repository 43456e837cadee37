r"""What is trained: LoRA adapters, or every UNet weight, or nothing; and the adapter's file.

    x --> W (frozen) ------------------> + --> W x + (alpha / rank) B A x
      \-> A (rank rows) -> B (0 at first) -/

Hu et al. 2021, "LoRA", section 4.1. PEFT builds the layers; here is which, how wide and in which file.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from ghibli.models.base import BaseModel
from ghibli.models.safetensors import ADAPTER_FILE, with_sorted_metadata
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically
from ghibli.runtime.seeding import Stream, seed_global_rng

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
NAME = "default"  # PEFT's name of our adapter


def attach(
    base: BaseModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    text_encoder: bool,
    seed: int,
    variant: str = "lora",
    init: str | None = None,
) -> None:
    """Adds fresh fp32 adapters to the UNet and, if asked, to the text encoder; B is zero.

    The initial A follows from the seed alone. `variant` is lora, dora (Liu et al. 2024: direction and
    magnitude of W' apart) or rslora (Kalajdzievski 2023: B A is scaled by alpha / sqrt(rank)). What
    `init` names is filled in when training starts (adapter_files.start_from).

    Raises:
        UserError: a target that names no linear or convolution layer of the UNet.
    """
    check_targets(base.unet, targets)

    def settings(names: list[str]) -> LoraConfig:
        return LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none",
            init_lora_weights=True, target_modules=names,
            use_dora=variant == "dora", use_rslora=variant == "rslora",
        )  # fmt: skip

    with torch.random.fork_rng():
        seed_global_rng(Stream.ADAPTER_INIT, seed)
        base.unet.add_adapter(settings(targets), adapter_name=NAME)
        if text_encoder:
            base.text_encoder.add_adapter(settings(TEXT_ENCODER_TARGETS), adapter_name=NAME)
    for parameter in trainable(base).values():
        parameter.data = parameter.data.float()
    for part in (base.unet, base.text_encoder):
        part.train(part.training)  # new layers come in training mode, with their dropout on


def check_targets(unet: nn.Module, targets: list[str]) -> None:
    """Raises a UserError for a target without a matching layer."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            endings = sorted({name.rsplit("attentions", 1)[-1].split(".", 1)[-1] for name in layers})
            short = sorted(
                {
                    ".".join(e.split(".")[-2:]) if e.split(".")[-1].isdigit() else e.split(".")[-1]
                    for e in endings
                }
            )
            raise UserError(f"lora.targets: no UNet layer is called {target}; there are {', '.join(short)}")


def unfreeze_unet(base: BaseModel) -> None:
    """Full fine-tuning: every UNet weight is trained, in fp32."""
    base.unet.requires_grad_(True)


def trainable(base: BaseModel) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained, UNet first, in a fixed order."""
    parts = (("unet", base.unet), ("text_encoder", base.text_encoder))
    return {
        f"{part}.{name}": parameter
        for part, module in parts
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def save_adapter(base: BaseModel, folder: Path) -> Path:
    """Writes the adapter as diffusers safetensors; `load_lora_weights(folder)` reads it anywhere.

    The file carries rank and alpha, without which a loader would take alpha = rank. Dropout is
    written as 0: some loaders would leave it on and draw random images. The same weights give
    the same bytes, whatever the process and the machine.
    """
    layers, metadata = {}, {}
    for part, module in (("unet", base.unet), ("text_encoder", base.text_encoder)):
        if getattr(module, "peft_config", None):
            state = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
            state = convert_state_dict_to_diffusers(state)
            if part == "text_encoder":  # the name in every published file, dropped by transformers 5.6
                state = {f"text_model.{key.removeprefix('text_model.')}": state[key] for key in state}
            layers[f"{part}_lora_layers"] = {key: value.detach().cpu() for key, value in state.items()}
            plain = module.peft_config[NAME].to_dict()
            plain |= {"lora_dropout": 0.0, "base_model_name_or_path": None}  # that is a path of this machine
            plain["target_modules"] = sorted(plain["target_modules"])  # a set: its order is random
            metadata[f"{part}_lora_adapter_metadata"] = plain
    written = folder / "new"
    StableDiffusionPipeline.save_lora_weights(written, **layers, **metadata)
    content = with_sorted_metadata((written / ADAPTER_FILE).read_bytes())
    (written / ADAPTER_FILE).unlink()
    written.rmdir()
    write_atomically(folder / ADAPTER_FILE, lambda file: file.write(content))
    return folder / ADAPTER_FILE
