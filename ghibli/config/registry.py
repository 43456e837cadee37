"""Samplers, losses, optimisers and dashboards that a setting can name. One more is one entry and a test.

Entries only describe: what needs torch is a `module:attribute` path that is imported at use, so that
`--help` and a typo stay fast. Code outside this package adds an entry with `SAMPLERS.register(...)`
before the configuration is composed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ghibli.config.checks import require
from ghibli.runtime.registry import Registry

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SamplerEntry:
    """A diffusers scheduler, and how its steps are called."""

    label: str  # heading of its columns, and its name in A1111
    scheduler: str  # path of the scheduler class
    settings: Mapping[str, Any] = field(default_factory=dict)  # win over the base's scheduler_config.json
    step_options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of scheduler.step
    is_stochastic: bool = False  # step() draws noise: it gets the generators of the images
    other_names: tuple[str, ...] = ()  # in other programs, where neither name nor label is theirs
    most_steps: int = 1000  # denoising steps


SAMPLERS: Registry[SamplerEntry] = Registry("sample.samplers")
# None clips: latents are not limited to -1 .. 1.
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
SAMPLERS.register(  # Karras et al. 2022, algorithm 1 without the second order: the ODE in sigma
    "euler", SamplerEntry("Euler", "diffusers:EulerDiscreteScheduler")
)
SAMPLERS.register(  # Euler's step to a lower noise level, and fresh noise back up (k-diffusion)
    "euler_a",
    SamplerEntry(
        label="Euler a", scheduler="diffusers:EulerAncestralDiscreteScheduler", is_stochastic=True,
        other_names=("euler_ancestral",),
    ),
)  # fmt: skip
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "thresholding": False}
SAMPLERS.register(  # Lu et al. 2022, "DPM-Solver++", algorithm 2
    "dpmpp_2m",
    SamplerEntry("DPM++ 2M", "diffusers:DPMSolverMultistepScheduler", settings=DPM, most_steps=999),
)
SAMPLERS.register(  # the same with the noise levels of Karras et al. 2022, equation 5
    "dpmpp_2m_karras",
    SamplerEntry(
        label="DPM++ 2M Karras", scheduler="diffusers:DPMSolverMultistepScheduler",
        settings={**DPM, "use_karras_sigmas": True},
    ),
)  # fmt: skip
SAMPLERS.register(  # the same paper's SDE (section 4) in single steps: two of these make one of A1111
    "dpmpp_sde",
    SamplerEntry(
        label="DPM++ SDE", scheduler="diffusers:DPMSolverSinglestepScheduler", is_stochastic=True,
        settings={**DPM, "algorithm_type": "sde-dpmsolver++", "lower_order_final": True}, most_steps=999,
    ),
)  # fmt: skip
SAMPLERS.register(  # Zhao et al. 2023, with B(h) = e^h - 1
    "unipc",
    SamplerEntry(
        label="UniPC", scheduler="diffusers:UniPCMultistepScheduler", other_names=("uni_pc_bh2",),
        settings={"solver_order": 2, "solver_type": "bh2", "thresholding": False}, most_steps=999,
    ),
)  # fmt: skip
SAMPLERS.register(  # Luo et al. 2023, for models or adapters that were distilled to few steps
    "lcm",
    SamplerEntry(
        label="LCM", scheduler="diffusers:LCMScheduler", is_stochastic=True,
        settings={"clip_sample": False, "thresholding": False}, most_steps=50,
    ),
)  # fmt: skip


def sampler_label(name: str) -> str:
    """Return the heading of a sampler's columns; of one that is no longer registered, its name."""
    return SAMPLERS[name].label if name in SAMPLERS else name.upper()


def sampler_name(text: str, key: str) -> str:
    """Return our name of a sampler that was named as here, in A1111 or in ComfyUI, such as `DPM++ 2M Karras`.

    Args:
        key: the setting or option that the user typed.

    Raises:
        UserError: no such sampler.
    """
    for name, entry in SAMPLERS.items():
        if letters_of(text) in map(letters_of, (name, entry.label, *entry.other_names)):
            return name
    SAMPLERS.require(text, key)
    return text


def letters_of(name: str) -> str:
    """Return a sampler's name without what programs spell differently: case, spaces, `_`, `++` for `pp`."""
    return re.sub(r"[\s_-]", "", name.lower().replace("++", "pp"))


def check_steps(sampler: str, steps: int, key: str) -> None:
    """Raise a UserError unless a sampler can denoise in this many steps.

    Args:
        sampler: a name in SAMPLERS.
        key: the setting or option that the user typed.
    """
    most = SAMPLERS[sampler].most_steps
    which = f" with {sampler}" if most != SamplerEntry.most_steps else ""
    require(1 <= steps <= most, key, steps, f"from 1 to {most}{which}")


@dataclass(frozen=True)
class LossEntry:
    """A denoising loss."""

    function: str  # path of (noise_pred (B, C, H, W), target like it, **settings) -> losses (B,) float32
    settings: Mapping[str, str] = field(default_factory=dict)  # argument -> the key of `loss` that it is


LOSSES: Registry[LossEntry] = Registry("loss.function")
LOSSES.register("mse", LossEntry("ghibli.diffusion.losses:mse"))
LOSSES.register("huber", LossEntry("ghibli.diffusion.losses:huber", {"c": "huber_c"}))
LOSSES.register("l1", LossEntry("ghibli.diffusion.losses:l1"))


@dataclass(frozen=True)
class TermEntry:
    """A term that is added to the denoising loss, and has a column of its own in metrics.csv."""

    function: str  # path of (noise_pred (B, C, H, W), target like it) -> losses (B,) float32


TERMS: Registry[TermEntry] = Registry("loss.terms")  # none yet; docs/extending.md adds one


@dataclass(frozen=True)
class WeightingEntry:
    """A weight of each example's loss, by the signal-to-noise ratio (SNR) of its timestep."""

    function: str  # path of (snr (B,), gamma=) -> weights (B,) of the squared error of x_0
    gamma: float | None  # loss.snr_gamma where that is null; None = the weighting has no gamma
    at_zero_snr: float | None  # weight of the squared error of epsilon there, a limit; None = infinite


WEIGHTINGS: Registry[WeightingEntry] = Registry("loss.weighting")
WEIGHTINGS.register("min_snr", WeightingEntry("ghibli.diffusion.losses:min_snr", 5.0, 1.0))
WEIGHTINGS.register("soft_min_snr", WeightingEntry("ghibli.diffusion.losses:soft_min_snr", 4.0, 1.0))
WEIGHTINGS.register("debiased", WeightingEntry("ghibli.diffusion.losses:debiased", None, None))
WEIGHTINGS.register("p2", WeightingEntry("ghibli.diffusion.losses:p2", None, 1.0))


@dataclass(frozen=True)
class DistributionEntry:
    """A distribution of the timesteps of training."""

    cdf: str  # path of (x in 0 .. 1, a, b) -> share of the timesteps below x, 0 .. 1, increasing
    parameters: tuple[float, float]  # a and b where loss.timestep_parameters is null
    least: tuple[float, float]  # a and b must be above these


DISTRIBUTIONS: Registry[DistributionEntry] = Registry("loss.timestep_distribution")
DISTRIBUTIONS.register(  # a = mean and b = deviation of logit(t / T) (Esser et al. 2024, section 3.1)
    "logit_normal",
    DistributionEntry("ghibli.diffusion.timesteps:logit_normal_cdf", (0.0, 1.0), (-math.inf, 0.0)),
)
DISTRIBUTIONS.register(  # a and b of the beta distribution of t / T
    "beta", DistributionEntry("ghibli.diffusion.timesteps:beta_cdf", (2.0, 2.0), (0.0, 0.0))
)


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
    is_path: bool = False  # a class that the user named, of which nothing is known


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
OPTIMIZERS.register(  # Jordan et al. 2024, its rate scaled to AdamW's as by Liu et al. 2025; matrices only
    "muon",
    OptimizerEntry(
        "torch.optim:Muon", fp32_copies(1), takes_betas=False, settings={"adjust_lr_fn": "match_rms_adamw"}
    ),
)


def optimizer_entry(name: str) -> OptimizerEntry:
    """Return the entry of OPTIMIZERS, or one for a class by its path, such as `torch.optim:NAdam`.

    Nothing is imported here. Of a class by its path the memory is taken to be that of Adam.

    Raises:
        UserError: neither.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return OPTIMIZERS[name]
    return OptimizerEntry(name, fp32_copies(2), is_path=True)


@dataclass(frozen=True)
class DashboardEntry:
    """A place that shows a run while it trains."""

    label: str
    factory: str | None = None  # path of a function of (config, run, name) that starts it; None: no dashboard
    extra: str | None = None  # its package, if optional, and the extra of pyproject.toml that installs it


LOGGERS = "ghibli.training.loggers"
DASHBOARDS: Registry[DashboardEntry] = Registry("logger")
DASHBOARDS.register("wandb", DashboardEntry("W&B", f"{LOGGERS}.wandb_logger:open_dashboard"))
DASHBOARDS.register(
    "tensorboard",
    DashboardEntry("TensorBoard", f"{LOGGERS}.tensorboard_logger:open_dashboard", extra="tensorboard"),
)
DASHBOARDS.register(
    "trackio", DashboardEntry("trackio", f"{LOGGERS}.trackio_logger:open_dashboard", extra="trackio")
)
DASHBOARDS.register("csv", DashboardEntry("CSV files"))  # metrics.csv and probe.csv, which every run writes
DASHBOARDS.register("none", DashboardEntry("none"))


def dashboard_names(given: Any) -> list[str]:
    """Return the dashboards that `logger` names, each once; csv and none name no dashboard.

    Raises:
        UserError: a name that is unknown, or none beside another.
    """
    names = list(given) if isinstance(given, list | tuple) else ["none" if given is None else given]
    require(all(isinstance(name, str) for name in names), "logger", given, "a name, or a list of names")
    entries = {name: DASHBOARDS[name] for name in names}
    require("none" not in entries or len(entries) == 1, "logger", given, "none alone, or other names")
    return [name for name, entry in entries.items() if entry.factory is not None]
