"""The base: tokenizer, text encoder, VAE, UNet and noise schedule from a folder, hub id or one file."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from ghibli.mistakes import UserMistake

DEMO = Path(__file__).parent / "demo"
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
RENAMED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


@dataclass
class BaseModel:
    """The five parts of a latent diffusion model, in fp32, in eval mode, nothing trainable."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]  # the base's own scheduler_config.json

    @property
    def vae_factor(self) -> int:
        """Pixels per latent in each direction: 8 for SD 1.5."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction. SD 1.5's file names none: epsilon is meant."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Captions -> input_ids (B, 77), int64, cut at the tokenizer's length."""
        return self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    def encode_prompts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, 77) -> prompt_embeds (B, 77, D): the text encoder's last hidden state."""
        return self.text_encoder(input_ids, return_dict=True).last_hidden_state

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, 8h, 8w), float32 in 0 .. 1, one at a time."""
        pictures = [
            self.vae.decode(one[None].float() / self.vae.config.scaling_factor).sample for one in latents
        ]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    def to(self, device: torch.device) -> "BaseModel":
        """Moves every part to the device."""
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device)
        return self


def load(path: str) -> BaseModel:
    """Loads a base from "demo", a diffusers folder, a hub id or a single .safetensors file.

    Raises:
        UserMistake: nothing usable there; the text says what was expected.
    """
    if path in RENAMED:
        raise UserMistake(f"model.path={path} is gone from the hub: use {RENAMED[path]}")
    place = DEMO if path == "demo" else Path(path).expanduser()
    if place.is_file():
        parts = load_single_file(place)
    elif place.is_dir():
        check_folder(place, path)
        parts = load_folder(str(place), path)
    elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
        parts = load_from_hub(path)
    else:
        raise UserMistake(f"model.path={path}: no such folder or file, and no hub id (OWNER/NAME)")
    return checked(BaseModel(*parts), path)


def check_folder(place: Path, path: str) -> None:
    """Raises a UserMistake unless the folder has every part that is needed."""
    missing = [part for part in PARTS if not (place / part).is_dir()]
    if missing:
        raise UserMistake(
            f"model.path={path} is no diffusers folder of Stable Diffusion 1.5: "
            f"missing {', '.join(f'{part}/' for part in missing)}"
        )


def load_folder(source: str, path: str) -> tuple[Any, ...]:
    """The five parts from a diffusers folder (or hub id) `source`; `path` is named in messages."""
    try:
        with quiet("transformers", "diffusers"):
            return (
                AutoTokenizer.from_pretrained(source, subfolder="tokenizer"),
                CLIPTextModel.from_pretrained(
                    source, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
                ),
                AutoencoderKL.from_pretrained(
                    source, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
                ),
                UNet2DConditionModel.from_pretrained(
                    source, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True
                ),
                DDPMScheduler.load_config(source, subfolder="scheduler"),
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserMistake(f"model.path={path} cannot be loaded: {first_line(error)}") from error


def load_from_hub(name: str) -> tuple[Any, ...]:
    """The five parts of a hub repository, downloaded once into the libraries' own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*/config.json", "*/scheduler_config.json", "tokenizer/*", "*/*.safetensors"]
    unwanted = ["safety_checker/*", "*fp16*", "*non_ema*"]
    try:
        folder = snapshot_download(
            name, allow_patterns=wanted, ignore_patterns=unwanted, etag_timeout=5,
            local_files_only=not hub_answers(),
        )  # fmt: skip
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserMistake(
            f"model.path={name}: not in the local cache, and the hub cannot be reached or has no such "
            f"repository; give a folder with model.path=DIR ({first_line(error)[:100]})"
        ) from error
    check_folder(Path(folder), name)
    return load_folder(folder, name)


def hub_answers(timeout: float = 5.0) -> bool:
    """True when the hub can be asked at all: the libraries would retry a dead network for minutes."""
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy resolves names for us
    address = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout):
            return True
    except OSError:
        return False


def load_single_file(file: Path) -> tuple[Any, ...]:
    """The five parts from one .safetensors checkpoint; its tokenizer and configs come from the hub."""
    if file.suffix != ".safetensors":
        raise UserMistake(
            f"model.path={file}: only .safetensors files are read (others can run code when loaded); "
            "convert it with `safetensors` first"
        )
    try:
        with quiet("transformers", "diffusers"):
            pipeline = StableDiffusionPipeline.from_single_file(
                str(file),
                torch_dtype=torch.float32,
                safety_checker=None,
                local_files_only=not hub_answers(),
            )
    except Exception as error:  # diffusers raises many types here; each means the same to the user
        raise UserMistake(
            f"model.path={file} cannot be loaded as one Stable Diffusion 1.5 file "
            f"(its configs and tokenizer come from the hub): {first_line(error)}"
        ) from error
    return (
        pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet,
        dict(pipeline.scheduler.config),
    )  # fmt: skip


def checked(base: BaseModel, path: str) -> BaseModel:
    """Freezes the parts and refuses what this project cannot train.

    Raises:
        UserMistake: another model family, or a tokenizer that does not fit its text encoder.
    """
    vocabulary = base.text_encoder.config.vocab_size
    if len(base.tokenizer) != vocabulary:
        raise UserMistake(
            f"model.path={path}: the tokenizer knows {len(base.tokenizer)} tokens, the text encoder "
            f"{vocabulary}: the tokenizer files are missing or belong to another model"
        )
    if base.unet.config.in_channels != base.vae.config.latent_channels:
        raise UserMistake(f"model.path={path} is an inpainting or image-conditioned model, not SD 1.5")
    if base.unet.config.cross_attention_dim != base.text_encoder.config.hidden_size:
        raise UserMistake(f"model.path={path}: its UNet and text encoder do not belong together")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserMistake(f"model.path={path} predicts {base.prediction_type}, which is not supported")
    base.tokenizer.model_max_length = base.text_encoder.config.max_position_embeddings
    for part in (base.text_encoder, base.vae, base.unet):
        part.requires_grad_(False).eval()
    return base


def weights_hash(base: BaseModel) -> str:
    """sha256 over every weight of the base and its schedule: the same base, the same hash."""
    total = hashlib.sha256(repr(sorted(base.scheduler_config.items())).encode())
    for part in (base.text_encoder, base.vae, base.unet):
        for name, tensor in sorted(part.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's text, for one-line messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silences the named libraries' loggers below errors, and transformers' own bars."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
