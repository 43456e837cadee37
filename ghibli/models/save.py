"""Writing a whole base for other programs: a diffusers folder, and a single file in the original layout.

Both are written as Stable Diffusion 1.5 was published, since older programs read nothing newer: the text
encoder's keys begin with `text_model.`, the tokenizer is vocab.json and merges.txt. With the keys of
transformers 5, those older than 5.23 leave the text encoder at random weights.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ghibli.models.base import BaseModel
from ghibli.models.original import original_weights
from ghibli.models.pipeline import make_pipeline
from ghibli.runtime.files import write_json, write_text


def save_folder(base: BaseModel, folder: Path) -> None:
    """Write a base as a diffusers folder with its own noise schedule, for any diffusers since 0.27."""
    to_plain_memory(base)
    make_pipeline(base, scheduler=own_scheduler(base)).save_config(folder)
    own_scheduler(base).save_pretrained(folder / "scheduler")
    base.unet.save_pretrained(folder / "unet")
    base.vae.save_pretrained(folder / "vae")
    base.text_encoder.config.save_pretrained(folder / "text_encoder")
    weights = {
        f"text_model.{key.removeprefix('text_model.')}": value.contiguous()
        for key, value in base.text_encoder.state_dict().items()
    }
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    save_tokenizer(base.tokenizer, folder / "tokenizer")
    for file in folder.glob("**/*.json"):
        forget_path(file)


def save_single_file(base: BaseModel, file: Path, metadata: dict[str, str]) -> None:
    """Write a base as one checkpoint with the original key names."""
    to_plain_memory(base)
    weights = {key: weight.contiguous() for key, weight in original_weights(base).items()}
    save_file(weights, file, {"format": "pt"} | metadata)


def has_original_layout(base: BaseModel) -> bool:
    """Tell whether the original checkpoints hold such a text encoder: CLIP's, not the OpenCLIP of SD 2."""
    return base.family == "sd1"


def to_plain_memory(base: BaseModel) -> None:
    """Move a base to the CPU, its UNet out of the channels-last layout."""
    base.to(torch.device("cpu")).unet.to(memory_format=torch.contiguous_format)


def own_scheduler(base: BaseModel) -> Any:
    """Return the scheduler that the base's scheduler_config.json names, DDIM for an unknown name."""
    named: Any = getattr(diffusers, str(base.scheduler_config.get("_class_name")), None)
    if not (isinstance(named, type) and issubclass(named, SchedulerMixin)):
        named = DDIMScheduler
    return named.from_config(base.scheduler_config)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a CLIP tokenizer as published: vocab.json, merges.txt, its settings and special tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    own = {token: tokenizer.convert_tokens_to_ids(token) for token in special.values()}
    added = {token: at for token, at in tokenizer.get_added_vocab().items() if token not in own}
    vocabulary = sorted((model["vocab"] | own).items(), key=lambda entry: entry[1])
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length}
    write_text(folder / "vocab.json", json.dumps(dict(vocabulary), ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *pairs, ""]))
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)
    if added:
        write_json(folder / "added_tokens.json", added)


def forget_path(file: Path) -> None:
    """Remove the folder on this machine that the libraries note in a config.json."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
        write_json(file, content)
