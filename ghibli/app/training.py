"""What the training tab shows, without gradio: the form, the queue's list, a run as its files tell it."""

import atexit
import math
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ghibli.app.labels import run_label, run_name, with_numbers
from ghibli.report.charts import Figure
from ghibli.report.figures import gain_curve, loss_curves
from ghibli.report.run_data import RunData
from ghibli.report.svg import tag
from ghibli.runs import monitor
from ghibli.runs.compose import conf_folder
from ghibli.runs.find import all_runs, has_checkpoint
from ghibli.runs.folder import RunDir
from ghibli.runs.jobs import Job
from ghibli.runs.queue import Queue, require_setting
from ghibli.runtime.commands import command_here, path_setting
from ghibli.runtime.console import relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.terminal import one_line
from ghibli.sweeps.trials import Trial

COLUMNS = 96  # letters in a line of text on the page
SHOWN = 12  # jobs that are over
LISTED = 60  # runs to choose from
AGE = 10.0  # s for which the list of runs is used
PRINTED = 6  # last lines of what a process printed
CHECK_LIMIT = 1200.0  # s that `ghibli check` may take: it loads the base
CHECKING = threading.Lock()
LEVEL = re.compile(r"(error|warning|note): ")  # begin of a finding of `ghibli check`
AT_WORK = ""  # the choice that follows whatever is being trained
KEYS = {  # fields of the form -> settings of train.py
    "base": "model", "path": "model.path", "images": "data", "root": "data.root", "name": "name",
    "epochs": "trainer.max_epochs", "rank": "lora.rank", "rate": "optimizer.lr", "guidance": "loss.guidance",
}  # fmt: skip
PATHS = ("model.path", "data.root")


@dataclass(frozen=True)
class TrainingForm:
    """The fields of the form, in their order; an empty one leaves the setting as it is in conf/."""

    base: str  # a name in conf/model
    path: str  # of the base: a folder or hub id
    images: str  # a name in conf/data
    root: str  # folder of the images
    name: str
    epochs: str
    rank: str
    rate: str
    guidance: str
    more: str  # further settings, as after train.py

    def words(self) -> list[str]:
        """Return what follows train.py.

        Raises:
            UserError: further settings whose quotes do not fit together.
        """
        words = []
        for field, key in KEYS.items():
            text = getattr(self, field).strip()
            if text:
                words.append(path_setting(key, text) if key in PATHS else f"{key}={text}")
        try:
            return words + shlex.split(self.more)
        except ValueError as error:
            raise UserError(f"further settings: {error}") from error

    def command(self) -> str:
        """Return the command that trains the same from a terminal."""
        return command_here("python", "train.py", *self.words())


def names_in_conf(group: str) -> list[str]:
    """Return the names of a group of settings, such as model."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def check(words: list[str]) -> str:
    """Run `ghibli check` in a process of its own; return what it found as HTML.

    It loads the base, which this process then need not hold twice; two checks at once would.

    Raises:
        UserError: a word that is no setting, another check is running, or this one took too long.
    """
    for word in words:
        require_setting(word)
    if not CHECKING.acquire(blocking=False):
        raise UserError("a check is running: wait for its end")
    try:
        printed = printed_by([sys.executable, "-m", "ghibli", "check", *words])
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the check took more than {CHECK_LIMIT / 60:g} minutes and was ended: try it in a terminal, "
            f"{command_here('ghibli', 'check')}"
        ) from error
    finally:
        CHECKING.release()
    every = [line for line in printed.splitlines() if line.strip()]
    lines = [line for line in every if LEVEL.match(line)] or every
    return str(tag("ul", *map(finding, lines), class_="findings"))


def printed_by(command: list[str]) -> str:
    """Return what a command prints; it ends no later than this process.

    Raises:
        TimeoutExpired: it took more than CHECK_LIMIT, and was ended.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stderr=subprocess.STDOUT, errors="replace", **pipes) as child:
        atexit.register(child.kill)
        try:
            return child.communicate(timeout=CHECK_LIMIT)[0]
        finally:
            child.kill()
            atexit.unregister(child.kill)


def finding(line: str) -> Markup:
    """Build the list entry of a line of `ghibli check`, with its level as a class."""
    level = LEVEL.match(line)
    return tag("li", line, class_=level[1] if level else None)


def can_stop(queue: Queue, run: RunDir) -> bool:
    """Return whether a run is being trained, or is about to be."""
    job = queue.at_work()
    return run.status.state == "running" or (job is not None and job.folder == str(run.path))


def can_resume(run: RunDir) -> bool:
    """Return whether a run was stopped or killed, or failed, with a checkpoint to go on from."""
    return run.status.state in ("interrupted", "killed", "failed") and has_checkpoint(run)


def queue_list(queue: Queue) -> str:
    """List the jobs as HTML: what is at work, what waits, and the last ones that are over, newest first."""
    jobs = queue.jobs()
    waiting = [job for job in jobs if job.waits]
    begun = [job for job in reversed(jobs) if not job.waits][:SHOWN]
    entries = [tag("li", f"{label_of(job)}: ", tag("b", queue.outcome(job))) for job in [*begun, *waiting]]
    trouble = queue.trouble()
    told = [] if trouble is None else [tag("p", tag("b", one_line(trouble)))]
    if not entries:
        return str(told[0]) if told else "Nothing was asked for yet."
    return str(tag("div", *told, tag("ul", *entries, class_="jobs")))


def label_of(job: Job) -> str:
    """Name a job: its number, and its folder or what it is to train."""
    words = " ".join(word for word in job.words if not word.startswith("hydra."))
    return monitor.cut(one_line(f"{job.number}. {words or 'the usual settings'}"), COLUMNS)


def waiting_choices(queue: Queue) -> list[tuple[str, int]]:
    """Return (label, number) of the jobs that wait."""
    return [(label_of(job), job.number) for job in queue.jobs() if job.waits]


class Runs:
    """The runs below outputs/, oldest first, which are looked for again after AGE seconds."""

    def __init__(self) -> None:
        self._found: list[RunDir] = []
        self._until = -math.inf
        self._looking = threading.Lock()

    def recent(self, afresh: bool = False) -> list[RunDir]:
        """Return the runs.

        Args:
            afresh: look for them now.
        """
        with self._looking:
            if afresh or time.monotonic() > self._until:
                self._found, self._until = all_runs(), time.monotonic() + AGE
            return list(self._found)

    def choices(self) -> list[tuple[str, str]]:
        """Return (label, path) of what can be watched: whatever is trained, then runs, newest first."""
        runs, labels = self.recent(afresh=True)[::-1][:LISTED], []
        for run in runs:
            status = run.status.read()
            name, state = run_name(run), run.status.state_of(status)
            labels.append(run_label(run, status.get("gain")).replace(name, f"{name}, {state}", 1))
        found = zip(with_numbers(labels), map(str, (run.path for run in runs)), strict=True)
        return [("whatever is being trained", AT_WORK), *found]

    def watched(self, queue: Queue, choice: str) -> RunDir | None:
        """Return the run to show: the chosen one; else the one at work, or the one that was last.

        Raises:
            UserError: the chosen one is no run below outputs/.
        """
        if choice != AT_WORK:
            found = next((run for run in self.recent() if str(run.path) == choice), None)
            if found is None:
                raise UserError(f"{str(choice)[:80]} is no run below outputs/: reload the page")
            return found
        job = queue.at_work()
        if job is not None and job.folder is not None:
            return RunDir(Path(job.folder))
        runs = self.recent()[::-1]
        running = [run for run in runs if run.status.state == "running"]  # started from a terminal
        begun = [Path(job.folder) for job in queue.jobs() if job.folder is not None and not job.waits]
        return next(
            iter([*running, *(RunDir(folder) for folder in begun[-1:] if folder.is_dir()), *runs]), None
        )


def run_view(queue: Queue, run: RunDir | None) -> str:
    """Describe a run as HTML: its state, time left, curves, findings, and what its process printed last."""
    if run is None:
        return "Nothing has been trained below outputs/ yet."
    status = run.status.read()
    job = next((job for job in reversed(queue.jobs()) if job.folder == str(run.path)), None)
    parts: list[Any] = [tag("h3", one_line(run.path))]
    if run.status.path.exists():
        above = [f"{run.status.state_of(status)}   {one_line(status.get('settings', ''))}"]
        above += monitor.progress(run, status, monitor.utc_now())
        below = monitor.after_chart(run, status, COLUMNS)
        figures = [figure_html(figure) for figure in figures_of(run, status)]
        parts += [tag("pre", "\n".join(above)), tag("div", *figures, class_="figures")]
        parts.append(tag("pre", "\n".join(below)))
    elif job is not None and job.is_at_work:
        parts.append(tag("p", "loading: a run writes its first file after some seconds"))
    printed = [] if job is None else queue.tail(job, PRINTED)
    if job is not None and printed:
        heading = f"what it printed last, of {one_line(relative_path(queue.printed(job)))}"
        text = "\n".join(one_line(line) for line in printed)
        parts.append(
            tag("details", tag("summary", heading), tag("pre", text), open="" if not status else None)
        )
    return str(tag("div", *parts, class_="run"))


def figures_of(run: RunDir, status: dict[str, Any]) -> list[Figure]:
    """Draw gain with its band, and the losses, as far as the run's files allow."""
    data = RunData(Trial(run, {}, status, None))
    figures = [gain_curve(data), *loss_curves([("loss", data)])]
    return [figure for figure in figures if figure is not None]


def figure_html(figure: Figure) -> Markup:
    """Build a figure with its title and caption."""
    legend = [tag("span", label, class_=colour) for label, colour, _ in figure.legend]
    return tag("figure", tag("figcaption", figure.title), figure.svg, tag("p", *legend, class_="legend"))


def grids_of(run: RunDir | None) -> list[str]:
    """Return what tells one state of a run's sample grids from another: folder, names, times."""
    if run is None:
        return []
    try:
        files = sorted(run.samples.glob("*.png"))
        return [str(run.path), *(f"{file.name} {file.stat().st_mtime_ns}" for file in files)]
    except OSError:
        return [str(run.path)]
