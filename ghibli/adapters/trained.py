"""The model that a run has made, as a base that anything can sample: adapter merged, or UNet replaced."""

import torch

from ghibli.adapters import apply
from ghibli.config.schema import Config
from ghibli.models.base import BaseModel
from ghibli.models.load import load_part
from ghibli.runs.folder import RunDir


def starting_base(config: Config) -> BaseModel:
    """The base that a run trains: model.path with model.adapter merged into it, on the fastest device."""
    return for_sampling(apply.load_base(config.model))


def trained_base(run: RunDir, config: Config) -> BaseModel:
    """The same with what the run's best epoch learned."""
    base = apply.load_base(config.model)
    if config.finetune == "lora":
        apply.merge(base, run.adapter, 1.0)
    elif config.finetune == "full":
        base.unet = load_part(type(base.unet), run.unet, str(run.path)).eval()
    return for_sampling(base)


def for_sampling(base: BaseModel) -> BaseModel:
    """On the fastest device, the UNet laid out as convolutions like it: a sixth faster on a CPU.

    Nothing that trains is laid out so, since rounding differs a little.
    """
    base.unet.to(memory_format=torch.channels_last)
    return base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
