"""The W&B logger: online when logged in, else offline; it never prompts and never waits long."""

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger
from PIL import Image

from ghibli.config.schema import Config, describe
from ghibli.evaluation.gain import Gain
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

log = logging.getLogger(__name__)

START_SECONDS = 10  # then an unreachable server is given up


def make_logger(config: Config, run: RunDir, name: str) -> WandbLogger | None:
    """Start a logger for this run; return None with wandb.mode=disabled.

    A resumed run continues under the W&B id in its status.json.

    Raises:
        UserError: wandb.mode=online without a login or without an answer.
    """
    mode = config.wandb.mode
    if mode == "disabled":
        return None
    if mode == "online" and not logged_in():
        raise UserError("wandb.mode=online, but nobody is logged in: run `wandb login`, or use auto")
    if mode == "online" or (mode == "auto" and logged_in()):
        try:
            return start(config, run, name, "online")
        except Exception as error:  # wandb has no narrower common type for "no connection"
            if mode == "online":
                raise UserError(f"wandb.mode=online: no answer from W&B ({first_words(error)})") from error
            log.warning("W&B does not answer: logging offline")
    return start(config, run, name, "offline")


def attach(trainer: L.Trainer, config: Config, run: RunDir) -> WandbLogger | None:
    """Start the run's logger, as make_logger does, and give it to the trainer."""
    logger = make_logger(config, run, describe(config))
    if logger is not None:
        trainer.loggers = [logger]
    return logger


def logged_in() -> bool:
    """Return whether an API key is in the environment or was stored by `wandb login`."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return False
    logging.getLogger("wandb").setLevel(logging.ERROR)
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception:  # a malformed key counts as none
        return False


def start(config: Config, run: RunDir, name: str, mode: str) -> WandbLogger:
    """Start a W&B run in the run folder, recording nothing of the console or the environment."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    status = run.status.read()
    experiment = wandb.init(
        project=config.wandb.project,
        group=config.wandb.group,
        name=config.wandb.name or name,
        id=status.get("wandb_id"),
        resume="allow",
        dir=run.path,
        config=asdict(config) | {"git_commit": status.get("git_commit")},
        settings=wandb.Settings(
            mode=mode, init_timeout=START_SECONDS, console="off", silent=True,
            x_disable_meta=True, save_code=False,
        ),
    )  # fmt: skip
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    run.status.update(wandb_id=experiment.id)
    return WandbLogger(experiment=experiment, log_model=False)


def how_to_look(run: RunDir, logger: WandbLogger) -> str:
    """Return where to see a run's curves and images: a URL, or the commands for an offline run."""
    if not logger.experiment.offline:
        return f"W&B      {logger.experiment.url}"
    folder = os.path.relpath(run.path / "wandb" / "latest-run")
    return f"W&B      wandb beta leet {folder}\n         wandb sync {folder}   (once logged in)"


def wandb_of(loggers: Iterable[Logger]) -> list[WandbLogger]:
    """Return the W&B loggers among a trainer's."""
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def log_grid(loggers: Iterable[Logger], grid: Image.Image, caption: str, step: int) -> None:
    """Send an image grid."""
    for logger in wandb_of(loggers):
        logger.log_image("samples", [grid], step=step, caption=[caption])


def log_gain_by_timestep(loggers: Iterable[Logger], gains: dict[str, Gain], step: int) -> None:
    """Send the gain at each part of the timesteps as a bar chart."""
    import wandb

    for logger in wandb_of(loggers):
        rows = [[part, gain.value, gain.standard_error] for part, gain in gains.items()]
        table = wandb.Table(columns=["timesteps", "gain", "standard error"], data=rows)
        chart = wandb.plot.bar(table, "timesteps", "gain", title="held-out gain by timestep")
        logger.experiment.log({"probe/gain_by_timestep": chart, "trainer/global_step": step})


def log_gain_curve(loggers: Iterable[Logger], rows: list[dict[str, float]], step: int) -> None:
    """Send the gain of all epochs so far with its 95 % band, from rows of probe.csv."""
    import wandb

    title, keys = "held-out gain over the base", ["gain", "95 % low", "95 % high"]
    for logger in wandb_of(loggers):
        lines = [[float(row[f"probe/val_gain{end}"]) for row in rows] for end in ("", "_low", "_high")]
        epochs = [int(row["epoch"]) for row in rows]
        chart = wandb.plot.line_series(epochs, lines, keys, title=title, xname="epoch")
        logger.experiment.log({"probe/gain_curve": chart, "trainer/global_step": step})


def log_evaluation(config: Config, run: RunDir, result: dict[str, Any]) -> None:
    """Add the table, the scan and the images of `ghibli evaluate` to the run's own W&B run."""
    import wandb

    logger = logger_afterwards(config, run)
    if logger is None:
        return
    columns = ("model", "sampler", "guidance", "kernel distance", "standard error", "frechet", "recall")
    rows = [
        [model, row["sampler"], row["guidance"], *row["kernel"], row["frechet"], row["recall"]]
        for model, cells in result["models"].items()
        for row in cells
    ]
    scan = [
        [model, float(scale), *kernel]
        for model, kernels in result["scan"].items()
        for scale, kernel in kernels.items()
    ]
    scan_columns = ["model", "guidance", "kernel distance", "standard error"]
    logger.experiment.log(
        {
            "evaluate/cells": wandb.Table(columns=list(columns), data=rows),
            "evaluate/scan": wandb.Table(columns=scan_columns, data=scan),
            "evaluate/images": wandb.Image(str(run.evaluation_images)),
        }
    )
    own = result["models"].get("run", result["models"]["base"])
    logger.experiment.summary.update({"best/kernel_distance": min(row["kernel"][0] for row in own)})
    for finding in result["findings"]:
        send_alert(logger, finding["name"], finding["text"])
    close()


def logger_afterwards(config: Config, run: RunDir) -> WandbLogger | None:
    """Start the logger of a finished run; where it cannot go online, offline, so that nothing is lost."""
    name = str(run.status.read().get("settings", run.path.name))
    try:
        return make_logger(config, run, name)
    except UserError as error:
        log.warning(f"{error}; logging offline")
        return start(config, run, name, "offline")


def alert(loggers: Iterable[Logger], name: str, text: str) -> None:
    """Send a finding of the doctor as an alert, to the W&B loggers among these."""
    for logger in wandb_of(loggers):
        send_alert(logger, name, text)


def send_alert(logger: WandbLogger, name: str, text: str) -> None:
    """Send a finding as an alert."""
    logger.experiment.alert(title=name, text=text, level="WARN")


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def close() -> None:
    """End the process's W&B run, so that the next trial of a sweep gets its own."""
    import wandb

    wandb.finish()
