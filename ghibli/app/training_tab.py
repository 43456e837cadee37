"""The tab that trains: a form, a queue, and the run at work. What they hold is made in training.py."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ghibli.app import training
from ghibli.app.answers import errors_as_text
from ghibli.app.images import sample_grids
from ghibli.app.labels import run_name
from ghibli.app.parts import HANDLER, command_box, sheets
from ghibli.app.training import Runs, TrainingForm
from ghibli.images.read import Unusable
from ghibli.runs.folder import RunDir
from ghibli.runs.queue import Queue
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)

EVERY = 2.0  # s between two looks at the files
PAUSE = 1.0  # s after which the queue is looked at again
MOST_GRIDS = 6
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False, **HANDLER}
CLOSED = (
    "Training is offered only where the page is opened for this machine alone, which is without `--host`: "
    "whoever can reach this page could start anything here."
)


@dataclass(frozen=True)
class Training:
    """The handlers, which share a queue; keep_advancing has its runs trained."""

    queue: Queue
    runs: Runs

    def command(self, *values: Any) -> str:
        """Return the command of the form; empty while its quotes do not fit together."""
        try:
            return TrainingForm(*values).command()
        except ValueError:
            return ""

    @errors_as_text
    def start(self, *values: Any) -> str:
        """Put the run of the form into the queue; say so."""
        job = self.queue.add(TrainingForm(*values).words())
        return f"run {job.number} is in the queue"

    def check(self, *values: Any) -> str:
        """Return as HTML what `ghibli check` finds for the run of the form."""
        try:
            return training.check(TrainingForm(*values).words())
        except UserError as error:
            return str(training.finding(f"error: {error}"))

    @errors_as_text
    def stop(self, choice: str) -> str:
        """Ask the watched run to stop; say so."""
        run = self.watched(choice)
        self.queue.stop(run.path)
        return f"{run_name(run)} was asked to stop: it saves after its step; once more stops it at once"

    @errors_as_text
    def resume(self, choice: str) -> str:
        """Put the watched run into the queue, to be resumed; say so."""
        run = self.watched(choice)
        job = self.queue.add_resume(run.path)
        return f"run {job.number} of the queue resumes {run_name(run)}"

    @errors_as_text
    def take_out(self, number: int | None) -> str:
        """Take a waiting run out of the queue; say so."""
        if number is None:
            raise UserError("choose a run that waits")
        self.queue.remove(int(number))
        return f"run {int(number)} is out of the queue"

    def watched(self, choice: str) -> RunDir:
        """Return the watched run.

        Raises:
            UserError: there is none.
        """
        run = self.runs.watched(self.queue, choice)
        if run is None:
            raise UserError("there is no run yet")
        return run

    def look(self, choice: str, seen: dict[str, Any]) -> list[Any]:
        """Return what has changed: view, grids, queue, waiting runs, buttons, and what this call saw.

        Args:
            choice: the run to watch.
            seen: what the last call returned.
        """
        try:
            run = self.runs.watched(self.queue, choice)
        except ValueError:
            run = None
        now = {
            "view": training.run_view(self.queue, run),
            "grids": training.grids_of(run),
            "jobs": training.queue_list(self.queue),
            "waiting": training.waiting_choices(self.queue),
            "stop": run is not None and training.can_stop(self.queue, run),
            "resume": run is not None and training.can_resume(run),
        }
        changed = {name for name, value in now.items() if seen.get(name) != value}
        return [
            now["view"] if "view" in changed else gr.skip(),
            shown_grids(run) if "grids" in changed else gr.skip(),
            now["jobs"] if "jobs" in changed else gr.skip(),
            gr.update(choices=now["waiting"], value=None) if "waiting" in changed else gr.skip(),
            *(
                gr.update(interactive=now[name]) if name in changed else gr.skip()
                for name in ("stop", "resume")
            ),
            gr.update(interactive=bool(now["waiting"])) if "waiting" in changed else gr.skip(),
            now if changed else gr.skip(),
        ]


def shown_grids(run: RunDir | None) -> list[Any]:
    """Return the newest sample grids of a run; none of one with links out of its folder."""
    if run is None:
        return []
    try:
        run.refuse_links()
        return sample_grids([str(run.path)], MOST_GRIDS)
    except (UserError, Unusable, OSError):
        return []


def training_tab(blocks: gr.Blocks, queue: Queue | None) -> None:
    """Build the tab.

    Args:
        queue: that runs are put into; None where the page may start none.
    """
    with gr.Tab("Train", elem_id="train-tab") as tab:
        if queue is None:
            gr.Markdown(CLOSED)
            return
        handlers = Training(queue, Runs())
        form = form_fields()
        with gr.Row():
            check = gr.Button("Check", elem_id="check", min_width=120)
            start = gr.Button("Train", variant="primary", elem_id="train", min_width=120)
        asked = gr.Markdown(elem_id="asked")
        command = command_box("train-command")
        findings = gr.HTML(elem_id="findings")
        jobs = gr.HTML(elem_id="jobs")
        with gr.Row():
            with gr.Column(min_width=240):
                runs = handlers.runs.choices()
                choice = gr.Dropdown(runs, value=training.AT_WORK, label="Watch", elem_id="watch")
                with gr.Row():
                    stop, resume = small_button("Stop", "stop"), small_button("Resume", "resume")
            with gr.Column(min_width=240):
                waiting = gr.Dropdown([], label="Waiting runs", elem_id="waiting")
                take_out = small_button("Take out of the queue", "take-out")
        answer = gr.Markdown(elem_id="answer")
        view = gr.HTML(elem_id="run")
        grids = sheets("its sample grids", "run-grids")
        seen, timer = gr.State({}), gr.Timer(EVERY)
    for field in form:
        field.change(handlers.command, form, command, **AT_ONCE)
    check.click(handlers.check, form, findings, **(AT_ONCE | {"show_progress": "full"}))
    looks: dict[str, Any] = {
        "fn": handlers.look, "inputs": [choice, seen],
        "outputs": [view, grids, jobs, waiting, stop, resume, take_out, seen],
        **AT_ONCE,
    }  # fmt: skip
    start.click(handlers.start, form, asked, **AT_ONCE).then(**looks)
    stop.click(handlers.stop, choice, answer, **AT_ONCE).then(**looks)
    resume.click(handlers.resume, choice, answer, **AT_ONCE).then(**looks)
    take_out.click(handlers.take_out, waiting, answer, **AT_ONCE).then(**looks)
    choice.input(**looks)
    timer.tick(**looks)
    blocks.load(handlers.command, form, command, **AT_ONCE).then(**looks)
    tab.select(lambda: gr.update(choices=handlers.runs.choices()), None, choice, **AT_ONCE)


def small_button(label: str, element: str) -> gr.Button:
    """Build a button that can be pressed once there is something to press it for."""
    return gr.Button(label, size="sm", elem_id=element, min_width=90, interactive=False)


def form_fields() -> list[Any]:
    """Build the fields of the form, in the order of TrainingForm; an empty one leaves what conf/ says."""

    def choice(group: str, label: str, element: str) -> gr.Dropdown:
        names = [("as usual", ""), *training.names_in_conf(group)]
        return gr.Dropdown(names, value="", label=label, elem_id=element, min_width=110)

    def text(label: str, element: str, usual: str = "as usual") -> gr.Textbox:
        return gr.Textbox("", label=label, placeholder=usual, elem_id=element, min_width=110, max_length=1000)

    with gr.Row():
        base, path = choice("model", "Base", "base-name"), text("its folder or hub id", "base-path")
        images, root = choice("data", "Images", "images-name"), text("their folder", "images-root")
    with gr.Row():
        name = text("Name", "run-name", "date and time")
        numbers = [
            text("Epochs", "epochs"), text("LoRA rank", "rank"), text("Learning rate", "rate"),
            text("Guidance in training", "loss-guidance"),
        ]  # fmt: skip
    more = gr.Textbox(
        "", label="Further settings", elem_id="more", placeholder="seed=1 compute=gpu_8gb", max_length=4000,
        info="KEY=VALUE with spaces between, as after train.py",
    )  # fmt: skip
    return [base, path, images, root, name, *numbers, more]


def keep_advancing(queue: Queue, is_served: Callable[[], bool]) -> None:
    """Start the next run whenever one is over, while the page is served.

    Whatever goes wrong is logged once and tried again: no run would be trained after the end of this loop.
    """
    told = ""
    while is_served():
        try:
            queue.advance()
            told = ""
        except Exception as error:
            if str(error) != told:
                is_known = isinstance(error, UserError | OSError)
                logger.warning(f"the queue of runs: {error}", exc_info=None if is_known else error)
            told = str(error)
        time.sleep(PAUSE)
