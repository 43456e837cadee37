"""Gradients of a run's trained weights at its checkpoints: of an image's loss, one image at a time.

A training image's gradient is multiplied with the held-out ones and forgotten, so memory does not grow with
their number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ghibli.config.registry import optimizer_entry
from ghibli.config.schema import Config, OptimizerConfig
from ghibli.evaluation.scores import best_probe
from ghibli.runs.folder import RunDir, read_checkpoint
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import groups_of, lr_factor

BLOCKS = 8  # of held-out images, each with a gradient of its own: with those by item, most of the memory
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """A checkpoint of a run, and the training that it stands for: from the checkpoint before it."""

    name: str
    step: int
    weights: dict[str, torch.Tensor]
    rates: torch.Tensor  # (n,) what the steps since the stage before multiplied the gradient by, summed
    preconditioned: bool

    @property
    def label(self) -> str:
        return f"{self.name} (step {self.step})"


def stages_of(run: RunDir, module: GhibliModule, steps_per_epoch: int) -> list[Stage]:
    """Read the checkpoints of a run in the order of their steps, of two with one step the first.

    Raises:
        UserError: none is whole, or their weights are not those of the run.
    """
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for file in (run.best_checkpoint, run.last_checkpoint):
        if is_whole(file):
            content = read_checkpoint(file)
            found.setdefault(int(content["global_step"]), (file.name, content))
    if not found:
        raise UserError(f"{run.path}: both best.ckpt and last.ckpt are missing or damaged: train it again")
    stages, before = [], 0
    for step, (name, content) in sorted(found.items()):
        if set(content["state_dict"]) != set(module.trainable):
            raise UserError(f"{run.path}: {name} has other weights than its settings say")
        total = summed_factors(module.config, before, step, steps_per_epoch)
        rates, preconditioned = step_sizes(module, content["optimizer_states"])
        stages.append(Stage(name, step, content["state_dict"], total * rates, preconditioned))
        before = step
    return stages


def summed_factors(config: Config, first: int, last: int, steps_per_epoch: int) -> float:
    """Sum the learning rate over the optimiser steps first .. last - 1, as shares of its peak."""
    options, epochs = config.optimizer, int(config.trainer["max_epochs"])
    return sum(
        lr_factor(
            step, schedule=options.schedule, warmup_steps=options.warmup_steps,
            steps_per_epoch=steps_per_epoch, epochs=epochs,
        )
        for step in range(first, last)
    )  # fmt: skip


def step_sizes(module: GhibliModule, states: list[dict[str, Any]]) -> tuple[torch.Tensor, bool]:
    """Return what the optimiser multiplies each weight's gradient by at its peak rate, (n,), in their order.

    With Adam's second moments v that is lr / (sqrt(v / (1 - beta2^t)) + eps) (Kingma and Ba 2015, algorithm
    1); for other optimisers lr alone, as for gradient descent.

    Args:
        states: `optimizer_states` of a checkpoint.

    Returns:
        The factors, and whether the second moments are in them.
    """
    sizes: dict[int, torch.Tensor] = {}
    place, known = 0, is_adam(module.config.optimizer)
    for group, stored in zip(
        groups_of(module.config.optimizer, module.trainable), states[0]["param_groups"], strict=True
    ):
        for parameter in group["params"]:
            state = states[0]["state"].get(place, {})
            known = known and "exp_avg_sq" in state
            size = torch.full_like(parameter.detach(), group["lr"], device="cpu")
            if known:
                correction = 1 - stored["betas"][1] ** float(state["step"])
                size /= (state["exp_avg_sq"] / correction).sqrt() + stored["eps"]
            sizes[id(parameter)] = size
            place += 1
    if not known:  # for all weights alike
        for group in groups_of(module.config.optimizer, module.trainable):
            sizes |= {id(p): torch.full_like(p.detach(), group["lr"], device="cpu") for p in group["params"]}
    return flat([sizes[id(parameter)] for parameter in module.trainable.values()]), known


def is_adam(options: OptimizerConfig) -> bool:
    """Tell whether the optimiser divides by the root of its exp_avg_sq, as torch's AdamW does."""
    return optimizer_entry(options.name).factory == "torch.optim:AdamW"


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join tensors to one row (n,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def put(module: GhibliModule, stage: Stage) -> None:
    """Copy a checkpoint's weights into the module."""
    for name, parameter in module.trainable.items():
        parameter.copy_(stage.weights[name])


def training_loss(module: GhibliModule, batch: Batch) -> torch.Tensor:
    """Return the loss of some items of one image as training has it, but without dropout (eval mode).

    What training adds beside the images is left out: read_material sets loss.keep=0, and the items have no
    images of data.regularization.
    """
    if not len(module.probe.expected):  # the base's scores there, which only the log needs
        module.probe.expected = torch.zeros(module.num_train_timesteps, device=module.device)
    return module.training_step({**batch, "example": [0] * len(batch["timesteps"])}, 0)["loss"]


def held_out_loss(module: GhibliModule, batch: Batch) -> torch.Tensor:
    """Return the mean score of some items of one image: what the gain is made of."""
    return module.scores(batch, module.config.loss.own_guidance, module.base_alphas_cumprod)[0].mean()


def item_gradients(
    module: GhibliModule, batch: Batch, loss: Callable[[GhibliModule, Batch], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield the gradient (n,) of the loss on each item of an image, one backward pass each.

    Raises:
        UserError: one is not finite.
    """
    parameters = list(module.trainable.values())
    for item in range(len(batch["timesteps"])):
        with autocast(parameters[0].device):
            value = loss(module, {key: tensor[item : item + 1] for key, tensor in batch.items()})
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        own = flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        if not own.isfinite().all():
            raise UserError("a gradient is not finite: look at the weights (ghibli check)")
        yield own


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 where a GPU has it, which halves the memory; else in full precision."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


def block_of(image: int, images: int) -> int:
    """Return the block that a held-out image is in: BLOCKS of equal size, or one an image."""
    return image * min(BLOCKS, images) // images


@dataclass(frozen=True)
class Products:
    """What is kept of a training image's gradients."""

    blocks: torch.Tensor  # (B,) by how much the image lowers the loss on each block of held-out images
    levels: torch.Tensor  # (K,) cosine with the held-out gradient at the same noise level, -1 .. 1


class HeldOut:
    """Gradients of the held-out loss at each checkpoint, times the rates of the steps before it.

    Args:
        add: called after each image.
    """

    def __init__(
        self, module: GhibliModule, stages: list[Stage], batches: list[Batch], add: Callable[[], None]
    ):
        self.module, self.stages = module, stages
        self.blocks: list[torch.Tensor] = []  # of each stage (B, n): summed over images, mean over items
        self.levels: list[torch.Tensor] = []  # of each stage (K, n): summed over images, by item
        self.squares = torch.zeros(len(batches[0]["timesteps"]), dtype=torch.float64)
        for stage in stages:
            put(module, stage)
            rates = self.rates_of(stage)
            blocks = torch.zeros(min(BLOCKS, len(batches)), len(rates)).to(rates)
            levels = torch.zeros(len(self.squares), len(rates)).to(rates)
            for image, batch in enumerate(batches):
                for level, own in enumerate(item_gradients(module, batch, held_out_loss)):
                    blocks[block_of(image, len(batches))] += rates * own / len(levels)
                    levels[level] += own
                add()
            self.blocks.append(blocks)
            self.squares += (levels.square() @ rates).cpu().double()
            self.levels.append(levels.mul_(rates))

    def rates_of(self, stage: Stage) -> torch.Tensor:
        """Return a stage's rates (n,) like the trained weights."""
        return stage.rates.to(next(iter(self.module.trainable.values())))

    def products(self, batch: Batch) -> Products:
        """Multiply a training image's gradients with the held-out ones, each checkpoint with its rates.

        The cosine is that of the gradients of all checkpoints as one vector, in the metric of the rates: as
        large as the cosine of the steps that gradient and optimiser make of it.
        """
        blocks = torch.zeros(len(self.blocks[0]), dtype=torch.float64)
        dots, squares = torch.zeros_like(self.squares), torch.zeros_like(self.squares)
        for stage, of_blocks, of_levels in zip(self.stages, self.blocks, self.levels, strict=True):
            put(self.module, stage)
            rates = self.rates_of(stage)
            for level, own in enumerate(item_gradients(self.module, batch, training_loss)):
                blocks += (of_blocks @ own).cpu().double() / len(dots)
                dots[level] += (of_levels[level] @ own).item()
                squares[level] += (own.square() @ rates).item()
        sizes = (squares * self.squares).sqrt()
        return Products(blocks, torch.where(sizes > 0, dots / sizes, 0.0))


def base_by_block(run: RunDir, images: int) -> torch.Tensor:
    """Sum the base's mean loss over the held-out images of each block, (B,), as the probe has scored it.

    Raises:
        UserError: no checkpoint has these scores.
    """
    probe = best_probe(run)
    if probe is None or len(probe.base_val) != images:
        raise UserError(f"{run.path}: best.ckpt has no scores of its held-out images: train it again")
    blocks = torch.tensor([block_of(image, images) for image in range(images)])
    return torch.zeros(min(BLOCKS, images), dtype=torch.float64).index_add_(
        0, blocks, probe.base_val.double().mean(1)
    )
