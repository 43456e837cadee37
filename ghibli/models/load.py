"""Loading Stable Diffusion 1.5's parts: a diffusers folder, a hub id, or one .safetensors file."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel
from transformers.utils.logging import disable_progress_bar

from ghibli.config.paths import check_base
from ghibli.models.base import BaseModel, resolve_path
from ghibli.models.hub import HUB_FILES, hub_answers
from ghibli.models.safetensors import check_whole
from ghibli.runtime.errors import UserError, first_line

CONFIG_FILES = (
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "tokenizer/tokenizer_config.json", "unet/config.json", "vae/config.json",
)  # fmt: skip


def load(path: str, config: str | None = None) -> BaseModel:
    """Loads a base from "demo", a diffusers folder, a hub id or a single .safetensors file.

    Args:
        config: for a single file, the folder with the configs and the tokenizer that it has not:
            a diffusers folder of the same family, weights not needed; None: those of the hub.

    Raises:
        UserError: nothing usable there; the text says what was expected.
    """
    place = resolve_path(path)
    check_base(place, path)
    gc.collect()  # an earlier base with adapter layers holds itself, 4 GB of it
    if place.is_dir():
        parts = load_folder(place, path)
    elif place.is_file():
        check_whole(place, f"model.path={path}")
        parts = load_single_file(place, config)
    else:
        parts = load_from_hub(path)
    return checked(BaseModel(*parts), path)


def load_folder(folder: Path, path: str) -> tuple[Any, ...]:
    """The five parts from a diffusers folder; `path` is what the user typed.

    Raises:
        UserError: a damaged file, or one that is not what its config.json describes.
    """
    try:
        with quiet("transformers", "diffusers"):
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
            schedule = DDPMScheduler.load_config(folder / "scheduler")
    except Exception as error:  # each library raises many types; each means the same to the user
        raise UserError(f"model.path={path} cannot be loaded: {first_line(error)}") from error
    text_encoder = load_part(
        CLIPTextModel, folder / "text_encoder", path, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    vae = load_part(AutoencoderKL, folder / "vae", path, torch_dtype=torch.float32)
    unet = load_part(UNet2DConditionModel, folder / "unet", path, torch_dtype=torch.float32)
    return tokenizer, text_encoder, vae, unet, schedule


def load_part(part_class: Any, folder: Path, path: str, **options: Any) -> Any:
    """One network from its folder, every weight from the file: the libraries would make missing ones up."""
    for file in sorted(folder.glob("*.safetensors")):
        check_whole(file, f"model.path={path}")
    try:
        with quiet("transformers", "diffusers"):
            part, report = part_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:
        raise UserError(f"model.path={path}: {folder.name}/ cannot be loaded: {first_line(error)}") from error
    lacking = sorted([*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"model.path={path}: {folder.name}/ lacks weights that its config.json asks for, or has them in "
            f"another shape: {', '.join(lacking[:3])}{f' and {len(lacking) - 3} more' * (len(lacking) > 3)}"
        )
    return part


def load_from_hub(name: str) -> tuple[Any, ...]:
    """The five parts of a hub repository, downloaded once into the libraries' own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    online = hub_answers()
    try:
        folder = snapshot_download(
            name, **HUB_FILES, etag_timeout=5,
            local_files_only=not online,
        )  # fmt: skip
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        hub = f"does not give it ({first_line(error)[:100]})" if online else "cannot be reached"
        raise UserError(
            f"model.path={name}: no such folder here, not downloaded yet, and the hub {hub}: "
            "give a folder, model.path=DIR, or use model=demo"
        ) from error
    check_base(Path(folder), name)
    return load_folder(Path(folder), name)


def is_here(path: str) -> bool:
    """False for a hub id whose files are not all downloaded; whether the rest loads is load's business."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if "/" not in path or resolve_path(path).exists():
        return True
    try:
        check_base(Path(snapshot_download(path, local_files_only=True)), path)
    except (LocalEntryNotFoundError, OSError, ValueError):  # a UserError is one: files are missing
        return False
    return True


def load_single_file(file: Path, config: str | None) -> tuple[Any, ...]:
    """The five parts from one .safetensors checkpoint; configs and tokenizer from a folder or the hub."""
    online = config is None and hub_answers()
    if config is not None:
        check_config_folder(resolve_path(config), config)
    try:
        with quiet("transformers", "diffusers"):
            pipeline = StableDiffusionPipeline.from_single_file(
                str(file), config=None if config is None else str(resolve_path(config)),
                torch_dtype=torch.float32, safety_checker=None, local_files_only=not online,
            )  # fmt: skip
    except Exception as error:  # diffusers raises many types here; each means the same to the user
        known = config is not None or online
        reason = first_line(error) if known else "its configs and tokenizer are on the hub, out of reach now"
        advice = "a diffusers folder has everything" if known else (
            "give a folder that has them, model.config=DIR, or a diffusers folder, model.path=DIR"
        )  # fmt: skip
        raise UserError(
            f"model.path={file} cannot be loaded as Stable Diffusion 1.5 in one file ({reason}); {advice}"
        ) from error
    return (
        pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet,
        dict(pipeline.scheduler.config),
    )  # fmt: skip


def check_config_folder(folder: Path, config: str) -> None:
    """Raises a UserError unless a folder has what a single file lacks."""
    missing = [name for name in CONFIG_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.config={config} lacks {', '.join(missing)}: copy these and tokenizer/ from a diffusers "
            "folder of Stable Diffusion 1.5; its weights are not needed"
        )


def checked(base: BaseModel, path: str) -> BaseModel:
    """Freezes the parts and refuses what this project cannot train.

    Raises:
        UserError: another model family, or a tokenizer that does not fit its text encoder.
    """
    unet, text_encoder = base.unet.config, base.text_encoder.config
    if unet.in_channels != base.vae.config.latent_channels:
        raise UserError(
            f"model.path={path}: its UNet takes {unet.in_channels} channels, its VAE makes "
            f"{base.vae.config.latent_channels}: an inpainting or depth model, not Stable Diffusion 1.5"
        )
    if unet.cross_attention_dim != text_encoder.hidden_size or unet.addition_embed_type is not None:
        raise UserError(
            f"model.path={path}: its UNet expects text embeddings of width {unet.cross_attention_dim}, its "
            f"text encoder makes {text_encoder.hidden_size}: SDXL, or parts of two models, but not SD 1.5"
        )
    if len(base.tokenizer) != text_encoder.vocab_size:
        raise UserError(
            f"model.path={path}: the tokenizer knows {len(base.tokenizer)} tokens, the text encoder "
            f"{text_encoder.vocab_size}: the tokenizer files are missing or belong to another model"
        )
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"model.path={path} predicts {base.prediction_type}, which is not supported")
    base.tokenizer.model_max_length = base.text_encoder.config.max_position_embeddings
    for part in (base.text_encoder, base.vae, base.unet):
        part.requires_grad_(False).eval()
    return base


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
