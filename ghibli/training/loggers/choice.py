"""The dashboards that `logger` names: started at the beginning of a run, closed at its end."""

import logging
from dataclasses import replace
from typing import Any

from ghibli.config.registry import DASHBOARDS
from ghibli.config.schema import Config, describe
from ghibli.images.read import open_file
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.registry import load_object
from ghibli.training.loggers.dashboard import DashboardLogger, warn_of
from ghibli.training.loggers.tables import evaluation_tables

log = logging.getLogger(__name__)

opened: list[DashboardLogger] = []  # what this process has to close


def start(config: Config, run: RunDir, name: str | None = None) -> list[DashboardLogger]:
    """Start the dashboards that `logger` names; one that does not start is a warning.

    Args:
        name: of the run on a dashboard, unless wandb.name says another; None = made from the settings.

    Raises:
        UserError: wandb.mode=online without a login.
    """
    started, name = [], name or describe(config)
    for chosen in config.logger:
        factory = DASHBOARDS[chosen].factory
        if factory is None:
            continue
        try:
            dashboard = load_object(factory)(config, run, name)
        except UserError:
            raise
        except Exception as error:  # as in DashboardLogger.send
            warn_of(DASHBOARDS[chosen].label, error)
            continue
        if dashboard is not None:
            started.append(DashboardLogger(dashboard))
            opened.append(started[-1])
    return started


def start_afterwards(config: Config, run: RunDir) -> list[DashboardLogger]:
    """Start the dashboards of a finished run; W&B offline where it cannot go online: nothing is lost."""
    name = str(run.status.read().get("settings", run.path.name))
    try:
        return start(config, run, name)
    except UserError as error:
        log.warning(f"{error}; logging offline")
        close_all()
        return start(replace(config, wandb=replace(config.wandb, mode="offline")), run, name)


def log_evaluation(config: Config, run: RunDir, result: dict[str, Any]) -> None:
    """Add the tables, the images and the findings of `ghibli evaluate` to the run's own dashboards."""
    own = result["models"].get("run", result["models"]["base"])
    best = {"best/kernel_distance": min(row["kernel"][0] for row in own)}
    step = run.status.read().get("step") or 0
    for logger in start_afterwards(config, run):
        for table in evaluation_tables(result):
            logger.log_table(table, step)
        with open_file(run.evaluation_images) as image:
            logger.log_image("evaluate/images", image, "evaluation", step)
        logger.log_summary(best, step)
        for finding in result["findings"]:
            logger.log_finding(finding["name"], finding["text"], step)
    close_all()


def close_all() -> None:
    """End all dashboards of this process, so that the next trial of a sweep gets its own."""
    while opened:
        opened.pop(0).close()
