"""The weights of a base under the names of the original Stable Diffusion code, as in single-file checkpoints.

The `ldm` code of Rombach et al. 2022 numbers the UNet's blocks and downsamplers through. A1111, ComfyUI and
sd-scripts read these names, and diffusers' `from_single_file` turns them back.
"""

import re
from collections.abc import Iterable
from typing import TypeVar

import torch

from ghibli.models.base import BaseModel

T = TypeVar("T")

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
VAE_PARTS = {  # its resnets keep norm1, conv1, norm2 and conv2
    "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
TEXT = "cond_stage_model.transformer.text_model."


def original_weights(base: BaseModel) -> dict[str, torch.Tensor]:
    """Return all weights of UNet, VAE and text encoder by their original names.

    Also the text encoder's position_ids, which the published checkpoints hold and A1111 expects.
    """
    unet = renamed_all(base.unet.state_dict(), unet_blocks(base), RESNET)
    vae = renamed_all(base.vae.state_dict(), vae_blocks(base), VAE_PARTS)
    text = {key.removeprefix("text_model."): value for key, value in base.text_encoder.state_dict().items()}
    positions = torch.arange(base.text_encoder.config.max_position_embeddings)[None]
    return (
        {f"model.diffusion_model.{key}": weight for key, weight in unet.items()}
        | {f"first_stage_model.{key}": as_convolution(key, weight) for key, weight in vae.items()}
        | {f"{TEXT}{key}": weight for key, weight in (text | {"embeddings.position_ids": positions}).items()}
    )


def original_unet_layers(base: BaseModel, paths: Iterable[str]) -> dict[str, str]:
    """Map layers of the UNet, by their paths, to their original names."""
    weights = {f"{path}.weight": path for path in paths}
    return {
        path: name.removesuffix(".weight")
        for name, path in renamed_all(weights, unet_blocks(base), RESNET).items()
    }


def unet_blocks(base: BaseModel) -> dict[str, str]:
    """Map the UNet's blocks to their numbers in the original's three lists."""
    blocks, number = dict(UNET_ENDS), 1
    for i, block in enumerate(base.unet.down_blocks):
        for j in range(len(block.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(base.unet.up_blocks):
        for j in range(len(block.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if hasattr(block, "attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return blocks


def vae_blocks(base: BaseModel) -> dict[str, str]:
    """Map the VAE's blocks to their original names; the decoder's are counted from the other end."""
    blocks: dict[str, str] = {}
    last = len(base.vae.config.block_out_channels) - 1
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in (0, 1)}
        blocks |= {f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}
        blocks |= {f"{side}.conv_norm_out": f"{side}.norm_out"}
    for i in range(last + 1):
        for j in range(base.vae.config.layers_per_block + 1):
            blocks[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            blocks[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{last - i}.block.{j}"
        blocks[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        blocks[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{last - i}.upsample.conv"
    return blocks


def renamed_all(state: dict[str, T], blocks: dict[str, str], inner: dict[str, str]) -> dict[str, T]:
    """Rename every weight: its block and, in a resnet or the VAE's attention, the part within the block."""
    longest_first = sorted(blocks, key=len, reverse=True)
    renamed = {}
    for key, weight in state.items():
        block = next((name for name in longest_first if key.startswith(f"{name}.")), None)
        if block is None:
            renamed[key] = weight
            continue
        rest = key.removeprefix(f"{block}.")
        if re.search(r"(resnets|mid_block\.attentions)\.\d+$", block):
            part = next((name for name in inner if rest.startswith(f"{name}.")), None)
            rest = rest if part is None else inner[part] + rest.removeprefix(part)
        renamed[f"{blocks[block]}.{rest}"] = weight
    return renamed


def as_convolution(key: str, weight: torch.Tensor) -> torch.Tensor:
    """Give the matrices of the VAE's attention the shape of the 1 x 1 convolutions they once were."""
    is_matrix = ".attn_1." in key and key.endswith(".weight") and weight.ndim == 2
    return weight[:, :, None, None] if is_matrix else weight
