"""Loading the parts of Stable Diffusion 1.5: from a diffusers folder, a hub id or one .safetensors file."""

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from ghibli.config.paths import NO_PICKLE, PICKLES, check_base, convert_command, resolve_path
from ghibli.models.base import BaseModel
from ghibli.models.configs import check_config
from ghibli.models.hub import HUB_FILES, hub_answers
from ghibli.models.original import original_weights
from ghibli.models.safetensors import check_float, check_whole, count_weights
from ghibli.runtime.errors import UserError, first_line

logger = logging.getLogger(__name__)

CONFIG_FILES = (
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "tokenizer/tokenizer_config.json", "unet/config.json", "vae/config.json",
)  # fmt: skip
UNUSED_KEYS = (  # published files hold these beside the text encoder's weights; nothing is lost without them
    "position_ids", "text_projection.", "visual_projection.", "vision_model.", "logit_scale",
)  # fmt: skip
ALIVE: WeakSet[UNet2DConditionModel] = WeakSet()  # of the bases loaded before


def load(path: str, config: str | None = None) -> BaseModel:
    """Load a base from "demo", a diffusers folder, a hub id or a single .safetensors file.

    Args:
        config: for a single file, a diffusers folder of the same family with the configs and the
            tokenizer that the file lacks (its weights are not needed); None = those of the hub.

    Raises:
        UserError: nothing usable there; the message says what was expected.
    """
    place = resolve_path(path)
    check_base(place, path)
    if ALIVE:  # a module that trained a base refers to itself: 4 GB stay until a collection
        gc.collect()
    if place.is_dir():
        parts = load_folder(place, path)
    elif place.is_file():
        check_whole(place, f"model.path={path}")
        check_float(place, f"model.path={path}")
        parts = load_single_file(place, config)
    else:
        parts = load_from_hub(path)
    if config is not None and not place.is_file():
        logger.warning(f"model.config={config} is not used: model.path={path} is no single file")
    base = BaseModel(*parts)
    check_supported(base, path)
    if place.is_file():
        check_all_used(place, base, path)
    base.tokenizer.model_max_length = base.text_encoder.config.max_position_embeddings
    for part in (base.text_encoder, base.vae, base.unet):
        part.requires_grad_(False).eval()
    ALIVE.add(base.unet)
    return base


def load_folder(folder: Path, path: str) -> tuple[Any, ...]:
    """Load the five parts from a diffusers folder that the user typed as `path`.

    Raises:
        UserError: a damaged file, or weights that do not match their config.json.
    """
    what = f"model.path={path}"
    check_config(folder / "scheduler" / "scheduler_config.json", what)
    try:
        # Silenced: advice about newer config keys. A tokenizer without its vocabulary loads just as
        # silently; check_supported compares its size with the text encoder's.
        with quiet("transformers", "diffusers"):
            # This class itself: AutoTokenizer offers to run a .py file that the folder names in `auto_map`.
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
            schedule = DDPMScheduler.load_config(folder / "scheduler")
    except Exception as error:  # each library raises many types; all mean the same to the user
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error
    text_encoder = load_part(
        CLIPTextModel, folder / "text_encoder", what, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    vae = load_part(AutoencoderKL, folder / "vae", what, torch_dtype=torch.float32)
    unet = load_part(UNet2DConditionModel, folder / "unet", what, torch_dtype=torch.float32)
    return tokenizer, text_encoder, vae, unet, schedule


def part_folder(name: str, what: str, files: dict[str, list[str]], otherwise: str = "") -> Path:
    """Return the folder of one network; of a hub id, only weights and settings are downloaded.

    Args:
        what: the setting that names it, for messages, such as model.clip=NAME.
        files: options of snapshot_download, as in models.hub.
        otherwise: what else the user can do, for the message.

    Raises:
        UserError: no such folder, and not to be had from the hub.
    """
    folder = resolve_path(name)
    if folder.is_dir():
        return folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{what}: no such folder, and not a hub id (OWNER/NAME)")
    return snapshot(name, what, files, f"give a folder{otherwise}")


def snapshot(name: str, what: str, files: dict[str, list[str]], advice: str) -> Path:
    """Return the folder of a hub repository, downloaded once into the libraries' own cache.

    Args:
        what, files: as for part_folder.
        advice: the end of the message.

    Raises:
        UserError: not to be had.
    """
    online = hub_answers()
    try:
        return Path(snapshot_download(name, **files, etag_timeout=5, local_files_only=not online))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        hub = f"refuses it ({first_line(error)[:100]})" if online else "cannot be reached"
        raise UserError(
            f"{what}: no such folder here, not downloaded yet, and the hub {hub}: {advice}"
        ) from error


def load_part(part_class: Any, folder: Path, what: str, **options: Any) -> Any:
    """Load one network from its folder, every weight from the file.

    The libraries fill missing weights with random numbers and drop those that the config does not
    describe, each with a log message only. Here both are errors.

    Args:
        what: the setting that names the folder, for messages, such as model.path=DIR.

    Raises:
        UserError: a damaged file, or weights that do not match config.json.
    """
    check_config(folder / "config.json", what)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [file for file in sorted(folder.glob("*")) if file.suffix in PICKLES]
        advice = f"; {NO_PICKLE}; {convert_command(pickles)}" if pickles else ""
        raise UserError(f"{what}: no .safetensors file in {folder.name}/{advice}")
    for file in files:
        check_whole(file, what)
        check_float(file, what)
    try:
        if issubclass(part_class, transformers.PreTrainedModel):
            check_size(part_class, folder, files)
        # Silenced: the libraries' report on keys, which is asked for instead and checked below.
        with quiet("transformers", "diffusers"):
            part, report = part_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # as above
        raise UserError(f"{what}: {folder.name}/ cannot be loaded: {first_line(error)}") from error
    missing = sorted([*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])])
    if missing:
        raise UserError(
            f"{what}: {folder.name}/ lacks weights that its config.json asks for, or has them in another "
            f"shape: {enumerated(missing)}"
        )
    unused = sorted(key for key in report["unexpected_keys"] if not any(name in key for name in UNUSED_KEYS))
    if unused:
        raise UserError(
            f"{what}: {folder.name}/ holds weights that its config.json does not describe: "
            f"{enumerated(unused)}; is this the config.json of another model?"
        )
    return part


def check_size(part_class: Any, folder: Path, files: list[Path]) -> None:
    """Check that a network has not far more weights than its files, before it takes the memory for them.

    transformers makes all that config.json asks for, and compares it with the files afterwards.

    Raises:
        ValueError: it has.
    """
    with torch.device("meta"):
        wanted = part_class(part_class.config_class.from_pretrained(folder)).num_parameters()
    stored = sum(count_weights(file) for file in files)
    if wanted > 2 * stored:
        raise ValueError(
            f"config.json asks for {wanted} weights and the file has {stored}: is it another model's?"
        )


def enumerated(names: list[str]) -> str:
    """Join the first three names, with a count of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_from_hub(name: str) -> tuple[Any, ...]:
    """Load the five parts of a hub repository, downloaded once into the libraries' own cache."""
    advice = "give a folder, model.path=DIR, or use model=demo"
    folder = snapshot(name, f"model.path={name}", HUB_FILES, advice)
    check_base(folder, name)
    return load_folder(folder, name)


def is_here(path: str) -> bool:
    """Tell whether a base needs no download: False only for a hub id with files missing in the cache."""
    if "/" not in path or resolve_path(path).exists():
        return True
    try:
        check_base(Path(snapshot_download(path, local_files_only=True)), path)
    except (LocalEntryNotFoundError, OSError, ValueError):  # UserError is a ValueError: files are missing
        return False
    return True


def load_single_file(file: Path, config: str | None) -> tuple[Any, ...]:
    """Load the five parts from one .safetensors file, with configs and tokenizer from a folder or the hub."""
    online = config is None and hub_answers()
    if config is not None:
        check_config_folder(resolve_path(config), config)
    try:
        # Silenced: the list of unused keys, which in such a file is long and harmless (EMA weights, the
        # loss of the VAE); check_all_used looks for others. Missing keys stay on the meta device; they raise
        # here or are found below.
        with quiet("transformers", "diffusers"):
            pipeline = StableDiffusionPipeline.from_single_file(
                str(file), config=None if config is None else str(resolve_path(config)),
                torch_dtype=torch.float32, safety_checker=None, local_files_only=not online,
            )  # fmt: skip
        check_no_meta_weights(pipeline)
    except Exception as error:  # diffusers raises many types here; all mean the same to the user
        known = config is not None or online
        reason = first_line(error) if known else "its configs and tokenizer are on the hub, out of reach now"
        if "meta tensor" in reason:  # diffusers moved a network whose weights are not all in the file
            reason = "it lacks weights of the UNet or the VAE"
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


def check_all_used(file: Path, base: BaseModel, path: str) -> None:
    """Check that a single file holds no weights of UNet or VAE that the configs do not describe.

    Raises:
        UserError: of the UNet. Those of the VAE are named.
    """
    with safe_open(file, framework="pt") as opened:
        unknown = sorted(set(opened.keys()) - set(original_weights(base)))
    what = f"model.path={path} holds weights that its configs do not describe"
    unet = [key for key in unknown if key.startswith("model.diffusion_model.")]
    if unet:
        raise UserError(f"{what}: {enumerated(unet)}; are these the configs of another model?")
    vae = [key for key in unknown if re.match(r"first_stage_model\.(?!loss\.|model_ema\.)", key)]
    if vae:
        logger.warning(f"{what}, and they are not used: {enumerated(vae)}")


def check_no_meta_weights(pipeline: StableDiffusionPipeline) -> None:
    """Raise a ValueError if a weight was not in the file and so has a shape but no values."""
    parts = {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae, "unet": pipeline.unet}
    missing = [
        f"{part}.{name}"
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.is_meta
    ]
    if missing:
        raise ValueError(f"it lacks {enumerated(missing)}")


def check_config_folder(folder: Path, config: str) -> None:
    """Raise a UserError unless a folder has what a single file lacks."""
    missing = [name for name in CONFIG_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.config={config} lacks {', '.join(missing)}: copy these and tokenizer/ from a diffusers "
            "folder of Stable Diffusion 1.5; its weights are not needed"
        )
    for name in CONFIG_FILES:
        check_config(folder / name, f"model.config={config}")


def check_supported(base: BaseModel, path: str) -> None:
    """Refuse a base that this project cannot train.

    Raises:
        UserError: another model family, a tokenizer that does not fit its text encoder, or a weight that is
            not finite.
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
    for part in ("text_encoder", "vae", "unet"):
        for name, weight in getattr(base, part).named_parameters():
            if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
                raise UserError(
                    f"model.path={path}: {part}/ holds values that are not finite, in {name}: the file is "
                    "damaged, or its training failed"
                )


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence the named libraries' loggers below errors, and their progress bars.

    A library that drops part of its input often tells only its logger: each use says in a comment
    why nothing of the kind can be hidden there, or what checks it instead.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
