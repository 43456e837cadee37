"""The typed schema of conf/: what each key means, its type, and what is accepted.

Values stand in conf/*.yaml only; no field here has a default. No torch, no Hydra.
"""

from dataclasses import dataclass
from typing import Any

from ghibli.config.checks import require, require_choice
from ghibli.config.registry import LOSSES, OPTIMIZERS, SAMPLERS
from ghibli.config.trainer_flags import check_trainer
from ghibli.runtime.errors import UserError

CONFIG_VERSION = 2  # to be raised when a key is renamed, removed or means something else
RENAMED_KEYS = {  # (section, name before) -> name now, for runs of before and for old habits
    ("validation", "items_per_picture"): "items_per_image",
    ("validation", "max_pictures"): "max_images",
}
LATER_KEYS = {  # younger than the version; the values are what runs from before had
    "threads": None,
    "data": {"grid_epochs": ""},
    "model": {"config": None},
    "local": {"sd15_config": None, "caption": None},
    "evaluate": {"every_n_epochs": 0, "epoch_samples": 64},
    "lora": {"variant": "lora", "init": None},
    "loss": {"function": "mse"},
    "optimizer": {"text_encoder_lr": None, "lora_plus": None},
    "compute": {"compile": False, "channels_last": False, "checkpoint_every": 0},
}
TARGETS = {  # lora.targets by name: endings of the names of UNet layers
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "ff": ["ff.net.0.proj", "ff.net.2"],
    "conv": ["proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"],
}
TARGETS["all"] = [name for names in TARGETS.values() for name in names]


@dataclass
class LocalConfig:
    """Paths on this machine, from conf/local/default.yaml (git-ignored)."""

    sd15: str  # diffusers folder, hub id or single .safetensors file of Stable Diffusion 1.5
    sd15_config: str | None  # for a single file: the folder with its configs and tokenizer
    ghibli: str | None  # folder of the Ghibli images
    caption: str | None  # of those of them that have none


@dataclass
class ModelConfig:
    """The base model that is adapted."""

    path: str  # "demo", a diffusers folder, a hub id or a single .safetensors file
    config: str | None  # for a single file: the folder with configs and tokenizer; None = those of the hub
    resolution: int  # side of a training image in px
    lr: float  # peak learning rate that suits this base
    clip: str | None  # folder or hub id of the CLIP model that scores captions
    adapter: str | None  # folder of an adapter that is merged into the base first; None = none
    adapter_scale: float  # how much of it

    def __post_init__(self) -> None:
        require(
            self.resolution >= 64 and self.resolution % 64 == 0,
            "model.resolution", self.resolution, "a multiple of 64 (the UNet halves the latents thrice)",
        )  # fmt: skip


@dataclass
class DrawConfig:
    """Images drawn by ghibli/scenes.py when the folder is not there yet."""

    look: str  # drawn or photo
    count: int  # number of images

    def __post_init__(self) -> None:
        require_choice("data.draw.look", self.look, ("drawn", "photo"))
        require(self.count >= 2, "data.draw.count", self.count, "at least 2")


@dataclass
class DataConfig:
    """The image set and how it reaches the model."""

    root: str | None  # folder of images and captions
    draw: DrawConfig | None  # images to draw first; None = the folder must be there
    reference: str | None  # folder of further images that evaluation compares with
    reference_draw: DrawConfig | None  # images to draw there first; None = the folder must be there
    style: str  # appended to every caption
    caption: str | None  # stands in for a missing caption
    val_fraction: float  # share of images held out
    resize: str  # squash, center_crop or bucket
    flip: bool  # mirror half of the drawn examples
    min_side: int  # px; smaller images are skipped
    batch_size: int  # examples in one forward pass on one device
    accumulate: int  # forward passes in one optimiser step
    epochs: int  # passes over the training images
    workers: int  # loader processes
    grid_epochs: str  # trainer.max_epochs of the slides' grid

    @property
    def square_resize(self) -> str:
        """How an image becomes a square to be compared with samples, which are square."""
        return "center_crop" if self.resize == "bucket" else self.resize

    def __post_init__(self) -> None:
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1")
        require_choice("data.resize", self.resize, ("squash", "center_crop", "bucket"))
        for name, least in (
            ("min_side", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("epochs", 1),
            ("workers", 0),
        ):
            value = getattr(self, name)
            require(value >= least, f"data.{name}", value, f"at least {least}")


def target_list(targets: Any) -> list[str]:
    """Name endings of layers from such a list, or from names of TARGETS such as attention+ff."""
    if isinstance(targets, str):
        names = targets.split("+")
        for name in names:
            require_choice("lora.targets", name, tuple(TARGETS))
        return [ending for name in names for ending in TARGETS[name]]
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    require(is_list, "lora.targets", targets, "a list of layer names, or attention, attention+ff, all")
    return targets


@dataclass
class LoraConfig:
    """The adapter, after Hu et al. 2021: W' = W + (alpha / rank) B A."""

    rank: int  # rows of A, columns of B
    alpha: float  # strength: B A is scaled by alpha / rank
    dropout: float  # probability of dropping an input of A, in training only
    text_encoder: bool  # adapt the text encoder's attention too
    targets: Any  # name endings of the UNet layers that get an adapter; or names of TARGETS, with a plus
    variant: str  # lora, dora (Liu et al. 2024) or rslora (alpha / sqrt(rank); Kalajdzievski 2023)
    init: str | None  # adapter file, folder or run to start from; None = fresh: it changes nothing at first

    def __post_init__(self) -> None:
        self.targets = target_list(self.targets)
        require_choice("lora.variant", self.variant, ("lora", "dora", "rslora"))
        require(1 <= self.rank <= 1024, "lora.rank", self.rank, "a whole number from 1 to 1024")
        require(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to less than 1")
        require(len(self.targets) > 0, "lora.targets", self.targets, "at least one layer name")


@dataclass
class LossConfig:
    """The training loss."""

    function: str  # one of LOSSES; the probe measures with mse, whatever trains
    guidance: float  # w of uncond + w (cond - uncond); 1 = off
    caption_dropout: float  # share of examples trained without caption
    snr_gamma: float | None  # Min-SNR weight
    noise_offset: float  # noise shared by all pixels of a channel
    noise_schedule: str  # base or linear
    timesteps: str  # spread or independent

    def __post_init__(self) -> None:
        LOSSES.require(self.function)
        require(
            self.guidance >= 1, "loss.guidance", self.guidance,
            "1 (off) or more; 7.5 is the slides' second value",
        )  # fmt: skip
        require(
            0 <= self.caption_dropout <= 1,
            "loss.caption_dropout",
            self.caption_dropout,
            "from 0 to 1",
        )
        require(
            self.snr_gamma is None or self.snr_gamma > 0,
            "loss.snr_gamma",
            self.snr_gamma,
            "more than 0, or null",
        )
        require(0 <= self.noise_offset <= 1, "loss.noise_offset", self.noise_offset, "from 0 to 1")
        require_choice("loss.noise_schedule", self.noise_schedule, ("base", "linear"))
        require_choice("loss.timesteps", self.timesteps, ("spread", "independent"))


@dataclass
class OptimizerConfig:
    """The optimiser and the course of its learning rate."""

    name: str  # one of OPTIMIZERS
    lr: float  # peak learning rate
    text_encoder_lr: float | None  # that of the text encoder; None = the same
    lora_plus: float | None  # B learns so many times as fast as A (Hayou et al. 2024); None = as fast
    weight_decay: float  # decoupled
    betas: list[float]  # decay of the running mean and of the running square
    schedule: str  # cosine_epochs, cosine or constant
    warmup_steps: int  # optimiser steps of linear warm-up

    def __post_init__(self) -> None:
        entry = OPTIMIZERS[self.name]
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
    """How the model computes; changes nothing of what is learned but rounding."""

    compile: bool  # torch.compile of the UNet in training
    channels_last: bool  # memory layout of the UNet's convolutions
    checkpoint_every: int  # gradient checkpointing: every n-th block; 0 = none

    def __post_init__(self) -> None:
        value = self.checkpoint_every
        require(value >= 0, "compute.checkpoint_every", value, "0 (none), 1 (every block), 2, ...")


@dataclass
class ValidationConfig:
    """The fixed items that are scored every epoch."""

    items_per_image: int  # fixed (timestep, noise) pairs
    max_images: int  # held-out images that are scored, and as many training images

    def __post_init__(self) -> None:
        for name in ("items_per_image", "max_images"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "at least 1")


@dataclass
class EarlyStoppingConfig:
    """When to stop without progress."""

    patience: int | None  # epochs without an improvement
    watch: str  # probe or train_loss

    def __post_init__(self) -> None:
        require_choice("early_stopping.watch", self.watch, ("probe", "train_loss"))
        ok = self.patience is None or self.patience >= 1
        require(ok, "early_stopping.patience", self.patience, "at least 1, or null for never")


@dataclass
class CheckpointConfig:
    """When last.ckpt is written besides every epoch."""

    every_n_steps: int  # optimiser steps

    def __post_init__(self) -> None:
        require(self.every_n_steps >= 1, "checkpoint.every_n_steps", self.every_n_steps, "at least 1")


@dataclass
class SampleConfig:
    """The image grids drawn in training."""

    every_n_epochs: int  # 0 = no grids
    prompts: list[str]  # one block of rows each
    samplers: list[str]  # of SAMPLERS: a group of columns each
    guidance: list[float]  # sampling guidance, a column each
    num_inference_steps: int  # denoising steps of one image
    seed: int  # of the start noise

    def __post_init__(self) -> None:
        require(
            self.every_n_epochs >= 0,
            "sample.every_n_epochs",
            self.every_n_epochs,
            "0 (none) or more",
        )
        for sampler in self.samplers:
            SAMPLERS.require(sampler)
        for name in ("prompts", "samplers", "guidance"):
            require(len(getattr(self, name)) > 0, f"sample.{name}", "[]", "at least one entry")
        for scale in self.guidance:
            require(scale >= 1, "sample.guidance", scale, "1 (off) or more")
        require(
            1 <= self.num_inference_steps <= 1000,
            "sample.num_inference_steps", self.num_inference_steps, "from 1 to 1000",
        )  # fmt: skip


@dataclass
class EvaluateConfig:
    """`ghibli evaluate`: the cells of `sample` again, with many images and measured."""

    samples: int  # images of each cell
    scan_samples: int  # images at each scale of the guidance scan
    every_n_epochs: int  # in training: distance of sampled images; 0 = never
    epoch_samples: int  # images of that
    scales: list[float]  # sampling scales of the guidance scan
    batch_size: int  # images sampled together
    features: str  # style or inception
    inception: str | None  # file with the FID network's weights

    def __post_init__(self) -> None:
        least_of = {
            "samples": 3, "scan_samples": 3, "batch_size": 1, "every_n_epochs": 0, "epoch_samples": 3,
        }  # fmt: skip
        for name, least in least_of.items():
            require(
                getattr(self, name) >= least, f"evaluate.{name}", getattr(self, name), f"at least {least}"
            )
        for scale in self.scales:
            require(scale >= 1, "evaluate.scales", scale, "1 (off) or more")
        require_choice("evaluate.features", self.features, ("style", "inception"))


@dataclass
class WandbConfig:
    """The dashboard."""

    mode: str  # auto, online, offline or disabled
    project: str  # where W&B files the run
    group: str | None  # runs that belong together
    name: str | None  # of the run

    def __post_init__(self) -> None:
        require_choice("wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class Config:
    """Everything `train.py` takes; see conf/train.yaml for meanings and defaults."""

    seed: int  # of order, noise, timesteps and initial adapter
    finetune: str  # lora, full or none
    resume: str | None  # a run folder, or latest
    threads: int | None  # of torch on the CPU; rounding depends on it
    cache_dir: str  # drawn images
    local: LocalConfig
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    trainer: dict[str, Any]  # flags of lightning.Trainer
    compute: ComputeConfig
    validation: ValidationConfig
    early_stopping: EarlyStoppingConfig
    checkpoint: CheckpointConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    wandb: WandbConfig

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 4294967295")
        require_choice("finetune", self.finetune, ("lora", "full", "none"))
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null")
        if not self.data.root:
            raise UserError("data.root is not set: give an image folder, data.root=DIR, or use data=demo")
        if not self.model.path:
            raise UserError("model.path is not set: give a base model, model.path=DIR, or use model=demo")
        check_trainer(self.trainer)


@dataclass
class SweepConfig:
    """What `sweep.py` does, beside the settings of its runs."""

    report_only: bool  # train nothing
    evaluate: bool  # sample every finished trial and measure its images
    search: int | None  # so many trials, chosen by Optuna; None = all of the grid
    halving: bool  # train all a little, the better third further, and so on
    best: int  # how many of the best are repeated
    repeats: int  # how often, each time with another seed

    def __post_init__(self) -> None:
        require(self.search is None or self.search >= 1, "sweep.search", self.search, "at least 1, or null")
        require(self.best >= 1, "sweep.best", self.best, "at least 1")
        require(self.repeats >= 0, "sweep.repeats", self.repeats, "0 or more")
        both = self.search is not None and self.halving
        require(not both, "sweep.halving", self.halving, "not together with sweep.search")


@dataclass
class Command(Config):
    """All that can be typed: the settings of a run, and the sweep around it."""

    sweep: SweepConfig


def describe(config: Config) -> str:
    """A run's settings in a few words: `lora rank 32, guidance 1, lr 0.0005`."""
    what = {"lora": f"LoRA rank {config.lora.rank}", "full": "full fine-tuning", "none": "base"}
    words = [what[config.finetune]]
    if config.finetune != "none":
        words += [f"training guidance {config.loss.guidance:g}", f"lr {config.optimizer.lr:g}"]
    return ", ".join(words)
