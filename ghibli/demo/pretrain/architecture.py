"""The parts of the demo base: the classes and block types of Stable Diffusion 1.5, much narrower.

Each make_ function returns a part with random weights; `save_part` saves it (fp16 safetensors) into a folder
that `StableDiffusionPipeline.from_pretrained` loads.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from ghibli.config.paths import DEMO

RESOLUTION = 128
HIDDEN = 64  # width of the text encoder and of cross-attention
PROJECTION = 64  # width of the space that images and captions share

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_clip(tokenizer) -> CLIPModel:
    """Make a CLIP model: text tower (width 64, 3 layers) and image tower (8 x 8 patches of 16 px)."""
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=RESOLUTION,
        patch_size=16,
        projection_dim=PROJECTION,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def make_text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """Make a CLIPTextModel with the weights of a CLIPModel's text tower."""
    text_encoder = CLIPTextModel(CLIPTextConfig(**clip.config.text_config.to_dict()))
    wanted = text_encoder.state_dict()
    found = {
        name.removeprefix("text_model."): value
        for name, value in clip.state_dict().items()
        if name.startswith("text_model.")
    }
    text_encoder.load_state_dict({name: found[name.removeprefix("text_model.")] for name in wanted})
    return text_encoder


def make_vae() -> AutoencoderKL:
    """Make the VAE, from images (B, 3, 128, 128) in -1 .. 1 to latents (B, 4, 16, 16)."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=RESOLUTION,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    zero_residuals(vae)
    return vae


def zero_residuals(model: torch.nn.Module) -> None:
    """Zero the last layer of every residual branch, so that the model starts almost linear.

    It then learns colours and brightness much sooner.
    """
    for name, weight in model.named_parameters():
        if ".conv2." in name or ".to_out." in name:
            torch.nn.init.zeros_(weight)


def make_unet() -> UNet2DConditionModel:
    """Make the UNet, for noisy latents (B, 4, 16, 16) and prompt_embeds (B, 77, 64)."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def make_pndm_scheduler() -> PNDMScheduler:
    """Make the scheduler of Stable Diffusion 1.5, with its noise schedule."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        skip_prk_steps=True,
    )


def replace_folder(source: Path, target: Path) -> None:
    """Move every file of `source` into `target`, each atomically."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        file.chmod(0o644)
        os.replace(file, target / file.name)


def save_part(name: str, part, folder: Path = DEMO) -> None:
    """Save a model (as fp16), tokenizer or scheduler to folder/name; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        if isinstance(part, torch.nn.Module):
            half: Any = copy.deepcopy(part).half()  # a Hugging Face model, which torch's types do not know
            half.save_pretrained(partial, safe_serialization=True)
            set_loading_dtype(partial / "config.json")
        else:
            part.save_pretrained(partial)
        replace_folder(partial, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def set_loading_dtype(config: Path) -> None:
    """Set the config's dtype, in which transformers loads, to fp32, as diffusers does."""
    values = json.loads(config.read_text())
    for part in (values, values.get("text_config", {}), values.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n")


def write_scheduler_and_index(folder: Path = DEMO) -> None:
    """Write scheduler config and model index, without diffusers' newer keys, as in SD 1.5."""
    save_part("scheduler", make_pndm_scheduler(), folder)
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    for key in ("prediction_type", "timestep_spacing"):
        values.pop(key, None)
    config.write_text(json.dumps({**values, "clip_sample": False}, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
