"""Samplers, losses and optimisers that a setting can name. One more is one entry here, and a test.

Entries only describe: what needs torch is a `module:attribute` path that is imported at use, so that
`--help` and a typo stay fast. Code outside this package adds an entry with `SAMPLERS.register(...)`
before the configuration is composed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ghibli.runtime.registry import Registry

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SamplerEntry:
    """A diffusers scheduler, and how its steps are called."""

    label: str  # heading of its columns
    scheduler: str  # path of the scheduler class
    settings: Mapping[str, Any] = field(default_factory=dict)  # win over the base's scheduler_config.json
    step_options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of scheduler.step
    is_stochastic: bool = False  # step() draws noise: it gets the generators of the images


SAMPLERS: Registry[SamplerEntry] = Registry("sample.samplers")
# Neither clips: latents are not limited to -1 .. 1.
SAMPLERS.register(  # ancestral sampling (Ho et al. 2020, algorithm 2), variance beta tilde
    "ddpm",
    SamplerEntry(
        label="DDPM", scheduler="diffusers:DDPMScheduler", is_stochastic=True,
        settings={"clip_sample": False, "variance_type": "fixed_small"},
    ),
)  # fmt: skip
SAMPLERS.register(  # eta = 0 (Song et al. 2021, equation 12)
    "ddim",
    SamplerEntry(
        label="DDIM", scheduler="ghibli.diffusion.ddim:ExactDDIMScheduler",
        settings={"clip_sample": False}, step_options={"eta": 0.0},
    ),
)  # fmt: skip


def sampler_label(name: str) -> str:
    """Return the heading of a sampler's columns; of one that is no longer registered, its name."""
    return SAMPLERS[name].label if name in SAMPLERS else name.upper()


@dataclass(frozen=True)
class LossEntry:
    """A denoising loss."""

    function: str  # path of (noise_pred (B, C, H, W), target like it) -> losses (B,) float32


LOSSES: Registry[LossEntry] = Registry("loss.function")
LOSSES.register("mse", LossEntry("ghibli.diffusion.losses:mse"))


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimiser class, its arguments and what it needs."""

    factory: str  # path of the class: (groups, lr=, weight_decay=, and what follows)
    state_bytes: Callable[[Shape], float]  # bytes that it keeps for one trained fp32 tensor of this shape
    takes_betas: bool = True  # pass optimizer.betas
    settings: Mapping[str, Any] = field(default_factory=dict)  # further arguments
    gpu_settings: Mapping[str, Any] = field(default_factory=dict)  # further arguments on a GPU
    extra: str | None = None  # of pyproject.toml, which installs the package of `factory`
    cpu_advice: str | None = None  # what to use without a GPU; None = it runs on a CPU
    averages_weights: bool = False  # schedule-free: has train() and eval(), wants optimizer.schedule=constant
    single_lr: bool = False  # refuses parameter groups with different learning rates


def fp32_copies(count: int) -> Callable[[Shape], float]:
    """Return the state_bytes of an optimiser that keeps `count` fp32 numbers for each weight."""
    return lambda shape: 4.0 * count * math.prod(shape)


def factored_state(shape: Shape) -> float:
    """Return bytes of Adafactor's state: row and column means in place of a matrix (Shazeer & Stern 2018)."""
    if len(shape) < 2:
        return 4.0 * math.prod(shape)
    return 4.0 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def eight_bit_state(shape: Shape) -> float:
    """Return bytes of bitsandbytes' state: two 8-bit moments with an fp32 scale for each block of 256.

    Tensors below 4096 elements keep fp32 moments.
    """
    count = math.prod(shape)
    return 8.0 * count if count < 4096 else 2.0 * count + 8.0 * math.ceil(count / 256)


OPTIMIZERS: Registry[OptimizerEntry] = Registry("optimizer.name")
OPTIMIZERS.register(
    "adamw", OptimizerEntry("torch.optim:AdamW", fp32_copies(2), gpu_settings={"fused": True})
)
OPTIMIZERS.register(
    "adamw8bit",
    OptimizerEntry(
        "bitsandbytes.optim:AdamW8bit", eight_bit_state, extra="bitsandbytes",
        cpu_advice="use adamw, or adafactor to save memory",
    ),
)  # fmt: skip
OPTIMIZERS.register(  # Shazeer and Stern 2018, with the learning rate as given
    "adafactor",
    OptimizerEntry(
        "transformers.optimization:Adafactor", factored_state, takes_betas=False,
        settings={"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
)  # fmt: skip
OPTIMIZERS.register(  # Mishchenko and Defazio 2023: optimizer.lr scales the learning rate that it finds
    "prodigy", OptimizerEntry("prodigyopt:Prodigy", fp32_copies(4), extra="prodigy", single_lr=True)
)
OPTIMIZERS.register(  # Defazio et al. 2024: averages the weights instead of lowering the learning rate
    "adamw_schedulefree",
    OptimizerEntry(
        "schedulefree:AdamWScheduleFree", fp32_copies(2), extra="schedulefree", averages_weights=True
    ),
)
