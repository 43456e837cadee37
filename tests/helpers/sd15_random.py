"""Stable Diffusion 1.5 at its published size and in its published file format, with random weights.

Key names in the files are the published ones, which current libraries rename while loading.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ghibli.demo.pretrain.tokenizer import END, START, byte_symbols
from ghibli.models.sd15 import SCHEDULER, TEXT_ENCODER, UNET, VAE

PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
OLD_VAE_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def write_sd15(folder: Path) -> dict[str, int]:
    """Write the diffusers folder (2.1 GB of fp16); return the parameter count of each part."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET)
        vae = AutoencoderKL.from_config(VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    text_encoder.config.save_pretrained(folder / "text_encoder")
    for name, part in parts.items():
        weights = {published(name, key): value for key, value in random_weights(part).items()}
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        if name == "text_encoder":  # a buffer that older versions saved
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(weights, folder / name / file, metadata={"format": "pt"})
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def random_weights(part: nn.Module) -> dict[str, torch.Tensor]:
    """Make fp16 weights that keep activations of order 1: N(0, 1 / inputs), norms 1, biases 0."""
    weights = {}
    for name, parameter in part.named_parameters():
        if parameter.ndim == 1:
            fill = torch.ones if name.endswith("weight") else torch.zeros
            weights[name] = fill(parameter.shape, dtype=torch.float16)
        else:
            inputs = parameter[0].numel()
            weights[name] = (torch.randn(parameter.shape) / inputs**0.5).half()
    return weights


def published(part: str, key: str) -> str:
    """Return the name of a weight in the published files."""
    if part == "text_encoder":
        return key if key.startswith("text_model.") else f"text_model.{key}"
    if part == "vae":
        for new, old in OLD_VAE_ATTENTION.items():
            key = key.replace(new, old)
    return key


def write_tokenizer(folder: Path) -> None:
    """Write 49408 tokens in CLIP's format: bytes, bytes at the end of a word, merges, two special tokens."""
    symbols = byte_symbols()
    count = TEXT_ENCODER["vocab_size"] - 2 * len(symbols) - 2
    pairs = [(left, right) for left in symbols for right in symbols][:count]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(left + right for left, right in pairs), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77,
        unk_token=END, bos_token=START, eos_token=END, pad_token=END,
    ).save_pretrained(folder)  # fmt: skip


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON into a folder that is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
