"""The model that a run has trained, as a base ready to sample from."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ghibli.adapters import apply
from ghibli.config.files import from_yaml
from ghibli.config.schema import Config
from ghibli.models.base import BaseModel, configs_hash, weights_hash
from ghibli.models.load import load, load_part
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded

logger = logging.getLogger(__name__)


def starting_base(config: Config) -> BaseModel:
    """Load the base that a run starts from, ready to sample: model.path with model.adapter merged."""
    return for_sampling(apply.load_base(config.model))


def run_base(run: RunDir, config: Config) -> BaseModel:
    """Load the base that a run was trained from.

    Raises:
        UserError: as check_same_base.
    """
    base = apply.load_base(config.model)
    check_same_base(run, config, base)
    return base


def check_same_base(run: RunDir, config: Config, base: BaseModel) -> None:
    """Check by content that a base is the one a run was trained from, wherever it lies now.

    Args:
        base: as loaded, before anything of the run is added; model.adapter is part of it.

    Raises:
        UserError: another base lies under that path now.
    """
    noted = run.status.read().get("base_hash")
    if noted is None:
        logger.warning(f"{run.path}: status.json has no base_hash, so nobody knows if this is the run's base")
        return
    found = weights_hash(base)
    if found != noted:
        raise UserError(
            f"{run.path}: the base model.path={config.model.path} is not the one it was trained from "
            f"(base_hash {found[:12]}, was {str(noted)[:12]}): put that back; to use its adapter on another "
            f"base, give {run.adapter} and model.path=DIR"
        )
    noted = run.status.read().get("configs_hash")  # runs of before have none
    if noted is not None and noted != configs_hash(base):
        raise UserError(
            f"{run.path}: the base model.path={config.model.path} has the weights that it was trained from, "
            "but another tokenizer, or another setting in a part's config.json: put those back"
        )


def check_bases(sources: Iterable[str | Path], config: Config, base: BaseModel) -> None:
    """Check that the runs among some sources were trained from the base that a command has loaded.

    Args:
        config: of the command, which chose the base.

    Raises:
        UserError: as check_same_base.
    """
    for source in sources:
        run = RunDir(expanded(source))
        if run.config.is_file():
            check_same_base(run, config, base)


def trained_base(run: RunDir, config: Config) -> BaseModel:
    """Load the model of a run's best epoch, ready to sample: adapter merged, or UNet replaced.

    Raises:
        UserError: as check_same_base, or the run's own files do not fit.
    """
    base = run_base(run, config)
    if config.finetune == "lora":
        apply.merge(base, run.adapter, 1.0)
    elif config.finetune == "full":
        base.unet = load_part(type(base.unet), run.unet, str(run.path)).eval()
    return for_sampling(base)


def for_sampling(base: BaseModel) -> BaseModel:
    """Move a base to the GPU, if there is one, with a channels-last UNet: a sixth faster on a CPU.

    Training leaves the layout to compute.channels_last, since rounding differs a little.
    """
    base.unet.to(memory_format=torch.channels_last)
    return base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def tuned_model(path: str, base: BaseModel, config: str | None) -> BaseModel:
    """Load a fine-tuned model: a run's, a complete one as `model.path` takes it, or the folder of a UNet.

    Args:
        base: what it was trained from, whose other parts complete a UNet.
        config: for a single file, as model.config.

    Raises:
        UserError: nothing usable there.
    """
    place = expanded(path)
    if RunDir(place).config.is_file():
        run = RunDir(place)
        if run.status.read().get("base_hash") not in (None, weights_hash(base)):
            logger.warning(
                f"{path} was trained from another base than this one (base_hash {weights_hash(base)[:12]}): "
                "what is extracted holds the difference between the two as well"
            )
        found = trained_base(run, from_yaml(run.config)).to(torch.device("cpu"))
        found.unet.to(memory_format=torch.contiguous_format)
        return found
    if (place / "config.json").is_file():
        return replace(base, unet=load_part(type(base.unet), place, path))
    return load(path, config)
