"""Flags of `lightning.Trainer`: which exist, which are refused and why."""

import ast
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ghibli.config.checks import require, require_choice
from ghibli.runtime.errors import UserError, did_you_mean

TRAINER_KEYS = (
    "precision", "accelerator", "max_epochs", "accumulate_grad_batches", "log_every_n_steps",
    "gradient_clip_val",
)  # fmt: skip
RESERVED_TRAINER_FLAGS = {
    "callbacks", "default_root_dir", "enable_checkpointing", "enable_model_summary",
    "enable_progress_bar", "logger", "num_sanity_val_steps", "plugins", "use_distributed_sampler",
}  # fmt: skip
VALIDATION_FLAGS = {
    "barebones", "check_val_every_n_epoch", "fast_dev_run", "limit_val_batches", "overfit_batches",
    "val_check_interval",
}  # fmt: skip
REFUSED_STRATEGIES = {  # a part of trainer.strategy -> why
    "spawn": "a run needs processes with a command of their own",
    "fork": "a run needs processes with a command of their own",
    "notebook": "a run needs processes with a command of their own",
    "fsdp": "it shards weights that are too large for one device, and a checkpoint here holds whole ones",
    "deepspeed": "it writes checkpoints of its own format, which resume and export do not read",
}
PRECISIONS = ("auto", "auto-16", "32-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: dict[str, Any]) -> None:
    """Checks the Trainer flags that have a meaning of ours; Lightning checks the others."""
    for key in TRAINER_KEYS:
        if key not in trainer:
            raise UserError(f"trainer.{key} is missing: conf/train.yaml has its default")
    precision = str(trainer["precision"])
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision={precision} would hold the LoRA weights in 16 bits, where small "
            f"updates round to nothing (0.05 + 0.0001 is 0.05 in bf16): choose one of {', '.join(PRECISIONS)}"
        )
    require_choice("trainer.precision", precision, PRECISIONS)
    accelerator = str(trainer["accelerator"])
    if accelerator in ("mps", "tpu", "hpu", "xla"):
        raise UserError(
            f"trainer.accelerator={accelerator} was never tried and is not supported: use gpu (CUDA) or cpu"
        )
    for key in ("max_epochs", "accumulate_grad_batches", "log_every_n_steps"):
        value = trainer[key]
        require(isinstance(value, int) and value >= 1, f"trainer.{key}", value, "a whole number from 1")
    clip = trainer["gradient_clip_val"]
    ok = clip is None or (isinstance(clip, int | float) and clip > 0)
    require(ok, "trainer.gradient_clip_val", clip, "more than 0, or null for no clipping")
    strategy = str(trainer.get("strategy", "auto"))  # runs made before this key was one
    for part, why in REFUSED_STRATEGIES.items():
        if part in strategy:
            raise UserError(f"trainer.strategy={strategy} is not for this trainer ({why}): use ddp")
    for key in VALIDATION_FLAGS & set(trainer):
        raise UserError(
            f"trainer.{key} cannot be given: a run is judged by all held-out images after every "
            "epoch; for a quick try lower trainer.max_epochs or validation.max_images"
        )
    if "limit_train_batches" in trainer:
        raise UserError(
            "trainer.limit_train_batches cannot be given: a resumed run could not tell where its epoch ends; "
            "for a quick try use trainer.max_steps or trainer.max_epochs"
        )
    for key in RESERVED_TRAINER_FLAGS & set(trainer):
        raise UserError(f"trainer.{key} is set by train.py itself and cannot be given")


def reject_unknown_flags(trainer: Any) -> None:
    """Raises for a key below `trainer` that is no argument of lightning.Trainer."""
    known = trainer_flags()
    for flag in trainer:
        if flag not in known:
            raise UserError(f"trainer.{flag} is no flag of lightning.Trainer{did_you_mean(flag, known)}")


@functools.cache
def trainer_flags() -> list[str]:
    """The arguments of lightning.Trainer, read from its source: importing it takes seconds."""
    package = Path(find_spec("lightning").submodule_search_locations[0])
    source = (package / "pytorch" / "trainer" / "trainer.py").read_text(encoding="utf-8")
    trainer = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Trainer")
    start = next(node for node in trainer.body if getattr(node, "name", "") == "__init__")
    return [argument.arg for argument in start.args.kwonlyargs]
