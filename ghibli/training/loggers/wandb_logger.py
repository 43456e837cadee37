"""The W&B dashboard: online when logged in, else offline; it never prompts and never waits long.

Its files are in the run folder, and nothing is looked up on the network unless the run is online.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here
from ghibli.runtime.errors import UserError
from ghibli.training.loggers.dashboard import Table, first_words

log = logging.getLogger(__name__)

START_SECONDS = 10  # then an unreachable server, or a service that does not start, is given up
STOP_SECONDS = 30  # then what is not uploaded yet is left for `wandb sync`
FOLDERS = {  # variables of W&B -> folder below wandb/ of the run; a value of the user's own is kept
    "WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_ARTIFACT_DIR": "artifacts",
}  # fmt: skip
SETTINGS = "WANDB_CONFIG_DIR"  # the folder in which W&B looks for a file `settings`
TELEMETRY = "WANDB_ERROR_REPORTING"  # reports to W&B's own developers
HOST = "not recorded"  # in the place of the machine's name, which W&B sends unless it is given one
STEP = "trainer/global_step"  # what W&B draws all curves over
variables: list[str] = []  # of the environment, set for the W&B run that is open


class WandbDashboard:
    """A run on W&B, or its offline part."""

    label = "W&B"

    def __init__(self, run: RunDir, experiment: Any):
        self.run, self.experiment = run, experiment

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        self.experiment.log({**values, STEP: step})

    def log_image(self, name: str, image: Image.Image, caption: str, step: int) -> None:
        import wandb

        self.experiment.log({name: [wandb.Image(image, caption=caption)], STEP: step})

    def log_table(self, table: Table, step: int) -> None:
        self.experiment.log({table.name: drawn(table), STEP: step})

    def log_finding(self, name: str, text: str, step: int) -> None:
        self.experiment.alert(title=name, text=text, level="WARN")

    def log_summary(self, values: Mapping[str, float], step: int) -> None:
        self.experiment.summary.update(dict(values))

    def how_to_look(self) -> list[str]:
        """Return the address of an online run, and the commands for offline parts."""
        lines = [] if self.experiment.offline else [f"W&B      {self.experiment.url}"]
        parts = offline_parts(self.run)
        if parts:
            lines.append(f"W&B      {command_here('wandb', 'beta', 'leet', parts[-1])}")
            lines.append(f"         {command_here('wandb', 'sync', *parts)}   (once logged in)")
        return lines

    def close(self) -> None:
        close()


def open_dashboard(config: Config, run: RunDir, name: str) -> WandbDashboard | None:
    """Start W&B for this run; None when wandb.mode or the environment switches it off.

    A resumed run continues under the W&B id in its status.json.

    Raises:
        UserError: wandb.mode=online without a login.
        Exception: it starts neither online nor offline.
    """
    mode = chosen_mode(config.wandb.mode)
    if mode == "disabled":
        return None
    try:
        is_logged_in = mode != "offline" and logged_in(run)
        if mode == "online" and not is_logged_in:
            login = command_here("wandb", "login")
            raise UserError(f"wandb.mode=online, but nobody is logged in: run `{login}`, or use auto")
        if is_logged_in:
            try:
                return start(config, run, name, "online")
            except Exception as error:  # wandb has no narrower common type for "no connection"
                log.warning(f"W&B does not answer: logging offline ({first_words(error)})")
                close()
        return start(config, run, name, "offline")
    except Exception:
        with suppress(Exception):
            close()
        raise


def chosen_mode(mode: str) -> str:
    """Return wandb.mode, or for auto what WANDB_MODE or WANDB_DISABLED ask for."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").lower()
    return {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}.get(asked, "auto")


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


def start(config: Config, run: RunDir, name: str, mode: str) -> WandbDashboard:
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
            x_save_requirements=False, disable_git=True, disable_code=True, save_code=False, host=HOST,
        ),
    )  # fmt: skip
    experiment.define_metric(STEP)
    experiment.define_metric("*", step_metric=STEP, step_sync=True)
    run.status.update(wandb_id=experiment.id)
    return WandbDashboard(run, experiment)


def drawn(table: Table) -> Any:
    """Return a table as W&B's chart of it, or as its table."""
    import wandb

    columns, rows = list(table.columns), [list(row) for row in table.rows]
    if table.chart == "lines":
        over, *lines = ([row[at] for row in rows] for at in range(len(columns)))
        return wandb.plot.line_series(over, lines, columns[1:], title=table.title, xname=columns[0])
    found = wandb.Table(columns=columns, data=rows)
    if table.chart == "bar":
        return wandb.plot.bar(found, columns[0], columns[1], title=table.title)
    return found


def offline_parts(run: RunDir) -> list[str]:
    """List the offline parts of a run that were not synced yet, oldest first: one for each start."""
    folders = sorted((run.path / "wandb").glob("offline-run-*"), key=lambda folder: folder.name)
    return [os.path.relpath(folder) for folder in folders if not any(folder.glob("*.synced"))]


def close() -> None:
    """End the process's W&B run and its service, so that the next trial of a sweep gets its own.

    Raises:
        TimeoutError: the service hung and was killed: W&B would wait for it for ever, even at exit.
        Exception: of W&B, whose run or service did not end well.
    """
    failed: list[Exception] = []
    ending = threading.Thread(target=end, args=[failed], daemon=True)
    ending.start()
    ending.join(STOP_SECONDS)
    if ending.is_alive():
        failed.insert(0, TimeoutError("it does not end"))
        kill_service()
        ending.join(STOP_SECONDS)
    while variables:
        os.environ.pop(variables.pop(), None)
    if failed:
        raise failed[0]


def end(failed: list[Exception]) -> None:
    """Finish the open W&B run and stop its service; add what they raise to `failed`."""
    import wandb

    actions: tuple[Callable[[], Any], ...] = (wandb.finish, wandb.teardown)
    for action in actions:
        try:
            action()
        except Exception as error:  # wandb has no common type
            failed.append(error)


def kill_service() -> None:
    """Kill W&B's service, a child of this process."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()
