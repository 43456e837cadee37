"""Trains one run: `python train.py KEY=VALUE ...`; with -m a sweep. See conf/train.yaml."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ghibli.config import from_yaml, hydra_entry, this_run, to_config, to_yaml
from ghibli.mistakes import UserMistake, stop_at_once
from ghibli.run_dir import RunDir, check_unchanged, now, provenance, write_text
from ghibli.schema import Config

TOO_SHORT = (
    "training ended before its first epoch did, so nothing was validated and there is no result: "
    "give it more trainer.max_steps or trainer.max_time"
)


def run(config: Config, run_dir: RunDir, resumes: bool = False) -> float:
    """Trains as the configuration says and writes everything into the run folder.

    Args:
        resumes: go on from checkpoints/last.ckpt of the folder.

    Returns:
        The objective of sweeps: the best share by which the held-out loss is below the base's.
    """
    with stop_at_once():
        import torch
        import wandb  # noqa: F401  (dashboard would import it later)

        from ghibli import base_model, dashboard, finish, lora
        from ghibli.callbacks import describe
        from ghibli.checkpoints import CleanStop, StopRequested
        from ghibli.data import GhibliDataModule
        from ghibli.module import GhibliModule
        from ghibli.progress import console
        from ghibli.trainer import make_trainer

    lock = run_dir.lock()
    write_text(run_dir.config, to_yaml(config))
    run_dir.update_status(
        state="running", reason=None, started=run_dir.read_status().get("started", now()),
        settings=describe(config), command=" ".join(sys.argv), seed=config.seed,
        process=os.getpid(), threads=torch.get_num_threads(), **provenance(),
    )  # fmt: skip
    try:
        with CleanStop(run_dir) as stop:
            base = base_model.load(config.model.path)
            if config.model.adapter is not None:
                lora.merge(base, base_model.place_of(config.model.adapter), config.model.adapter_scale)
            module = GhibliModule(config, base)
            what = f"the base model.path={config.model.path}"
            check_unchanged(run_dir, "base_hash", module.base_hash, what)
            data = GhibliDataModule(config, base, run_dir, module.num_train_timesteps)
            logger = dashboard.make_logger(config, run_dir, describe(config))
            checkpoint = run_dir.usable_checkpoint() if resumes else None
            if checkpoint == run_dir.previous_checkpoint:
                console.print("last.ckpt is damaged: going on from the checkpoint before it", style="yellow")
                checkpoint = checkpoint.replace(run_dir.last_checkpoint)  # so no save can lose it
            trainer = make_trainer(config, run_dir, stop, logger)
            if config.finetune == "none":
                trainer.validate(module, data, verbose=False)
            else:
                trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
                if len(module.history) < 2:
                    raise UserMistake(TOO_SHORT)
            return finish.finish(config, run_dir, trainer, module, logger)
    except StopRequested as request:
        raise SystemExit(finish.interrupted(run_dir, request)) from None
    except BaseException as error:
        mistake = as_mistake(error)
        with suppress(OSError):  # a full disk, which `error` already tells
            run_dir.update_status(state="failed", reason=str(mistake) or type(error).__name__, ended=now())
        if run_dir.last_checkpoint.exists() and not isinstance(mistake, UserMistake):
            folder = finish.shown(run_dir.path)
            console.print(f"what was trained is kept; go on with: python train.py resume={folder}")
        if mistake is error:
            raise
        raise mistake from error
    finally:
        dashboard.close()
        lock.close()


def as_mistake(error: BaseException) -> BaseException:
    """The error as a UserMistake where other settings help, else itself."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return UserMistake(f"trainer: Lightning refuses these settings: {error}")
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return UserMistake(TOO_SHORT)
    if isinstance(error, torch.OutOfMemoryError):
        return UserMistake(
            "the GPU has too little memory: lower data.batch_size and raise data.accumulate instead, "
            "or lower model.resolution"
        )
    return error


def main(cfg: Any) -> float:
    """One Hydra job: trains with the composed settings, or resumes with the run's; returns the objective."""
    run_dir = this_run()
    if cfg.resume is None:
        return run(to_config(cfg), run_dir)
    return run(from_yaml(run_dir.config), run_dir, resumes=True)


if __name__ == "__main__":
    hydra_entry(Path(__file__).parent / "conf", "train", main)
