"""The model that a run has made, as a base that anything can sample: adapter merged, or UNet replaced."""

from pathlib import Path

import torch

from ghibli import base_model, lora
from ghibli.base_model import BaseModel
from ghibli.config import from_yaml
from ghibli.mistakes import UserMistake
from ghibli.run_dir import RunDir, all_runs
from ghibli.schema import Config


def finished_run(name: str) -> RunDir:
    """The run folder called `name`; for `latest` the newest finished run that trained something.

    Raises:
        UserMistake: there is none.
    """
    if name != "latest":
        return RunDir(Path(name))
    finished = runs_with_weights()
    if not finished:
        raise UserMistake("latest: no finished run below outputs/ yet: python train.py makes one")
    return finished[-1]


def runs_with_weights() -> list[RunDir]:
    """Finished runs below outputs/ that trained something, the oldest first."""
    return [run for run in all_runs() if run.state == "finished" and run.has_weights]


def config_of(run: RunDir) -> Config:
    """The settings of a finished run.

    Raises:
        UserMistake: no such folder, no run in it, or one that has not finished.
    """
    if not run.config.is_file():
        raise UserMistake(f"{run.path} holds no run: `ghibli list` shows them")
    if run.state != "finished":
        raise UserMistake(f"{run.path} is {run.state}, not finished: python train.py resume={run.path}")
    return from_yaml(run.config)


def starting_base(config: Config) -> BaseModel:
    """The base that a run trains: model.path with model.adapter merged into it, on the fastest device."""
    return for_sampling(lora.load_base(config.model))


def trained_base(run: RunDir, config: Config) -> BaseModel:
    """The same with what the run's best epoch learned."""
    base = lora.load_base(config.model)
    if config.finetune == "lora":
        lora.merge(base, run.adapter, 1.0)
    elif config.finetune == "full":
        base.unet = base_model.load_part(type(base.unet), run.unet, str(run.unet)).eval()
    return for_sampling(base)


def for_sampling(base: BaseModel) -> BaseModel:
    """On the fastest device, the UNet laid out as convolutions like it: a sixth faster on a CPU.

    Nothing that trains is laid out so, since rounding differs a little.
    """
    base.unet.to(memory_format=torch.channels_last)
    return base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
