"""Estimate what a run needs on a CPU: memory, measured on the model itself at a small size, and disk."""

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path

import torch

from ghibli.config.registry import Shape, fp32_copies, optimizer_entry
from ghibli.config.schema import Config, OptimizerConfig
from ghibli.data.latents import chunk_size
from ghibli.data.validation_items import items_in_a_pass
from ghibli.models.cost import FRAGMENTS, Cost, measure_cost
from ghibli.runs.identity import code_hash
from ghibli.runtime.cache import cached
from ghibli.training.module import GhibliModule

CHECKPOINTS = 4  # last, previous, best, and the one that is being written
MIXED = 0.53  # share of fp32's activations that mixed precision keeps for training, measured on the demo
BESIDE = 40 * 2**20  # bytes on top of all tensors: what Lightning and the loggers import as training starts


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes at its peak, beside the weights of the base."""

    kept: float  # gradients, the optimiser's state, the latents: throughout training
    phases: dict[str, float]  # encoding, training, probe, sampling: one at a time

    @property
    def highest(self) -> str:
        """Name of the phase that needs most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def total(self) -> float:
        """Bytes at the peak, fragmentation included."""
        return BESIDE + FRAGMENTS * (self.kept + self.phases[self.highest])


def estimate_memory(module: GhibliModule, images: int, precision: str, beside: int = 0) -> Memory:
    """Estimate what training, probe and grids of this run take beside what the process holds already.

    The model runs on 64 x 64 and 64 x 128 px; what its operations keep alive is counted, scaled up and
    multiplied by FRAGMENTS. That and BESIDE were fitted to the demo on a CPU. How near the peaks are to the
    measured ones, up to SD 1.5's size, is in benchmarks/RESULTS.md. For a GPU, see prepare.rehearsal.

    Args:
        module: on the CPU, before training; left as it was.
        images: number of images whose latents are kept.
        precision: Lightning's, such as 32-true or bf16-mixed.
        beside: number of images in data.regularization.
    """
    config, side = module.config, module.config.model.resolution
    cost, loss = step_costs(module), config.loss
    shapes = [tuple(p.shape) for p in module.trainable.values()]
    gradients = sum(4 * p.numel() for p in module.trainable.values())
    latents = latents_size(side, images, config.data.flip) + latents_size(side, beside)
    branches = 1 if loss.own_guidance == 1 else 2
    scored = items_in_a_pass(side, config.validation.items_per_image)
    phases = {
        "encoding the images": cost["encode"].at(side, chunk_size(side)),
        "the probe": cost["score"].at(side, branches * scored),
    }
    if config.finetune != "none":
        # of all of which the backward pass needs what they computed
        passes = 1 + (loss.keep > 0) + (config.data.regularization is not None)
        phases["training"] = cost["train"].at(side, passes * branches * config.data.batch_size)
        if precision.endswith("mixed"):
            phases["training"] *= MIXED
    if config.sample.every_n_epochs > 0:
        both = 1 if max(config.sample.guidance) == 1 else 2
        denoising = cost["score"].at(side, both * len(config.sample.prompts))
        phases["drawing the grid"] = max(denoising, cost["decode"].at(side, 1))
    elif config.samples_price:  # one image at a time, so with grids these decide
        phases["sampling the base"] = max(cost["score"].at(side, 2), cost["decode"].at(side, 1))
    return Memory(gradients + optimizer_state_size(config.optimizer, shapes) + latents, phases)


def optimizer_state_size(options: OptimizerConfig, shapes: Iterable[Shape]) -> float:
    """Return the bytes that an optimiser keeps for trained fp32 tensors, and their average if any."""
    state_bytes, average = optimizer_entry(options.name).state_bytes, fp32_copies(1)
    averaged = options.ema_decay is not None
    return sum(state_bytes(shape) + averaged * average(shape) for shape in shapes)


def latents_size(resolution: int, images: int, flip: bool = False) -> int:
    """Return the bytes of the VAE moments in memory and in the cache: mean and log-variance, fp32."""
    return (2 if flip else 1) * images * 2 * 4 * 4 * (resolution // 8) ** 2


def step_costs(module: GhibliModule) -> dict[str, Cost]:
    """Return the cost of each kind of step, kept in the cache for each base, adapter and code."""
    config = module.config
    key = {
        "base": module.results_key, "finetune": config.finetune, "lora": asdict(config.lora),
        "frozen_bits": config.model.frozen_bits, "compute": asdict(config.compute), "draws": config.draws,
        "code": code_hash(),
    }  # fmt: skip

    @cache
    def measure() -> dict[str, torch.Tensor]:
        found = measure_steps(module).items()
        return {name: torch.tensor(astuple(cost), dtype=torch.float64) for name, cost in found}

    try:
        found = cached(Path(config.cache_dir) / "step_costs", key, measure)
    except OSError:  # a cache that cannot be written; who needs it says so
        found = measure()
    return {name: Cost(*values.tolist()) for name, values in found.items()}


def measure_steps(module: GhibliModule) -> dict[str, Cost]:
    """Measure each kind of step in fp32 on the CPU, without touching the global random generators."""
    base, channels = module.base, module.base.vae.config.latent_channels
    was_training = module.unet.training, module.text_encoder.training

    def latents(height: int, width: int) -> torch.Tensor:
        return torch.zeros(1, channels, height // base.vae_factor, width // base.vae_factor)

    def predict(height: int, width: int) -> torch.Tensor:
        prompt_embeds = base.encode_prompts(module.empty_ids)
        timestep = torch.zeros(1, dtype=torch.long)
        return base.unet(latents(height, width), timestep, prompt_embeds, return_dict=False)[0]

    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            found = {
                "encode": measure_cost(lambda h, w: base.vae.encode(torch.zeros(1, 3, h, w)).latent_dist, 32),
                "score": measure_cost(predict, 64),
            }
            if module.config.draws:
                found["decode"] = measure_cost(lambda h, w: base.decode(latents(h, w)), 32)
        if module.trainable:
            module.unet.train()
            module.text_encoder.train()
            found["train"] = measure_cost(predict, 64)
            module.unet.train(was_training[0])
            module.text_encoder.train(was_training[1])
    return found


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes."""

    checkpoints: int
    adapters: int  # or the whole UNet of a full fine-tuning
    grids: int

    @property
    def total(self) -> int:
        """Bytes of all files together."""
        return self.checkpoints + self.adapters + self.grids


def estimate_disk(config: Config, shapes: list[Shape], epochs: int, cells: int) -> Disk:
    """Estimate the run folder: checkpoints (3 and one being written), adapters (best, last, kohya), grids.

    Args:
        shapes: of the trained tensors; a checkpoint holds them in fp32 and the optimiser's state.
        epochs: at most.
        cells: columns of a grid.
    """
    weights = sum(4 * math.prod(shape) for shape in shapes)
    every, side = config.sample.every_n_epochs, config.model.resolution
    tile = (side if side >= 256 else 2 * side) ** 2
    grids = 0 if every == 0 else 1 + epochs // every + (every > 1)  # at the end, every n, after epoch 1
    images = grids * 2 * cells * len(config.sample.prompts)
    checkpoint = weights + optimizer_state_size(config.optimizer, shapes)
    return Disk(int(CHECKPOINTS * checkpoint), 3 * weights, int(1.5 * tile * images))  # bytes of a PNG's px
