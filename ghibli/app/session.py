"""The model behind the page, which all visitors share, and the runs that it offers."""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ghibli.app.answers import Stopped
from ghibli.app.history import History
from ghibli.app.labels import run_label, with_numbers
from ghibli.app.settings import Settings
from ghibli.config.schema import Config
from ghibli.inference.control import ControlOf, load_control
from ghibli.inference.generate import Count
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ControlOptions
from ghibli.runs.compose import base_config
from ghibli.runs.find import runs_with_weights
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.commands import path_setting
from ghibli.runtime.errors import UserError

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

PROGRESS = gr.Progress()  # as a parameter's default it makes gradio pass a progress bar of its own


Loaded = list[tuple[Any, ...]]  # of each run its path and files_of


def files_of(run: RunDir) -> list[tuple[str, int, int]]:
    """Return what tells a run's weights and settings from later ones: files with their times and sizes."""
    found = []
    for file in [run.config, *sorted(run.adapter.rglob("*")), *sorted(run.unet.rglob("*"))]:
        with suppress(OSError):  # it is being replaced
            stat = file.stat()
            found.append((str(file), stat.st_mtime_ns, stat.st_size))
    return found


class AppSession:
    """The model behind the page; one request is served at a time, across all visitors."""

    def __init__(self, overrides: list[str], is_private: bool = False) -> None:
        """Start without a model; the first request loads one.

        Args:
            overrides: of train.py, which choose the base when no run is selected.
            is_private: the page is reached from this machine only, by one person.
        """
        self.is_private = is_private
        self.history = History(shared=is_private)
        self.lock = threading.Lock()  # of the model
        self._overrides = overrides
        self._model: tuple[Loaded, LoadedModel] | None = None
        self._control: tuple[ControlOptions, LoadedModel, Callable[[Image.Image | None], ControlOf]] | None
        self._control = None
        self._stops: defaultdict[str, set[threading.Event]] = defaultdict(set)  # by visitor

    def runs(self) -> dict[str, RunDir]:
        """Return the runs to choose from by path, newest first: the finished ones that trained something."""
        return {str(run.path): run for run in reversed(runs_with_weights())}

    def run_choices(self) -> list[tuple[str, str]]:
        """Return (label, path) of the runs, for a dropdown."""
        runs = self.runs()
        labels = with_numbers([run_label(run, run.status.read().get("gain")) for run in runs.values()])
        return list(zip(labels, runs, strict=True))

    def model_of(self, names: list[str]) -> LoadedModel:
        """Load the base of some runs with their adapters on it, once until they change.

        Raises:
            UserError: no longer a run, a link out of a run folder, or runs that cannot be combined.
        """
        known = self.runs()
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise UserError(f"{unknown[:80]} is no longer a finished run: reload the page")
        for name in names:
            known[name].refuse_links()  # its sample grids are shown to everyone who can reach the page
        wanted = [(name, *files_of(known[name])) for name in names]
        if self._model is None or self._model[0] != wanted:
            self._model = self._control = None  # frees the memory for the next one
            self._model = (wanted, load_model(names, [] if names else self._overrides))
        return self._model[1]

    def config_of(self, names: list[str]) -> Config:
        """Return the settings of what model_of loads.

        Raises:
            UserError: no longer a finished run, or a setting that is not accepted.
        """
        return finished_config(RunDir(Path(names[0]))) if names else base_config(self._overrides)

    def control_of(self, options: ControlOptions, own: Image.Image | None, model: LoadedModel) -> ControlOf:
        """Load a ControlNet for a photo; the last one is kept.

        Args:
            own: the photo's own control image; None = computed of the photo.

        Raises:
            UserError: as load_control.
        """
        if self._control is None or self._control[0] != options or self._control[1] is not model:
            self._control = None
            self._control = (options, model, load_control(options, model.base))
        return self._control[2](own)

    @contextmanager
    def turn(self, visitor: str, progress: gr.Progress) -> Iterator[Count]:
        """Wait until nobody else uses the model; yield a progress bar that stops when told to.

        Args:
            visitor: gradio's session hash.

        Raises:
            Stopped: at the next step after a stop.
        """
        stop = threading.Event()
        self._stops[visitor].add(stop)

        @contextmanager
        def count(label: str) -> Iterator[Callable[[int, int], None]]:
            def on_progress(done: int, total: int) -> None:
                if stop.is_set():
                    raise Stopped
                progress((done, total), desc=label)

            yield on_progress

        try:
            with self.lock:
                if stop.is_set():
                    raise Stopped
                yield count
        finally:
            self._stops.get(visitor, set()).discard(stop)

    def stop(self, request: gr.Request) -> None:
        """Stop all requests of this visitor at their next step."""
        for stop in tuple(self._stops.get(str(request.session_hash), ())):
            stop.set()

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor whose tab was closed."""
        self.stop(request)
        self._stops.pop(str(request.session_hash), None)
        self.history.forget(str(request.session_hash))

    def sources(self, settings: Settings, model: LoadedModel) -> list[str]:
        """Return what the commands name to load the same: runs, or what chooses the base."""
        return settings.runs or self._overrides or [path_setting("model.path", model.config.model.path)]
