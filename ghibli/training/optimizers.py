"""The optimiser of a run, its parameter groups, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import nn

from ghibli.config.registry import OPTIMIZERS, OptimizerEntry
from ghibli.config.schema import OptimizerConfig
from ghibli.runtime.errors import UserError
from ghibli.runtime.registry import load_object


def make_optimizer(
    options: OptimizerConfig, trainable: dict[str, nn.Parameter], *, on_gpu: bool
) -> torch.optim.Optimizer:
    """Build the optimiser that `options.name` names in OPTIMIZERS, over the groups of `groups_of`.

    Raises:
        UserError: its package is not installed, or it needs a GPU.
    """
    entry = OPTIMIZERS[options.name]
    if entry.cpu_advice is not None and not on_gpu:
        raise UserError(f"optimizer.name={options.name} needs a GPU: {entry.cpu_advice}")
    arguments = {"lr": options.lr, "weight_decay": options.weight_decay, **entry.settings}
    if entry.takes_betas:
        arguments["betas"] = tuple(options.betas)
    if on_gpu:
        arguments |= entry.gpu_settings
    return load_factory(entry)(groups_of(options, trainable), **arguments)


def load_factory(entry: OptimizerEntry) -> Any:
    """Import the class of an optimiser.

    Raises:
        UserError: the optional package that it comes from is not installed.
    """
    try:
        return load_object(entry.factory)
    except ImportError as error:
        if entry.extra is None:
            raise
        package = entry.factory.partition(":")[0].partition(".")[0]
        raise UserError(f"{package} is not installed: pip install -e '.[{entry.extra}]'") from error


def use_average(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    """Switch the weights between their running average, to be judged and kept, and those that train.

    Only a schedule-free optimiser tells the two apart. A second call with the same `wanted` does nothing.
    """
    if hasattr(optimizer, "eval") and hasattr(optimizer, "train"):
        optimizer.eval() if wanted else optimizer.train()


def groups_of(options: OptimizerConfig, trainable: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameter groups, one for each learning rate, in the order of their first weights.

    Text-encoder weights learn at `options.text_encoder_lr`, and LoRA's B `options.lora_plus` times as fast.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        lr = options.lr
        if options.text_encoder_lr is not None and name.startswith("text_encoder."):
            lr = options.text_encoder_lr
        if options.lora_plus is not None and ".lora_B." in name:
            lr *= options.lora_plus
        groups.setdefault(lr, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def lr_factor(step: int, *, schedule: str, warmup_steps: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the share of the peak learning rate at an optimiser step, 0 .. 1.

    cosine_epochs is CosineAnnealingLR(T_max=epochs) stepped once an epoch, as in the reference study.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (
        step // steps_per_epoch / epochs if schedule == "cosine_epochs" else step / (steps_per_epoch * epochs)
    )
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
