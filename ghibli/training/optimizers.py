"""The optimiser of a run, its parameter groups, and the learning rate as a function of the step."""

import inspect
import logging
import math
from typing import Any

import torch
from torch import nn

from ghibli.config.registry import OptimizerEntry, optimizer_entry
from ghibli.config.schema import OptimizerConfig
from ghibli.runtime.commands import install_command
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.registry import load_object

logger = logging.getLogger(__name__)


def make_optimizer(
    options: OptimizerConfig, trainable: dict[str, nn.Parameter], *, on_gpu: bool
) -> torch.optim.Optimizer:
    """Build the optimiser that `options.name` names, over the groups of `groups_of`.

    A class by its path gets weight_decay and betas if it has arguments of these names, and
    `options.options` in any case.

    Raises:
        UserError: its package is not installed, it needs a GPU, or it refuses its arguments or these weights.
    """
    entry = optimizer_entry(options.name)
    if entry.cpu_advice is not None and not on_gpu:
        raise UserError(f"optimizer.name={options.name} needs a GPU: {entry.cpu_advice}")
    arguments = {"lr": options.lr, "weight_decay": options.weight_decay, **entry.settings}
    if entry.takes_betas:
        arguments["betas"] = tuple(options.betas)
    if on_gpu:
        arguments |= entry.gpu_settings
    factory = load_factory(entry)
    if entry.is_path:
        arguments = arguments_of(factory, arguments)
    try:
        return factory(groups_of(options, trainable), **arguments | options.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.name={options.name} refuses this: {first_line(error)}") from error


def arguments_of(factory: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a class takes, and log which it does not."""
    known = inspect.signature(factory).parameters
    unused = [f"optimizer.{name}" for name in arguments if name not in known]
    if unused:
        logger.info(f"{factory.__name__} has no {' and no '.join(unused)}: not used")
    return {name: value for name, value in arguments.items() if name in known}


def check_optimizer(options: OptimizerConfig, trainable: dict[str, nn.Parameter]) -> None:
    """Build the optimiser once to see that it can be, where it needs no GPU.

    Raises:
        UserError: as make_optimizer.
    """
    if trainable and optimizer_entry(options.name).cpu_advice is None:
        make_optimizer(options, trainable, on_gpu=False)


def load_factory(entry: OptimizerEntry) -> Any:
    """Import the class of an optimiser.

    Raises:
        UserError: the package that it comes from is not installed, or it is no optimiser.
    """
    try:
        factory = load_object(entry.factory)
        if entry.is_path and not (isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)):
            raise UserError(f"optimizer.name={entry.factory} is no torch.optim.Optimizer")
        return factory
    except (ImportError, AttributeError) as error:
        if entry.is_path:
            raise UserError(f"optimizer.name={entry.factory}: {first_line(error)}") from error
        if entry.extra is None:
            raise
        package = entry.factory.partition(":")[0].partition(".")[0]
        raise UserError(f"{package} is not installed: {install_command(entry.extra)}") from error


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
