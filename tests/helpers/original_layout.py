"""Write a base as one .safetensors file with the key names of the original Stable Diffusion code."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from ghibli.models.base import BaseModel

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(base: BaseModel, file: Path) -> None:
    """Write all weights of UNet, VAE and text encoder into one file."""
    weights = {f"model.diffusion_model.{key}": w for key, w in unet_weights(base).items()}
    weights |= {f"first_stage_model.{key}": w for key, w in vae_weights(base).items()}
    text = base.text_encoder.state_dict()
    prefix = "cond_stage_model.transformer."
    prefix += "" if next(iter(text)).startswith("text_model.") else "text_model."
    weights |= {f"{prefix}{key}": w for key, w in text.items()}
    save_file({key: w.contiguous().clone() for key, w in weights.items()}, file)


def unet_weights(base: BaseModel) -> dict[str, torch.Tensor]:
    """Return the UNet's weights by original name: there, blocks and downsamplers form one list."""
    unet = base.unet
    each = unet.config.layers_per_block + 1
    blocks = dict(UNET_ENDS)
    for i, block in enumerate(unet.down_blocks):
        for j in range(each - 1):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{each * i + j + 1}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{each * i + j + 1}.1"
        if block.downsamplers is not None:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{each * (i + 1)}.0.op"
    for i, block in enumerate(unet.up_blocks):
        for j in range(each):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{each * i + j}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{each * i + j}.1"
        after = 2 if hasattr(block, "attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{each * i + each - 1}.{after}.conv"
    return {renamed(key, blocks, RESNET): weight for key, weight in unet.state_dict().items()}


def vae_weights(base: BaseModel) -> dict[str, torch.Tensor]:
    """Return the VAE's weights by original name; its attention was made of 1 x 1 convolutions."""
    vae, last = base.vae, len(base.vae.config.block_out_channels) - 1
    blocks = {}
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in (0, 1)}
        blocks |= {f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}
        blocks |= {f"{side}.conv_norm_out": f"{side}.norm_out"}
    for i in range(last + 1):
        for j in range(vae.config.layers_per_block + 1):
            blocks[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            blocks[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{last - i}.block.{j}"
        blocks[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        blocks[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{last - i}.upsample.conv"
    weights = {}
    for key, weight in vae.state_dict().items():
        name = renamed(key, blocks, {"conv_shortcut": "nin_shortcut"} | VAE_ATTENTION)
        is_matrix = ".attn_1." in name and name.endswith(".weight") and weight.ndim == 2
        weights[name] = weight[:, :, None, None] if is_matrix else weight
    return weights


def renamed(key: str, blocks: dict[str, str], inner: dict[str, str]) -> str:
    """Translate a key: the name of its block and, where those differ too, of the part within the block."""
    for block in sorted(blocks, key=len, reverse=True):
        if key.startswith(f"{block}."):
            rest = key.removeprefix(f"{block}.")
            in_block = re.search(r"(resnets|mid_block\.attentions)\.\d+$", block)
            part = next((p for p in inner if in_block and rest.startswith(f"{p}.")), None)
            rest = rest.replace(part, inner[part], 1) if part else rest
            return f"{blocks[block]}.{rest}"
    return key
