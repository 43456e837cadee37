"""What stands behind the page of `ghibli app`: the models, and what its buttons ask of them; needs gradio."""

import functools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ghibli.images.grid import to_image
from ghibli.images.read import Unusable, read_image
from ghibli.inference import restyle
from ghibli.inference.generate import Count, Request, draw, lost_words
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.safety import SafetyChecker, has_checker
from ghibli.runs.find import runs_with_weights
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody

WIDTH = 1200  # px, of the grids that are shown
PROGRESS = gr.Progress()  # as a default it tells gradio to give the handler one of its own


class Stopped(Exception):
    """Somebody pressed Cancel or closed the tab."""


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler; the user's mistakes become a message on the page, and a stop changes nothing there."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except (UserError, Unusable) as mistake:
            raise gr.Error(str(mistake), print_exception=False) from mistake
        except Stopped:
            return gr.skip()

    return wrapped


class AppSession:
    """The models behind the page; one request is drawn at a time, whoever asks."""

    def __init__(self, words: list[str]) -> None:
        """
        Args:
            words: settings of train.py that choose the base where no run is chosen.
        """
        self._words = words
        self._alone = threading.Lock()
        self._worn: tuple[list[str], LoadedModel] | None = None
        self._stops: defaultdict[str, set[threading.Event]] = defaultdict(set)  # of each visitor

    def runs(self) -> dict[str, RunDir]:
        """What may be chosen: finished runs that trained something, by path, the newest first."""
        return {str(run.path): run for run in reversed(runs_with_weights())}

    def choices(self) -> list[tuple[str, str]]:
        """(what the page shows, path) of the runs."""
        gains = {name: run.read_status().get("gain", 0.0) for name, run in self.runs().items()}
        return [(f"{name}, {100 * gain:.1f} % better than the base", name) for name, gain in gains.items()]

    def loaded(self, names: list[str]) -> LoadedModel:
        """The base of some runs with their adapters on it; the last one is kept.

        Raises:
            UserError: a name that is none of a run, or runs that do not go together.
        """
        known = self.runs()
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            raise UserError(f"{strange[:80]} is no finished run any more: reload the page")
        if self._worn is None or self._worn[0] != names:
            self._worn = None  # room for the next
            self._worn = (names, load_model(names, [] if names else self._words))
        return self._worn[1]

    @contextmanager
    def turn(self, session: str, progress: gr.Progress) -> Iterator[Count]:
        """The models, once nobody else draws; yields what shows the steps, and stops when told to.

        Raises:
            Stopped: in the middle of what is counted.
        """
        stop = threading.Event()
        self._stops[session].add(stop)

        @contextmanager
        def count(label: str) -> Iterator[Callable[[int, int], None]]:
            def on_progress(done: int, total: int) -> None:
                if stop.is_set():
                    raise Stopped
                progress((done, total), desc=label)

            yield on_progress

        try:
            with self._alone:
                if stop.is_set():
                    raise Stopped
                yield count
        finally:
            self._stops.get(session, set()).discard(stop)

    def stop(self, request: gr.Request) -> None:
        """What this visitor asked for is given up at its next step."""
        for stop in tuple(self._stops.get(request.session_hash, ())):
            stop.set()

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.stop(request)
        self._stops.pop(request.session_hash, None)

    # What the page asks for

    @told
    def chosen(self, names: list[str]) -> list[Any]:
        """Guidance, checker's switch and grids that belong to some runs."""
        with self._alone:
            loaded = self.loaded(names)
        base, has_one = loaded.config.model.path, has_checker(loaded.config.model.path)
        why = f"of {base}" if has_one else f"{base} has none"
        return [
            gr.update(value=loaded.guidance),
            gr.update(value=has_one, interactive=has_one, label=f"Safety checker ({why})"),
            grids(names),
        ]

    @told
    def draw(
        self, names: list[str], prompt: str, negative: str, sampler: str, guidance: float, steps: float,
        seed: float, scale: float, safe: bool, request: gr.Request, progress: gr.Progress = PROGRESS,
    ) -> list[Any]:  # fmt: skip
        """Image of the base, image of the adapter, what was done in words."""
        start = time.monotonic()
        with self.turn(request.session_hash, progress) as count:
            loaded = self.loaded(names)
            side = loaded.config.model.resolution
            asked = Request(
                [prompt], sampler, guidance, int(steps), int(seed or 0), (side, side), negative, scale=scale
            )
            base = draw(loaded, replace(asked, scale=0.0), "base", count)
            trained = draw(loaded, asked, "trained", count) if names else base
            images, said = self._safe([to_image(base[0]), to_image(trained[0])], loaded, safe)
            said += lost_words([prompt], loaded.base)
        return [*images, done(said, start)]

    @told
    def preview(self, photo: str | None) -> Image.Image | None:
        """The photo that was uploaded, small."""
        return None if photo is None else small(Path(photo))

    @told
    def restyle(
        self, names: list[str], photo: str | None, prompt: str, negative: str, sampler: str, guidance: float,
        steps: float, seed: float, scale: float, safe: bool, strength: float, request: gr.Request,
        progress: gr.Progress = PROGRESS,
    ) -> list[Any]:  # fmt: skip
        """The photo, redrawn by the base and by the adapter, and what was done in words."""
        start = time.monotonic()
        if photo is None:
            raise UserError("choose a photo first")
        if not prompt.strip():
            raise UserError("say what is on the photo")
        before = small(Path(photo))
        with self.turn(request.session_hash, progress) as count:
            loaded = self.loaded(names)
            how = restyle.RestyleOptions(
                strength, sampler, guidance, int(steps), int(seed or 0), negative, scale,
                loaded.config.model.resolution,
            )  # fmt: skip
            words = prompt + loaded.config.data.style
            afters = [redrawn(loaded, before, words, replace(how, scale=0.0), "base", count)]
            afters.append(redrawn(loaded, before, words, how, "trained", count) if names else afters[0])
            afters, said = self._safe(afters, loaded, safe)
        return [before, *afters, done(said, start)]

    def _safe(
        self, images: list[Image.Image], loaded: LoadedModel, safe: bool
    ) -> tuple[list[Image.Image], list[str]]:
        """The images after the checker, if it is wanted, and a sentence if it took some away."""
        if not safe:
            return images, []
        shown, gone = checker(loaded.config.model.path).black_out(images)
        return shown, [f"The safety checker blacked out {gone} of {len(shown)}."] if gone else []


@functools.lru_cache(maxsize=1)
def checker(base: str) -> SafetyChecker:
    return SafetyChecker(base)


def done(said: list[str], start: float) -> str:
    """Sentences, and how long it took."""
    return " ".join([*said, f"{time.monotonic() - start:.1f} s"])


def small(photo: Path) -> Image.Image:
    """A photo, at most WIDTH px on its longer side.

    Raises:
        Unusable: no image, a damaged one, or one of more megapixels than Pillow opens.
    """
    image = read_image(photo, at_least=WIDTH)[0]
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return image


def redrawn(
    loaded: LoadedModel,
    photo: Image.Image,
    prompt: str,
    how: restyle.RestyleOptions,
    label: str,
    count: Count,
) -> Image.Image:
    """The photo redrawn, its steps counted."""
    total, steps = int(how.steps * how.strength), 0
    with count(label) as on_progress:

        def on_step() -> None:
            nonlocal steps
            steps += 1
            on_progress(steps, total)

        return restyle.restyle(loaded, photo, prompt, how, on_step)


def grids(names: list[str]) -> list[tuple[Image.Image, str]]:
    """The sample grids of some runs, the newest of each first, with their names."""
    found = []
    for name in names:
        files = sorted(RunDir(Path(name)).samples.glob("*.png"), key=lambda file: file.stat().st_mtime)
        for file in reversed(files):
            image = read_image(file)[0]
            image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
            found.append((image, f"{name}: {file.stem}"))
    return found
