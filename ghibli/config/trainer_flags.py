"""The flags of lightning.Trainer: all their names, and the ones that are checked or refused here."""

from collections.abc import Iterable
from typing import Any

from ghibli.config.checks import require, require_choice
from ghibli.runtime.errors import UserError, did_you_mean

# Importing lightning takes seconds. tests/config/test_trainer_flags.py compares with the installed one.
TRAINER_FLAGS = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run",
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches",
    "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "accumulate_grad_batches",
    "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode",
    "use_distributed_sampler", "profiler", "detect_anomaly", "barebones", "plugins", "sync_batchnorm",
    "reload_dataloaders_every_n_epochs", "default_root_dir", "enable_autolog_hparams", "model_registry",
)  # fmt: skip
REQUIRED_FLAGS = (  # their defaults are in conf/train.yaml
    "precision", "accelerator", "max_epochs", "accumulate_grad_batches", "log_every_n_steps",
    "gradient_clip_val",
)  # fmt: skip
_SET_BY_US = "train.py sets it itself"
_VALIDATION = (
    "every run is validated on all held-out images after every epoch; for a quick try lower "
    "trainer.max_epochs or validation.max_images"
)
REFUSED_FLAGS = {  # flag -> why
    "callbacks": _SET_BY_US,
    "default_root_dir": _SET_BY_US,
    "enable_checkpointing": _SET_BY_US,
    "enable_model_summary": _SET_BY_US,
    "enable_progress_bar": _SET_BY_US,
    "logger": _SET_BY_US,
    "num_sanity_val_steps": _SET_BY_US,
    "plugins": _SET_BY_US,
    "use_distributed_sampler": _SET_BY_US,
    "barebones": _VALIDATION,
    "check_val_every_n_epoch": _VALIDATION,
    "fast_dev_run": _VALIDATION,
    "limit_val_batches": _VALIDATION,
    "overfit_batches": _VALIDATION,
    "val_check_interval": _VALIDATION,
    "limit_train_batches": (
        "a resumed run could not tell where its epoch ends; for a quick try use trainer.max_steps or "
        "trainer.max_epochs"
    ),
}
REFUSED_ACCELERATORS = ("mps", "tpu", "hpu", "xla")
REFUSED_STRATEGIES = {  # part of a strategy's name -> why
    "spawn": "each process of a run needs a command of its own",
    "fork": "each process of a run needs a command of its own",
    "notebook": "each process of a run needs a command of its own",
    "fsdp": "it shards weights too large for one device, and checkpoints here hold unsharded ones",
    "deepspeed": "it writes checkpoints in its own format, which resume and export cannot read",
}
MOST_PROCESSES = 256  # that settings, perhaps those of a stranger's run, may start on one machine
PRECISIONS = ("auto", "auto-16", "32-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: dict[str, Any]) -> None:
    """Check the Trainer flags that have rules of their own here; Lightning checks the others.

    Raises:
        UserError: a required flag is missing, a flag is refused, or a value is not accepted.
    """
    for flag in REQUIRED_FLAGS:
        if flag not in trainer:
            raise UserError(f"trainer.{flag} is missing: conf/train.yaml has its default")
    for flag in trainer:
        if flag in REFUSED_FLAGS:
            raise UserError(f"trainer.{flag} cannot be set: {REFUSED_FLAGS[flag]}")
    check_precision(str(trainer["precision"]))
    accelerator = str(trainer["accelerator"])
    if accelerator in REFUSED_ACCELERATORS:
        raise UserError(
            f"trainer.accelerator={accelerator} is untested and not supported: use gpu (CUDA) or cpu"
        )
    for flag in ("max_epochs", "accumulate_grad_batches", "log_every_n_steps"):
        value = trainer[flag]
        require(isinstance(value, int) and value >= 1, f"trainer.{flag}", value, "a whole number from 1")
    devices = trainer.get("devices")
    ok = not str(devices).isdecimal() or int(str(devices)) <= MOST_PROCESSES
    require(ok, "trainer.devices", devices, f"at most {MOST_PROCESSES}, on one machine")
    clip = trainer["gradient_clip_val"]
    ok = clip is None or (isinstance(clip, int | float) and clip > 0)
    require(ok, "trainer.gradient_clip_val", clip, "more than 0, or null for no clipping")
    strategy = str(trainer.get("strategy", "auto"))  # missing in runs older than this key
    for part, why in REFUSED_STRATEGIES.items():
        if part in strategy:
            raise UserError(f"trainer.strategy={strategy} is not supported ({why}): use ddp")


def check_precision(precision: str) -> None:
    """Raise a UserError for a precision that is unknown or would store the LoRA weights in 16 bits."""
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision={precision} would hold the LoRA weights in 16 bits, where small "
            f"updates round to nothing (0.05 + 0.0001 is 0.05 in bf16): choose one of {', '.join(PRECISIONS)}"
        )
    require_choice("trainer.precision", precision, PRECISIONS)


def reject_unknown_flags(flags: Iterable[str]) -> None:
    """Raise a UserError for a name that is not a flag of lightning.Trainer."""
    for flag in flags:
        if flag not in TRAINER_FLAGS:
            raise UserError(unknown_flag(flag))


def unknown_flag(flag: str) -> str:
    """Say that there is no such flag, with the most similar one."""
    return f"trainer.{flag} is not a flag of lightning.Trainer{did_you_mean(flag, TRAINER_FLAGS)}"
