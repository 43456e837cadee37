"""The optimisers people expect, each from a well-kept package, over the trainable weights."""

import importlib
import math
from typing import Any

import torch
from torch import nn

from ghibli.config.schema import OptimizerConfig
from ghibli.runtime.errors import UserError

# Package -> extra of this project
EXTRAS = {"bitsandbytes": "bitsandbytes", "prodigyopt": "prodigy", "schedulefree": "schedulefree"}


def make_optimizer(
    options: OptimizerConfig, trainable: dict[str, nn.Parameter], *, on_gpu: bool
) -> torch.optim.Optimizer:
    """An optimiser whose groups learn at `options.lr`, or at what text encoder and B have of their own.

    adafactor is Shazeer and Stern 2018 with the learning rate as given, prodigy Mishchenko and
    Defazio 2023, whose learning rate is a factor of what it finds itself, adamw_schedulefree Defazio et
    al. 2024, which averages the weights instead of lowering the rate (see `use_average`).

    Raises:
        UserError: a package that is not installed, or 8 bits without a GPU.
    """
    groups, decay, betas = groups_of(options, trainable), options.weight_decay, tuple(options.betas)
    if options.name == "adamw":
        fused = True if on_gpu else None
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, weight_decay=decay, fused=fused)
    if options.name == "adafactor":
        from transformers.optimization import Adafactor

        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(groups, lr=options.lr, weight_decay=decay, **fixed)
    if options.name == "prodigy":
        return package("prodigyopt").Prodigy(groups, lr=options.lr, betas=betas, weight_decay=decay)
    if options.name == "adamw_schedulefree":
        free = package("schedulefree").AdamWScheduleFree
        return free(groups, lr=options.lr, betas=betas, weight_decay=decay)
    if not on_gpu:
        raise UserError("optimizer.name=adamw8bit needs a GPU: use adamw, or adafactor to save memory")
    adamw8bit = package("bitsandbytes").optim.AdamW8bit
    return adamw8bit(groups, lr=options.lr, betas=betas, weight_decay=decay)


def use_average(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    """Makes the weights those to be judged and kept, or those that go on learning.

    They are the same to all optimisers but a schedule-free one. Asked twice in a row it does nothing.
    """
    if hasattr(optimizer, "eval"):
        optimizer.eval() if wanted else optimizer.train()


def groups_of(options: OptimizerConfig, trainable: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups by learning rate, in the order of the first of each."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        lr = options.lr
        if options.text_encoder_lr is not None and name.startswith("text_encoder."):
            lr = options.text_encoder_lr
        if options.lora_plus is not None and ".lora_B." in name:
            lr *= options.lora_plus
        groups.setdefault(lr, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def package(name: str) -> Any:
    """The module of an optional package.

    Raises:
        UserError: not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: pip install -e '.[{EXTRAS[name]}]'") from error


def lr_factor(step: int, *, schedule: str, warmup_steps: int, steps_per_epoch: int, epochs: int) -> float:
    """The share of the peak learning rate at an optimiser step, 0 .. 1.

    cosine_epochs is CosineAnnealingLR(T_max=epochs) stepped once an epoch, as in the slides.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (
        step // steps_per_epoch / epochs if schedule == "cosine_epochs" else step / (steps_per_epoch * epochs)
    )
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
