"""The W&B logger: online when logged in, else offline; it never prompts, never waits long, never stops a run.

Whatever fails in it is one warning: metrics.csv and probe.csv have the same numbers. Its files are in the run
folder, and nothing is looked up on the network unless the run is online.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import psutil
from lightning.pytorch.loggers import Logger, WandbLogger
from PIL import Image

from ghibli.config.schema import Config, describe
from ghibli.evaluation.gain import Gain
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_line
from ghibli.runtime.errors import UserError

log = logging.getLogger(__name__)

START_SECONDS = 10  # then an unreachable server, or a service that does not start, is given up
STOP_SECONDS = 30  # then what is not uploaded yet is left for `wandb sync`
FOLDERS = {  # variables of W&B -> folder below wandb/ of the run; a value of the user's own is kept
    "WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_ARTIFACT_DIR": "artifacts",
}  # fmt: skip
SETTINGS = "WANDB_CONFIG_DIR"  # the folder in which W&B looks for a file `settings`
TELEMETRY = "WANDB_ERROR_REPORTING"  # reports to W&B's own developers
variables: list[str] = []  # of the environment, set for the W&B run that is open


class Dashboard(WandbLogger):
    """A WandbLogger whose first failure is a warning; from then on it takes everything and does nothing."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        send(self, lambda: super(Dashboard, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        send(self, lambda: super(Dashboard, self).log_hyperparams(params))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        send(self, lambda: super(Dashboard, self).log_image(key, images, step, **kwargs))

    def finalize(self, status: str) -> None:
        send(self, lambda: super(Dashboard, self).finalize(status))


opened: list[Dashboard] = []  # the logger of the W&B run that is open


def send(logger: Any, action: Callable[[], Any]) -> None:
    """Let a logger do something; the first time it fails, warn, and from then on do nothing."""
    if getattr(logger, "lost", False):
        return
    try:
        action()
    except Exception as error:  # wandb has no common type, and none of its errors may end a training
        logger.lost = True
        warn_of(error)


def warn_of(error: Exception) -> None:
    """Say in one line that the dashboard is lost, and where the numbers are."""
    log.warning(f"W&B failed ({first_words(error)}): going on without it; metrics.csv has all numbers")


def make_logger(config: Config, run: RunDir, name: str) -> WandbLogger | None:
    """Start a logger for this run; None when W&B is disabled or does not start.

    A resumed run continues under the W&B id in its status.json.

    Raises:
        UserError: wandb.mode=online without a login.
    """
    mode = chosen_mode(config)
    if mode == "disabled":
        return None
    if mode == "online" and not logged_in(run):
        raise UserError("wandb.mode=online, but nobody is logged in: run `wandb login`, or use auto")
    if mode == "online" or (mode == "auto" and logged_in(run)):
        try:
            return start(config, run, name, "online")
        except Exception as error:  # wandb has no narrower common type for "no connection"
            log.warning(f"W&B does not answer: logging offline ({first_words(error)})")
            close()
    return try_offline(config, run, name)


def chosen_mode(config: Config) -> str:
    """Return wandb.mode, or for auto what WANDB_MODE or WANDB_DISABLED ask for."""
    if config.wandb.mode != "auto":
        return config.wandb.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").lower()
    return {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}.get(asked, "auto")


def try_offline(config: Config, run: RunDir, name: str) -> WandbLogger | None:
    """Start an offline logger; None with a warning when even that does not work."""
    try:
        return start(config, run, name, "offline")
    except Exception as error:  # as in send
        warn_of(error)
        close()
        return None


def attach(trainer: L.Trainer, config: Config, run: RunDir) -> WandbLogger | None:
    """Start the run's logger, as make_logger does, and give it to the trainer."""
    logger = make_logger(config, run, describe(config))
    if logger is not None:
        trainer.loggers = [logger]
    return logger


def logged_in(run: RunDir) -> bool:
    """Return whether an API key is in the environment or was stored by `wandb login`."""
    set_variables(run)
    logging.getLogger("wandb").setLevel(logging.ERROR)  # its greetings; errors come as exceptions
    try:
        import wandb

        return bool(wandb.login(prompt=False, verify=False))
    except Exception:  # a malformed key counts as none
        return False


def set_variables(run: RunDir) -> None:
    """Point what W&B writes in the home folder to the run's, and switch its telemetry off, until `close`.

    Settings that the user keeps in the home folder are still read. Any in the run folder are not, since they
    name the server that gets the user's key: W&B looks in a folder that nobody can have made before.
    """
    folder = run.path.resolve() / "wandb"
    wanted = {name: str(folder / below) for name, below in FOLDERS.items()} | {TELEMETRY: "false"}
    if not (Path("~/.config/wandb/settings")).expanduser().is_file():
        wanted[SETTINGS] = str(folder / f"config-{os.urandom(8).hex()}")
    for name, value in wanted.items():
        if name not in os.environ:
            os.environ[name] = value
            variables.append(name)


def start(config: Config, run: RunDir, name: str, mode: str) -> WandbLogger:
    """Start a W&B run in the run folder, recording nothing of the console, the machine or the environment."""
    set_variables(run)
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)  # its greetings; errors come as exceptions
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
            mode=mode, init_timeout=START_SECONDS, x_service_wait=START_SECONDS, console="off", silent=True,
            x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=mode == "offline",
            x_save_requirements=False, disable_git=True, disable_code=True, save_code=False,
        ),
    )  # fmt: skip
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    run.status.update(wandb_id=experiment.id)
    opened.append(Dashboard(experiment=experiment, log_model=False))
    return opened[-1]


def how_to_look(run: RunDir, logger: WandbLogger) -> str:
    """Return where to see a run's curves and images: a URL, or the commands for its offline parts."""
    lines = [] if logger.experiment.offline else [f"W&B      {logger.experiment.url}"]
    parts = offline_parts(run)
    if parts:
        lines.append(f"W&B      {command_line('wandb', 'beta', 'leet', parts[-1])}")
        lines.append(f"         {command_line('wandb', 'sync', *parts)}   (once logged in)")
    return "\n".join(lines)


def offline_parts(run: RunDir) -> list[str]:
    """List the offline parts of a run that were not synced yet, oldest first: one for each start."""
    folders = sorted((run.path / "wandb").glob("offline-run-*"), key=lambda folder: folder.name)
    return [os.path.relpath(folder) for folder in folders if not any(folder.glob("*.synced"))]


def wandb_of(loggers: Iterable[Logger]) -> list[WandbLogger]:
    """Return the W&B loggers among a trainer's."""
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def log_grid(loggers: Iterable[Logger], grid: Image.Image, caption: str, step: int) -> None:
    """Send an image grid."""
    for logger in wandb_of(loggers):
        logger.log_image("samples", [grid], step=step, caption=[caption])


def log_gain_by_timestep(loggers: Iterable[Logger], gains: dict[str, Gain], step: int) -> None:
    """Send the gain at each part of the timesteps as a bar chart."""

    def chart() -> Any:
        import wandb

        rows = [[part, gain.value, gain.standard_error] for part, gain in gains.items()]
        table = wandb.Table(columns=["timesteps", "gain", "standard error"], data=rows)
        return wandb.plot.bar(table, "timesteps", "gain", title="held-out gain by timestep")

    log_chart(loggers, "probe/gain_by_timestep", chart, step)


def log_gain_curve(loggers: Iterable[Logger], rows: list[dict[str, float]], step: int) -> None:
    """Send the gain of all epochs so far with its 95 % band, from rows of probe.csv."""

    def chart() -> Any:
        import wandb

        title, keys = "held-out gain over the base", ["gain", "95 % low", "95 % high"]
        lines = [[float(row[f"probe/val_gain{end}"]) for row in rows] for end in ("", "_low", "_high")]
        epochs = [int(row["epoch"]) for row in rows]
        return wandb.plot.line_series(epochs, lines, keys, title=title, xname="epoch")

    log_chart(loggers, "probe/gain_curve", chart, step)


def log_chart(loggers: Iterable[Logger], name: str, chart: Callable[[], Any], step: int) -> None:
    """Send a chart to the W&B loggers among these."""

    def log_it(logger: WandbLogger) -> None:
        logger.experiment.log({name: chart(), "trainer/global_step": step})

    for logger in wandb_of(loggers):
        send(logger, partial(log_it, logger))


def log_best(logger: WandbLogger, gain: float, epoch: int) -> None:
    """Send the gain of the best epoch as the run's summary."""
    send(logger, lambda: logger.experiment.summary.update({"best/val_gain": gain, "best/epoch": epoch}))


def log_evaluation(config: Config, run: RunDir, result: dict[str, Any]) -> None:
    """Add the table, the scan and the images of `ghibli evaluate` to the run's own W&B run."""
    logger = logger_afterwards(config, run)
    if logger is None:
        return
    own = result["models"].get("run", result["models"]["base"])
    best = {"best/kernel_distance": min(row["kernel"][0] for row in own)}
    send(logger, lambda: logger.experiment.log(evaluation_values(run, result)))
    send(logger, lambda: logger.experiment.summary.update(best))
    for finding in result["findings"]:
        send_alert(logger, finding["name"], finding["text"])
    close()


def evaluation_values(run: RunDir, result: dict[str, Any]) -> dict[str, Any]:
    """Return the content of evaluation.json as tables of W&B, and evaluation.png."""
    import wandb

    columns = ["model", "sampler", "guidance", "kernel distance", "standard error", "frechet", "recall"]
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
    return {
        "evaluate/cells": wandb.Table(columns=columns, data=rows),
        "evaluate/scan": wandb.Table(columns=scan_columns, data=scan),
        "evaluate/images": wandb.Image(str(run.evaluation_images)),
    }


def logger_afterwards(config: Config, run: RunDir) -> WandbLogger | None:
    """Start the logger of a finished run; where it cannot go online, offline, so that nothing is lost."""
    name = str(run.status.read().get("settings", run.path.name))
    try:
        return make_logger(config, run, name)
    except UserError as error:
        log.warning(f"{error}; logging offline")
        return try_offline(config, run, name)


def alert(loggers: Iterable[Logger], name: str, text: str) -> None:
    """Send a finding of the doctor as an alert, to the W&B loggers among these."""
    for logger in wandb_of(loggers):
        send_alert(logger, name, text)


def send_alert(logger: WandbLogger, name: str, text: str) -> None:
    """Send a finding as an alert."""
    send(logger, lambda: logger.experiment.alert(title=name, text=text, level="WARN"))


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def close() -> None:
    """End the process's W&B run and its service, so that the next trial of a sweep gets its own.

    A service that hangs is killed after STOP_SECONDS: W&B would wait for it for ever, even at exit.
    """
    if "wandb" in sys.modules:
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(STOP_SECONDS)
        if ending.is_alive():
            log.warning("W&B does not end: going on without it; metrics.csv has all numbers")
            for logger in opened:
                logger.lost = True
            kill_service()
            ending.join(STOP_SECONDS)
    opened.clear()
    while variables:
        os.environ.pop(variables.pop(), None)


def end() -> None:
    """Finish the open W&B run and stop its service; of one that was lost before, nothing more is said."""
    import wandb

    failed: list[Exception] = []
    for action in (wandb.finish, wandb.teardown):
        try:
            action()
        except Exception as error:  # as in send
            failed.append(error)
    if failed and not any(logger.lost for logger in opened):
        warn_of(failed[0])


def kill_service() -> None:
    """Kill W&B's service, a child of this process."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()
