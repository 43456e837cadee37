"""The typed schema of conf/: meaning, type and accepted values of every key.

Values are in conf/*.yaml only; no field here has a default. Imports neither torch nor Hydra.
"""

import re
from dataclasses import dataclass, field, fields, replace
from math import inf, isfinite
from pathlib import PurePath
from typing import Any

from ghibli.config.checks import require, require_choice, require_finite
from ghibli.config.registry import (
    DISTRIBUTIONS,
    LOSSES,
    TERMS,
    WEIGHTINGS,
    check_steps,
    dashboard_names,
    optimizer_entry,
    sampler_name,
)
from ghibli.config.trainer_flags import MOST_PROCESSES, check_trainer
from ghibli.runtime.errors import UserError

NO_EFFECT = {"affects_result": False}  # metadata of a field or section that cannot change a run's result
MOST_THREADS = 1024
MOST_PRICE_IMAGES = 32  # as many captions of data/everyday_captions.txt are for measuring
MOST_SEEDS = 100
CONFIG_VERSION = 2  # raise it when a key is renamed, removed or changes its meaning
RENAMED_KEYS = {  # (section, old name) -> new name; for older runs, and for who types the old name
    ("validation", "items_per_picture"): "items_per_image",
    ("validation", "max_pictures"): "max_images",
}
LATER_KEYS: dict[str, Any] = {  # added within this version -> what runs without the key did
    "name": None,
    "threads": None,
    "logger": "wandb",
    "seeds": 1,
    "data": {"grid_epochs": "", "regularization": None, "exclude": None},
    "model": {"config": None, "clip_skip": 1, "frozen_bits": None, "made_for": "samples"},
    "local": {"sd15_config": None, "caption": None},
    "evaluate": {"every_n_epochs": 0, "epoch_samples": 64, "sampler_steps": None},
    "lora": {
        "variant": "lora",
        "init": None,
        "text_encoder_targets": ["q_proj", "k_proj", "v_proj", "out_proj"],
    },
    "loss": {
        "function": "mse",
        "huber_c": 0.1,
        "weighting": None,
        "timestep_range": None,
        "timestep_distribution": "uniform",
        "timestep_parameters": None,
        "terms": {},
        "share_dropout": False,
        "unconditional": "trained",
        "guidance_target": None,
        "keep": 0.0,
        "regularization": 1.0,
    },
    "validation": {"price_images": 0},
    "optimizer": {"text_encoder_lr": None, "lora_plus": None, "options": {}, "ema_decay": None},
    "early_stopping": {"min_improvement": 0.0},
    "compute": {"compile": False, "channels_last": False, "checkpoint_every": 0},
}
TARGETS = {  # lora.targets by name: suffixes of the names of UNet layers
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "ff": ["ff.net.0.proj", "ff.net.2"],
    "conv": ["proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"],
}
TARGETS["all"] = [name for names in TARGETS.values() for name in names]
TARGETS["none"] = []
TEXT_ENCODER_TARGETS = {  # lora.text_encoder_targets by name, in the same way
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "mlp": ["fc1", "fc2"],
    "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


@dataclass
class LocalConfig:
    """Paths on this machine, from conf/local/default.yaml (git-ignored)."""

    sd15: str  # diffusers folder, hub id or single .safetensors file of Stable Diffusion 1.5
    sd15_config: str | None  # for a single file: the folder with its configs and tokenizer
    ghibli: str | None  # folder of the Ghibli images
    caption: str | None  # caption of Ghibli images that have none


@dataclass
class ModelConfig:
    """The base model to fine-tune."""

    path: str  # "demo", a diffusers folder, a hub id or a single .safetensors file
    config: str | None  # for a single file: the folder with configs and tokenizer; None = the hub's
    resolution: int  # side of a training image in px
    lr: float  # peak learning rate that suits this base
    clip: str | None = field(metadata=NO_EFFECT)  # folder or hub id of the model for the CLIP score
    adapter: str | None  # folder of an adapter to merge into the base first; None = none
    adapter_scale: float  # weight of that adapter
    clip_skip: int  # the text encoder's last layer that is used, counted from its end: 1 = all
    made_for: str  # what its price is measured on: scenes, drawn by our code, or samples of its own
    frozen_bits: int | None  # of the linear layers' frozen weights in training; None = those of precision

    def __post_init__(self) -> None:
        require(
            self.clip_skip >= 1, "model.clip_skip", self.clip_skip, "1 (all layers), 2 (all but one), ..."
        )
        scale = self.adapter_scale
        require(isfinite(scale), "model.adapter_scale", scale, "a finite number")
        require(
            self.resolution >= 64 and self.resolution % 64 == 0,
            "model.resolution", self.resolution, "a multiple of 64 (the UNet halves the latents thrice)",
        )  # fmt: skip
        require_finite("model.adapter_scale", self.adapter_scale)
        require_choice("model.made_for", self.made_for, ("scenes", "samples"))
        ok = self.frozen_bits in (None, 8, 4)
        require(ok, "model.frozen_bits", self.frozen_bits, "null, 8 or 4")


@dataclass
class DrawConfig:
    """Images that ghibli/demo/scenes draws when the folder does not exist yet."""

    look: str  # drawn or photo
    count: int  # number of images

    def __post_init__(self) -> None:
        require_choice("data.draw.look", self.look, ("drawn", "photo"))
        require(self.count >= 2, "data.draw.count", self.count, "at least 2")


@dataclass
class DataConfig:
    """The image set and how it reaches the model."""

    root: str | None  # folder of images and captions
    draw: DrawConfig | None  # images to draw there first; None = the folder must exist
    reference: str | None = field(metadata=NO_EFFECT)  # folder of images that evaluation compares with
    reference_draw: DrawConfig | None = field(metadata=NO_EFFECT)  # as draw, for the reference folder
    regularization: str | None  # folder of images of what is to be kept; None = none
    style: str  # appended to every caption
    caption: str | None  # caption of images that have none
    exclude: str | None  # file with the name of an image a line, which are left out; None = none
    val_fraction: float  # share of images held out
    resize: str  # squash, center_crop or bucket
    flip: bool  # mirror every training example with probability 1/2
    min_side: int  # px; smaller images are skipped
    batch_size: int  # examples in one forward pass on one device
    accumulate: int  # forward passes in one optimiser step
    epochs: int  # passes over the training images
    workers: int = field(metadata=NO_EFFECT)  # data loader processes
    grid_epochs: str = field(metadata=NO_EFFECT)  # trainer.max_epochs of the grid `slides`

    @property
    def root_folder(self) -> str:
        """`root`, which Config refuses to leave unset."""
        assert self.root is not None, "Config refuses data.root=null"
        return self.root

    @property
    def square_resize(self) -> str:
        """How to make an image square, as samples are, to compare the two."""
        return "center_crop" if self.resize == "bucket" else self.resize

    def __post_init__(self) -> None:
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1")
        require_choice("data.resize", self.resize, ("squash", "center_crop", "bucket"))
        least_of = {"min_side": 1, "batch_size": 1, "accumulate": 1, "epochs": 1, "workers": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            require(value >= least, f"data.{name}", value, f"at least {least}")
        require(self.workers <= MOST_PROCESSES, "data.workers", self.workers, f"at most {MOST_PROCESSES}")


def target_list(key: str, targets: Any, named: dict[str, list[str]]) -> list[str]:
    """Return suffixes of layer names, given as such a list or by names such as attention+ff.

    Args:
        key: the setting, for messages.
        named: TARGETS or TEXT_ENCODER_TARGETS.
    """
    if isinstance(targets, str):
        names = targets.split("+")
        for name in names:
            require_choice(key, name, tuple(named))
        return [suffix for name in names for suffix in named[name]]
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    require(is_list, key, targets, f"a list of layer names, or {', '.join(named)}, joined by a plus")
    return targets


VARIANTS = ("lora", "dora", "rslora", "loha", "lokr", "oft")  # lora.variant


@dataclass
class LoraConfig:
    """The adapter, after Hu et al. 2021: W' = W + (alpha / rank) B A."""

    rank: int  # rows of A, columns of B
    alpha: float  # strength: B A is scaled by alpha / rank
    dropout: float  # probability of dropping an input of A, in training only
    text_encoder: bool  # adapt the text encoder too
    text_encoder_targets: Any  # name suffixes of its layers; or names of TEXT_ENCODER_TARGETS
    targets: Any  # name suffixes of the UNet layers to adapt; or names of TARGETS, joined by a plus
    variant: str  # one of VARIANTS; the formulas and papers are in adapters/layers.py
    init: (
        str | None
    )  # adapter file, folder or run to start from; None = B is 0, so training starts from the base

    def __post_init__(self) -> None:
        self.targets = target_list("lora.targets", self.targets, TARGETS)
        key, value = "lora.text_encoder_targets", self.text_encoder_targets
        self.text_encoder_targets = target_list(key, value, TEXT_ENCODER_TARGETS)
        require(len(self.text_encoder_targets) > 0, key, value, "at least one layer name")
        require_choice("lora.variant", self.variant, VARIANTS)
        require(1 <= self.rank <= 1024, "lora.rank", self.rank, "a whole number from 1 to 1024")
        require(0 < self.alpha < inf, "lora.alpha", self.alpha, "more than 0, and finite")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to less than 1")
        wanted = "at least one layer name, or lora.text_encoder=true"
        require(len(self.targets) > 0 or self.text_encoder, "lora.targets", self.targets, wanted)


def guidance_text(guidance: float, target: float | None) -> str:
    """Say the guidance of a training: `guidance 1`, or `guidance target 7.5`."""
    return f"guidance {guidance:g}" if target is None else f"guidance target {target:g}"


@dataclass
class LossConfig:
    """The training loss."""

    function: str  # one of LOSSES; the probe measures with mse, whatever trains
    guidance: float  # w of uncond + w (cond - uncond); 1 = off
    guidance_target: float | None  # s of the target uncond + s (noise - uncond) of cond; None = the noise
    unconditional: str  # trained, detached or base: where uncond comes from
    share_dropout: bool  # the adapters drop the same in both branches
    caption_dropout: float  # share of examples trained without a caption
    huber_c: float  # error at which `huber` turns from a square to a line
    weighting: str | None  # one of WEIGHTINGS; None = equal weights, or min_snr where snr_gamma is set
    snr_gamma: float | None  # gamma of min_snr and soft_min_snr; None = their own
    noise_offset: float  # scale of noise shared by all pixels of a channel
    noise_schedule: str  # base or linear
    timesteps: str  # spread or independent
    timestep_range: list[int] | None  # first and last timestep, both trained; None = all of the base's
    timestep_distribution: str  # uniform, or one of DISTRIBUTIONS over the range
    timestep_parameters: list[float] | None  # its two; None = its own
    terms: dict[str, float]  # name in TERMS -> weight of what is added to the loss
    keep: float  # weight of the distance to the frozen base on other captions; 0 = off
    regularization: float  # weight of the loss on the images of data.regularization

    @property
    def own_guidance(self) -> float:
        """The g at which uncond + g (cond - uncond) learns to predict the noise: the probe measures there.

        At the optimum of guidance_target, cond is uncond + s (noise - uncond), so g is 1 / s.
        """
        return self.guidance if self.guidance_target is None else 1 / self.guidance_target

    @property
    def guidance_text(self) -> str:
        """The guidance of the training in words: `guidance 1`, or `guidance target 7.5`."""
        return guidance_text(self.guidance, self.guidance_target)

    @property
    def weighting_name(self) -> str | None:
        """The entry of WEIGHTINGS that weighs the examples; None = none does."""
        return "min_snr" if self.weighting is None and self.snr_gamma is not None else self.weighting

    def __post_init__(self) -> None:
        LOSSES.require(self.function)
        for name, weight in self.terms.items():
            TERMS.require(name)
            if name in ("loss", "keep", "regularization"):
                raise UserError(
                    f"loss.terms.{name}: metrics.csv has a column train/{name} of its own: rename the term"
                )
            require(isfinite(weight), f"loss.terms.{name}", weight, "a finite number")
        require(0 < self.huber_c < inf, "loss.huber_c", self.huber_c, "more than 0, and finite")
        require(0 <= self.keep < inf, "loss.keep", self.keep, "0 (off) or more, and finite")
        weight = self.regularization
        require(0 < weight < inf, "loss.regularization", weight, "more than 0, and finite")
        self.check_guidance()
        dropout, gamma = self.caption_dropout, self.snr_gamma
        require(0 <= dropout <= 1, "loss.caption_dropout", dropout, "from 0 to 1")
        require(gamma is None or gamma > 0, "loss.snr_gamma", gamma, "more than 0, or null")
        require(0 <= self.noise_offset <= 1, "loss.noise_offset", self.noise_offset, "from 0 to 1")
        require_choice("loss.noise_schedule", self.noise_schedule, ("base", "linear"))
        if self.weighting is not None:
            has_gamma = WEIGHTINGS[self.weighting].gamma is not None
            require(
                gamma is None or has_gamma, "loss.snr_gamma", gamma, f"null, since {self.weighting} has none"
            )
        require_choice("loss.timesteps", self.timesteps, ("spread", "independent"))
        self.check_timesteps()

    def check_guidance(self) -> None:
        """Require one guidance, of loss or target, and no setting of the other branch without any."""
        require(
            self.guidance >= 1, "loss.guidance", self.guidance,
            "1 (off) or more; 7.5 is the reference study's second value",
        )  # fmt: skip
        target, kind = self.guidance_target, self.unconditional
        ok = target is None or (1 <= target < inf)
        require(ok, "loss.guidance_target", target, "1 or more, and finite; or null")
        wanted = f"null with loss.guidance={self.guidance:g}: one of the two is guided, loss or target"
        require(target is None or self.guidance == 1, "loss.guidance_target", target, wanted)
        require_choice("loss.unconditional", kind, ("trained", "detached", "base"))
        is_guided = self.own_guidance != 1
        why = "since at guidance 1 there is no unconditional branch (loss.guidance, loss.guidance_target)"
        require(is_guided or kind == "trained", "loss.unconditional", kind, f"trained, {why}")
        require(is_guided or not self.share_dropout, "loss.share_dropout", "true", f"false, {why}")

    def check_timesteps(self) -> None:
        """Require a range and parameters that the distribution has."""
        chosen, name = self.timestep_range, self.timestep_distribution
        ok = chosen is None or (len(chosen) == 2 and 0 <= chosen[0] <= chosen[1])
        require(ok, "loss.timestep_range", chosen, "first and last timestep, such as [0,499], or null")
        require_choice("loss.timestep_distribution", name, ("uniform", *DISTRIBUTIONS))
        given = self.timestep_parameters
        if given is None:
            return
        key = "loss.timestep_parameters"
        require(name != "uniform", key, given, "null, since uniform has none")
        require(len(given) == 2, key, given, f"two numbers for {name}")
        least = DISTRIBUTIONS[name].least
        ok = all(isfinite(x) and x > above for x, above in zip(given, least, strict=True))
        wanted = " and ".join("finite" if above == -inf else f"above {above:g}" for above in least)
        require(ok, key, given, f"two numbers for {name}, {wanted}")


@dataclass
class OptimizerConfig:
    """The optimiser and its learning rate schedule."""

    name: str  # one of OPTIMIZERS, or the path of a class, such as torch.optim:NAdam
    options: dict[str, Any]  # further arguments of its class
    lr: float  # peak learning rate
    text_encoder_lr: float | None  # peak learning rate of the text encoder; None = lr
    lora_plus: float | None  # LoRA+ (Hayou et al. 2024): learning rate of B over that of A; None = 1
    weight_decay: float  # decoupled weight decay
    betas: list[float]  # decay rates of the first and second moment
    schedule: str  # cosine_epochs, cosine or constant
    warmup_steps: int  # optimiser steps of linear warm-up
    ema_decay: float | None  # of the average of the trained weights, which is judged and kept; None = off

    def __post_init__(self) -> None:
        entry, decay = optimizer_entry(self.name), self.ema_decay
        require(decay is None or 0 < decay < 1, "optimizer.ema_decay", decay, "between 0 and 1, or null")
        ok, wanted = (
            decay is None or not entry.averages_weights,
            f"null, since {self.name} averages by itself",
        )
        require(ok, "optimizer.ema_decay", decay, wanted)
        if "lr" in self.options or "params" in self.options:
            raise UserError(
                "optimizer.options: set the learning rate with optimizer.lr; params are the run's"
            )
        if entry.averages_weights:
            ok, wanted = self.schedule == "constant", "constant, since this optimiser averages instead"
            require(ok, "optimizer.schedule", self.schedule, wanted)
        require(0 < self.lr <= 1, "optimizer.lr", self.lr, "more than 0 and at most 1")
        for key, most in (("text_encoder_lr", 1), ("lora_plus", 100)):
            value = getattr(self, key)
            ok = value is None or 0 < value <= most
            require(ok, f"optimizer.{key}", value, f"more than 0 and at most {most}, or null")
            ok = value is None or not entry.single_lr
            require(ok, f"optimizer.{key}", value, f"null, since {self.name} takes a single learning rate")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas", self.betas, "two numbers from 0 to less than 1",
        )  # fmt: skip
        require_choice("optimizer.schedule", self.schedule, ("cosine_epochs", "cosine", "constant"))
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")


@dataclass
class ComputeConfig:
    """How the model computes; what it learns changes by rounding only."""

    compile: bool  # torch.compile of the UNet in training
    channels_last: bool  # channels-last memory format of the UNet's convolutions
    checkpoint_every: int  # gradient checkpointing of every n-th block; 0 = none

    def __post_init__(self) -> None:
        value = self.checkpoint_every
        require(value >= 0, "compute.checkpoint_every", value, "0 (none), 1 (every block), 2, ...")


@dataclass
class ValidationConfig:
    """The fixed items scored after every epoch."""

    items_per_image: int  # fixed (timestep, noise) pairs
    max_images: int  # most held-out images to score, and as many training images
    price_images: int  # images of what the base was made for, on which the price is measured

    def __post_init__(self) -> None:
        for name in ("items_per_image", "max_images"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "at least 1")
        ok = 0 <= self.price_images <= MOST_PRICE_IMAGES
        wanted = f"from 0 (none) to {MOST_PRICE_IMAGES}"
        require(ok, "validation.price_images", self.price_images, wanted)


@dataclass
class EarlyStoppingConfig:
    """When to stop for lack of progress."""

    patience: int | None  # epochs without an improvement
    watch: str  # probe or train_loss
    min_improvement: float  # least improvement of the held-out gain that counts, as a share (0.01 = 1 point)

    def __post_init__(self) -> None:
        least = self.min_improvement
        require(0 <= least < 1, "early_stopping.min_improvement", least, "from 0 to less than 1")
        require_choice("early_stopping.watch", self.watch, ("probe", "train_loss"))
        ok = self.patience is None or self.patience >= 1
        require(ok, "early_stopping.patience", self.patience, "at least 1, or null for never")


@dataclass
class CheckpointConfig:
    """When to write last.ckpt, besides at the end of every epoch."""

    every_n_steps: int  # optimiser steps between two writes

    def __post_init__(self) -> None:
        require(self.every_n_steps >= 1, "checkpoint.every_n_steps", self.every_n_steps, "at least 1")


@dataclass
class SampleConfig:
    """The image grids sampled during training."""

    every_n_epochs: int  # 0 = no grids
    prompts: list[str]  # one block of rows each
    samplers: list[str]  # of SAMPLERS: one group of columns each
    guidance: list[float]  # guidance_scale, one column each
    num_inference_steps: int  # denoising steps of an image
    seed: int  # of the initial noise

    def __post_init__(self) -> None:
        every = self.every_n_epochs
        require(every >= 0, "sample.every_n_epochs", every, "0 (none) or more")
        self.samplers = [sampler_name(sampler, "sample.samplers") for sampler in self.samplers]
        for name in ("prompts", "samplers", "guidance"):
            require(len(getattr(self, name)) > 0, f"sample.{name}", "[]", "at least one entry")
        for scale in self.guidance:
            require(scale >= 1, "sample.guidance", scale, "1 (off) or more")
        for sampler in self.samplers:
            check_steps(sampler, self.num_inference_steps, "sample.num_inference_steps")


@dataclass
class EvaluateConfig:
    """`ghibli evaluate`: the columns of `sample` with many images, and their metrics."""

    samples: int  # images per cell
    scan_samples: int  # images at each scale of the guidance scan
    every_n_epochs: int  # how often to measure the distance during training; 0 = never
    epoch_samples: int  # images for that
    scales: list[float]  # values of guidance_scale in the guidance scan
    sampler_steps: Any  # denoising steps by sampler, None = none; the others have those of `sample`
    batch_size: int  # images sampled in one batch
    features: str  # style or inception
    inception: str | None  # file with the FID network's weights

    def __post_init__(self) -> None:
        least_of = {
            "samples": 3, "scan_samples": 3, "batch_size": 1, "every_n_epochs": 0, "epoch_samples": 3,
        }  # fmt: skip
        for name, least in least_of.items():
            value = getattr(self, name)
            require(value >= least, f"evaluate.{name}", value, f"at least {least}")
        for scale in self.scales:
            require(scale >= 1, "evaluate.scales", scale, "1 (off) or more")
        key = "evaluate.sampler_steps"
        given = self.sampler_steps
        if given is not None:
            whole = isinstance(given, dict) and all(type(steps) is int for steps in given.values())
            require(whole, key, given, "a number of steps by sampler, such as {euler: 20}, or null")
            self.sampler_steps = {sampler_name(str(name), key): steps for name, steps in given.items()}
            for sampler, steps in self.sampler_steps.items():
                check_steps(sampler, steps, f"{key}.{sampler}")
        require_choice("evaluate.features", self.features, ("style", "inception"))


@dataclass
class WandbConfig:
    """The Weights & Biases dashboard; trackio takes project, group and name from here too."""

    mode: str  # auto, online, offline or disabled
    project: str
    group: str | None  # a sweep's trials share one
    name: str | None  # of the run; None = made from the settings

    def __post_init__(self) -> None:
        require_choice("wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))
        ok = 0 < len(self.project) <= 128 and not set(self.project) & set("/\\#?%:")
        require(ok, "wandb.project", self.project, r"1 to 128 characters, none of / \ # ? % :")


@dataclass
class Config:
    """All settings of `train.py`; see conf/train.yaml for meanings and defaults."""

    name: str | None = field(metadata=NO_EFFECT)  # of the run and its folder; None = named after the time
    seed: int  # of order, noise, timesteps and initial adapter
    seeds: int = field(metadata=NO_EFFECT)  # trainings: with seed, seed + 1, ...
    finetune: str  # lora, full or none
    resume: str | None = field(metadata=NO_EFFECT)  # a run folder, or latest
    threads: int | None  # CPU threads of torch; rounding depends on them
    cache_dir: str = field(metadata=NO_EFFECT)  # where drawn images are cached
    local: LocalConfig = field(metadata=NO_EFFECT)
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    trainer: dict[str, Any]  # flags of lightning.Trainer
    compute: ComputeConfig
    validation: ValidationConfig
    early_stopping: EarlyStoppingConfig
    checkpoint: CheckpointConfig = field(metadata=NO_EFFECT)
    sample: SampleConfig
    evaluate: EvaluateConfig = field(metadata=NO_EFFECT)
    logger: Any = field(metadata=NO_EFFECT)  # a dashboard or a list of them; here always a list
    wandb: WandbConfig = field(metadata=NO_EFFECT)

    @property
    def term_names(self) -> list[str]:
        """What is added to the denoising loss, by the names of the columns in metrics.csv."""
        own = {"keep": self.loss.keep > 0, "regularization": self.data.regularization is not None}
        return [*self.loss.terms, *(name for name, is_on in own.items() if is_on)]

    @property
    def draws(self) -> bool:
        """Whether a run samples images: grids, or what the base was made for."""
        return self.sample.every_n_epochs > 0 or self.samples_price

    @property
    def samples_price(self) -> bool:
        """Whether the base is sampled before training, for the price of what is trained."""
        asked = self.validation.price_images > 0 and self.finetune != "none"
        return asked and self.model.made_for == "samples"

    def __post_init__(self) -> None:
        self.logger = dashboard_names(self.logger)
        if self.name is not None:
            check_name(self.name)
        require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 4294967295")
        require_choice("finetune", self.finetune, ("lora", "full", "none"))
        check_seeds(self)
        threads = self.threads
        require(threads is None or threads >= 1, "threads", threads, "at least 1, or null")
        require(threads is None or threads <= MOST_THREADS, "threads", threads, f"at most {MOST_THREADS}")
        if not self.data.root:
            raise UserError("data.root is not set: give an image folder, data.root=DIR, or use data=demo")
        if not self.model.path:
            raise UserError("model.path is not set: give a base model, model.path=DIR, or use model=demo")
        check_trainer(self.trainer)
        drawn = {*self.sample.samplers, "ddim"}  # DDIM makes the guidance scan
        unused = set(self.evaluate.sampler_steps or {}) - drawn
        if unused:
            names = ", ".join(sorted(unused))
            raise UserError(f"evaluate.sampler_steps names {names}, which sample.samplers does not")
        check_frozen_bits(self)
        if self.loss.unconditional == "base" and self.finetune == "full":
            raise UserError(
                "loss.unconditional=base needs the untouched base, and finetune=full trains it: "
                "use finetune=lora, or loss.unconditional=detached"
            )
        check_keep(self)
        weight = self.loss.regularization
        ok = weight == 1 or self.data.regularization is not None
        require(ok, "loss.regularization", weight, "1 without images to weigh: give data.regularization=DIR")
        for section in fields(self):  # what no section refuses by its range
            require_finite(section.name, getattr(self, section.name))


@dataclass
class SweepConfig:
    """What `sweep.py` does, besides the settings of its runs."""

    report_only: bool  # train nothing, rank what is there
    evaluate: bool  # run `ghibli evaluate` on every finished trial
    search: int | None  # number of trials chosen by Optuna; None = the full grid
    halving: bool  # successive halving: train all briefly, the best third longer, and so on
    race: bool  # stop a trial that is behind the best one by more than chance allows
    best: int  # how many of the best trials to repeat
    repeats: int | None  # repetitions of each, with other seeds; None = two where their order may be chance

    def __post_init__(self) -> None:
        require(self.search is None or self.search >= 1, "sweep.search", self.search, "at least 1, or null")
        require(self.best >= 1, "sweep.best", self.best, "at least 1")
        ok = self.repeats is None or self.repeats >= 0
        require(ok, "sweep.repeats", self.repeats, "0 or more, or null")
        both = self.search is not None and self.halving
        require(not both, "sweep.halving", self.halving, "cannot be combined with sweep.search")
        both = self.race and (self.search is not None or self.halving)
        require(not both, "sweep.race", self.race, "cannot be combined with sweep.search or sweep.halving")


@dataclass
class Command(Config):
    """All keys of the command line: the settings of a run, and those of a sweep."""

    sweep: SweepConfig = field(metadata=NO_EFFECT)


def check_name(name: str) -> None:
    """Raise a UserError for a name that would be no folder, an option, or `latest`."""
    ok = re.fullmatch(r"\w[\w.-]{0,99}", name) is not None and name not in ("latest", "null")
    require(ok, "name", name, "up to 100 letters, digits and . _ -, not latest")


def check_seeds(config: Config) -> None:
    """Raise a UserError for more or fewer trainings than there can be."""
    count = config.seeds
    require(1 <= count <= MOST_SEEDS, "seeds", count, f"a whole number from 1 to {MOST_SEEDS}")
    require(config.seed + count <= 2**32, "seeds", count, f"with seed={config.seed} the last is 2^32 or more")
    if count > 1 and config.finetune == "none":
        raise UserError(
            f"seeds={count} with finetune=none: nothing is trained, so no seed changes it: drop it"
        )


def check_frozen_bits(config: Config) -> None:
    """Raise a UserError for model.frozen_bits with trained weights, or with adapters that need full ones."""
    bits, kinds = config.model.frozen_bits, ("lora", "rslora", "dora")
    if bits is None:
        return
    if config.finetune == "full":
        raise UserError(
            f"model.frozen_bits={bits} is for weights that are not trained, and finetune=full trains all of "
            "the UNet's: use finetune=lora, or leave model.frozen_bits out"
        )
    if config.finetune == "lora" and config.lora.variant not in kinds:
        raise UserError(
            f"model.frozen_bits={bits}: PEFT has no lora.variant={config.lora.variant} for such layers: "
            f"choose one of {', '.join(kinds)}"
        )


def check_keep(config: Config) -> None:
    """Raise a UserError for loss.keep in a full fine-tuning, which leaves no frozen base to compare with."""
    if config.loss.keep > 0 and config.finetune == "full":
        raise UserError(
            f"loss.keep={config.loss.keep:g} compares with the frozen base, and finetune=full has none: use "
            "finetune=lora, or set loss.keep=0"
        )


def at_full_precision(config: Config) -> Config:
    """Return the same settings with a base of full precision, on which adapters are used after training."""
    return replace(config, model=replace(config.model, frozen_bits=None))


def describe(config: Config) -> str:
    """Summarise a run's settings: `LoRA rank 32, training guidance 1, lr 0.0005`."""
    what = {"lora": f"LoRA rank {config.lora.rank}", "full": "full fine-tuning", "none": "base"}
    parts = [what[config.finetune]]
    if config.model.frozen_bits is not None:
        parts.append(f"base in {config.model.frozen_bits} bits")
    if config.finetune != "none":
        parts += [f"training {config.loss.guidance_text}", f"lr {config.optimizer.lr:g}"]
    return ", ".join(parts)


def base_name(model: ModelConfig) -> str:
    """Return a short name of the base: `demo`, or `demo + near` with an adapter merged into it."""
    paths = [model.path, *([model.adapter] if model.adapter else [])]
    return " + ".join(PurePath(path).name for path in paths)


def images_name(data: DataConfig) -> str:
    """Return a short name of the image set, that of its folder."""
    return PurePath(data.root_folder).name


def age_of(version: object) -> str:
    """Return `an older`, `a newer` or `another` (not a number), for settings of another version."""
    if not isinstance(version, int):
        return "another"
    return "an older" if version < CONFIG_VERSION else "a newer"
