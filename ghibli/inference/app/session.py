"""The handlers behind the page of `ghibli app`, and the model that they share; needs gradio.

Gradio calls a handler with the values of its input components by position. Here they are collected in
`Settings`; a handler takes gradio's own arguments first and the values as `*values`.
"""

import functools
import json
import math
import os
import re
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ghibli.adapters.files import format_number
from ghibli.images.grid import to_image
from ghibli.images.read import Unusable, open_file, read_image
from ghibli.inference.generate import (
    Count,
    a1111_parameters,
    generate_images,
    model_metadata,
    settings_grid,
)
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ImageRequest, RestyleOptions, parse_axis, unused_negative
from ghibli.inference.restyle import restyle_photo
from ghibli.inference.safety import SafetyChecker, has_checker
from ghibli.models.prompt_syntax import escaped
from ghibli.runs.find import runs_with_weights
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_line, path_setting, quoted
from ghibli.runtime.errors import UserError

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry

PROMPT_LIMIT = 4000  # characters
LABEL = 44  # letters of a run's name in the list
DECODED = 300 * 10**6  # bytes of a decoded photo: 100 megapixels in RGB
DECODER = ThreadPoolExecutor(1, "photo")  # one photo at a time; each thread would keep memory of its own
WIDTH = 1200  # px, of photos and sample grids on the page
FRAMES = {"draw": 2, "restyle": 3, "grid": 1}  # images that a handler returns
PROGRESS = gr.Progress()  # as a parameter's default it makes gradio pass a progress bar of its own


class Stopped(Exception):
    """The visitor pressed Cancel or closed the tab."""


@dataclass(frozen=True)
class Settings:
    """The values of the settings column, in the order in which the page lists its components."""

    runs: list[str]
    prompt: str
    negative: str
    sampler: str
    guidance: float
    steps: float
    seed: float | None  # None = the field is empty
    scale: float
    safe: bool  # apply the safety checker

    def __post_init__(self) -> None:
        """Check what the browser would not send but another program can.

        Raises:
            UserError: a prompt that is too long, or a number that is none.
        """
        for text in (self.prompt, self.negative, self.sampler):
            check_prompt(text)
        numbers = {
            "guidance": self.guidance,
            "steps": self.steps,
            "seed": self.seed or 0,
            "scale": self.scale,
        }
        for name, value in numbers.items():
            check_number(name, value)

    def request(self, side: int) -> ImageRequest:
        """Ask for one image of side x side px."""
        return ImageRequest(
            [self.prompt], self.sampler, self.guidance, int(self.steps), int(self.seed or 0),
            (side, side), self.negative, scale=self.scale,
        )  # fmt: skip

    def restyle_options(self, strength: float, resolution: int, way: str) -> RestyleOptions:
        """Ask for a photo to be redrawn at about resolution squared px."""
        return RestyleOptions(
            strength, self.sampler, self.guidance, int(self.steps), int(self.seed or 0), self.negative,
            self.scale, resolution, way,
        )  # fmt: skip


def run_label(run: RunDir, gain: Any) -> str:
    """Name a run in one short line, with its gain in words: `2026-11-28 21:40, 28.1 % better than ...`."""
    name = re.sub(r"^(\d{4}-\d\d-\d\d)_(\d\d)-(\d\d)-\d\d", r"\1 \2:\3", run.path.name)
    short = name if len(name) <= LABEL else f"{name[: LABEL // 2 - 2]} ... {name[-LABEL // 2 + 2 :]}"
    if isinstance(gain, bool) or not isinstance(gain, int | float) or not math.isfinite(gain):
        return short
    return f"{short}, {abs(100 * gain):.1f} % {'better' if gain >= 0 else 'worse'} than the base"


def with_numbers(labels: list[str]) -> list[str]:
    """Make labels unique: the second of two equal ones ends in (2)."""
    seen: Counter[str] = Counter()
    found = []
    for label in labels:
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found


def check_prompt(text: Any) -> None:
    """Raise a UserError for what is no text, or longer than the page's fields allow."""
    if not isinstance(text, str):
        raise UserError("a prompt must be text")
    if len(text) > PROMPT_LIMIT:
        raise UserError(f"a prompt of {len(text)} characters: at most {PROMPT_LIMIT}")


def check_number(name: str, value: Any) -> None:
    """Raise a UserError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a number")


def without_places(message: str) -> str:
    """Return a message without the folders of this machine: relative to the current one, `~` for home."""
    for folder, shorter in ((f"{Path.cwd()}/", ""), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        message = message.replace(folder, shorter) if folder != "/" else message
    return message


def errors_in_words(handler: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Return a handler's values, or on a UserError its message in their last place but one.

    The page's images and its last value stay as they are then. A message that pops up would vanish, and
    gradio would write Error across every frame.
    """

    @functools.wraps(handler)
    def wrapped(self: "AppSession", *args: Any, **options: Any) -> list[Any]:
        try:
            return handler(self, *args, **options)
        except (UserError, Unusable) as error:
            message, frames = f"**{without_places(str(error))}**", FRAMES[handler.__name__]
        except Stopped:
            message, frames = "stopped", FRAMES[handler.__name__]
        return [*[gr.skip()] * frames, message, gr.skip()]

    return wrapped


def errors_on_page(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show a handler's UserError as a message on the page; on a stop, leave the page unchanged."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except (UserError, Unusable) as error:
            raise gr.Error(without_places(str(error)), print_exception=False) from error
        except Stopped:
            return gr.skip()

    return wrapped


class AppSession:
    """The model behind the page; one request is served at a time, across all visitors."""

    def __init__(self, overrides: list[str]) -> None:
        """Start without a model; the first request loads one.

        Args:
            overrides: of train.py, which choose the base when no run is selected.
        """
        self._overrides = overrides
        self._lock = threading.Lock()
        self._model: tuple[list[str], LoadedModel] | None = None
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
        """Load the base of some runs with their adapters on it; the last one is kept.

        Raises:
            UserError: no longer a run, a link out of a run folder, or runs that cannot be combined.
        """
        known = self.runs()
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise UserError(f"{unknown[:80]} is no longer a finished run: reload the page")
        for name in names:
            known[name].refuse_links()  # its sample grids are shown to everyone who can reach the page
        if self._model is None or self._model[0] != names:
            self._model = None  # frees the memory for the next one
            self._model = (names, load_model(names, [] if names else self._overrides))
        return self._model[1]

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
            with self._lock:
                if stop.is_set():
                    raise Stopped
                yield count
        finally:
            self._stops.get(visitor, set()).discard(stop)

    def stop(self, request: gr.Request) -> None:
        """Stop all requests of this visitor at their next step."""
        for stop in tuple(self._stops.get(request.session_hash, ())):
            stop.set()

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor whose tab was closed."""
        self.stop(request)
        self._stops.pop(request.session_hash, None)

    def sources(self, settings: Settings, model: LoadedModel) -> list[str]:
        """Return what the commands name to load the same: runs, or what chooses the base."""
        return settings.runs or self._overrides or [path_setting("model.path", model.config.model.path)]

    # Handlers of the page's events

    @errors_on_page
    def on_runs_changed(self, names: list[str], guidance: Any, suggested: Any) -> list[Any]:
        """Return guidance, suggested guidance, the safety checker's switch and the sample grids of some runs.

        Args:
            guidance, suggested: on the page, and by the last call; what the visitor chose is kept.
        """
        with self._lock:
            model = self.model_of(names)
        base = model.config.model.path
        available = has_checker(base)
        label = f"Safety checker ({f'of {base}' if available else f'{base} has none'})"
        return [
            gr.update(value=model.guidance) if guidance == suggested else gr.skip(),
            model.guidance,
            gr.update(value=available, interactive=available, label=label),
            sample_grids(names),
        ]

    @errors_in_words
    def draw(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Generate with the base and with the adapter; return both images, a status line and the command.

        Args:
            values: those of Settings.
        """
        start, settings = time.monotonic(), Settings(*values)
        with self.turn(request.session_hash, progress) as count:
            model = self.model_of(settings.runs)
            asked = settings.request(model.config.model.resolution)
            base = generate_images(model, replace(asked, scale=0.0), "base", count)
            trained = generate_images(model, asked, "trained", count) if settings.runs else base
            images, notes = checked([to_image(base[0]), to_image(trained[0])], model, settings.safe)
            notes += unused_negative(asked.negative, asked.guidance)
            for image, scale in zip(images, (0.0, asked.scale), strict=True):
                image.info.update(text_of(replace(asked, scale=scale), model).items())
        return [*images, status_line(notes, start), draw_command(settings, self.sources(settings, model))]

    @errors_in_words
    def grid(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Draw a sheet over the values of one setting or two; return it, a status line and the command.

        Args:
            values: those of Settings, then name and values of the setting to the right and of that down.
        """
        start, settings = time.monotonic(), Settings(*values[: len(SETTINGS)])
        names, listed = values[len(SETTINGS) :: 2], values[len(SETTINGS) + 1 :: 2]
        for text in (*names, *listed):
            check_prompt(text)
        words = [f"{name}={value}" for name, value in zip(names, listed, strict=True) if value.strip()]
        axes = [parse_axis(word, "X/Y grid") for word in words]
        with self.turn(request.session_hash, progress) as count:
            model = self.model_of(settings.runs)
            asked = settings.request(model.config.model.resolution)
            sheet = settings_grid(model, asked, axes, count)
            (sheet,), notes = checked([sheet], model, settings.safe)
        sheet.thumbnail((4 * WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
        command = draw_command(settings, self.sources(settings, model)) + "".join(
            f" --grid {quoted(w)}" for w in words
        )
        return [sheet, status_line(notes, start), command]

    @errors_on_page
    def settings_of(self, file: str | None, *current: Any) -> list[Any]:
        """Return the values of Settings that are stored in a PNG file; what it does not name is kept.

        Args:
            current: those of Settings on the page.
        """
        if file is None:
            return list(current)
        stored, now = stored_settings(Path(file)), dict(zip(SETTINGS, current, strict=True))
        offered = self.runs()
        runs = [name for name in stored.pop("adapters", []) if isinstance(name, str) and name in offered]
        found = {name: stored[name] for name in SETTINGS if name in stored}
        found["runs"] = runs or now["runs"]
        asked = Settings(**(now | found | {"safe": bool(now["safe"])}))
        asked.request(64)  # refuses what no request may be
        gr.Info("settings taken from the file")
        return [getattr(asked, name) for name in SETTINGS]

    @errors_on_page
    def preview(self, photo: str | None) -> Image.Image | None:
        """Return the uploaded photo, reduced."""
        return None if photo is None else read_small(Path(photo))

    @errors_in_words
    def restyle(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Redraw a photo with base and adapter; return photo, both images, a status line and the command.

        Args:
            values: those of Settings with the photo's path after the runs, strength and way at the end.
        """
        start = time.monotonic()
        runs, photo, *others, strength, way = values
        settings = Settings(runs, *others)
        check_number("strength", strength)
        if photo is None:
            raise UserError("choose a photo first")
        if not settings.prompt.strip():
            raise UserError("describe what is on the photo")
        before = read_small(Path(photo))
        with self.turn(request.session_hash, progress) as count:
            model = self.model_of(runs)
            options = settings.restyle_options(strength, model.config.model.resolution, str(way))
            prompt = settings.prompt + escaped(model.config.data.style)
            afters = [restyle_counted(model, before, prompt, replace(options, scale=0.0), count("base"))]
            trained = restyle_counted(model, before, prompt, options, count("trained")) if runs else afters[0]
            afters, notes = checked([*afters, trained], model, settings.safe)
            notes += unused_negative(options.negative, options.guidance)
        sources = self.sources(settings, model)
        command = restyle_command(settings, Path(Path(photo).name), options, sources)
        return [before, *afters, status_line(notes, start), command]


SETTINGS = tuple(field.name for field in fields(Settings))  # in their order on the page


def text_of(request: ImageRequest, model: LoadedModel) -> dict[str, str]:
    """Return what a PNG file of `ghibli generate` says about an image, for the browser's copy of it."""
    settings = asdict(request) | model_metadata(model)
    return {
        "ghibli": json.dumps(settings, ensure_ascii=False),
        "parameters": a1111_parameters(request, model),
    }


def stored_settings(file: Path) -> dict[str, Any]:
    """Read what generate, restyle or this page stored in a PNG file, by the names of Settings.

    Raises:
        UserError: nothing is stored there.
    """
    try:
        with open_file(file) as opened:
            text = opened.info.get("ghibli", "")
            stored = json.loads(text) if isinstance(text, str) and len(text) < 2**16 else None
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError("that file holds no settings: it takes PNG files of `ghibli generate` or this page")
    if isinstance(stored.get("prompts"), list) and stored["prompts"]:
        stored["prompt"] = stored["prompts"][0]
    if not isinstance(stored.get("adapters", []), list):
        del stored["adapters"]
    return stored


def draw_command(settings: Settings, sources: list[str]) -> str:
    """Return the command that draws the trained image of some settings."""
    return command_line("ghibli", "generate", *sources, "--prompt", settings.prompt, *shared_words(settings))


def restyle_command(settings: Settings, photo: Path, options: RestyleOptions, sources: list[str]) -> str:
    """Return the command that restyles the photo of this name."""
    loaded = [word for name in sources for word in ("--with", name)]
    return command_line(
        "ghibli", "restyle", photo, *loaded, "--prompt", settings.prompt,
        "--strength", format_number(options.strength), "--way", options.way, *shared_words(settings),
    )  # fmt: skip


def shared_words(settings: Settings) -> list[str]:
    """Return the options that both commands have."""
    words = ["--sampler", settings.sampler, "--guidance", format_number(settings.guidance)]
    words += ["--steps", str(int(settings.steps)), "--seed", str(int(settings.seed or 0))]
    words += ["--scale", format_number(settings.scale)] if settings.scale != 1 and settings.runs else []
    return words + (["--negative", settings.negative] if settings.negative else [])


def checked(images: list[Image.Image], model: LoadedModel, safe: bool) -> tuple[list[Image.Image], list[str]]:
    """Apply the safety checker if asked to; also return a sentence if it blacked some images out."""
    if not safe:
        return images, []
    images, blacked_out = safety_checker(model.config.model.path).black_out(images)
    note = f"The safety checker blacked out {blacked_out} of {len(images)}."
    return images, [note] if blacked_out else []


@functools.lru_cache(maxsize=1)
def safety_checker(base: str) -> SafetyChecker:
    """Load the safety checker of a base, once."""
    return SafetyChecker(base)


def status_line(notes: list[str], start: float) -> str:
    """Join notes and the seconds since `start`."""
    return " ".join([*notes, f"{time.monotonic() - start:.1f} s"])


def read_small(photo: Path) -> Image.Image:
    """Read a photo, reduced to at most WIDTH px on its longer side; one at a time, which bounds the memory.

    Raises:
        Unusable: not an image, damaged, or one that takes more memory than DECODED.
    """
    return DECODER.submit(decode_small, photo).result()


def decode_small(photo: Path) -> Image.Image:
    """Do what read_small does, in this thread."""
    check_decoded_size(photo)
    image = read_image(photo, at_least=WIDTH)[0]
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return image


def check_decoded_size(photo: Path) -> None:
    """Raise Unusable for an image whose pixels, as its header tells, would take too much memory.

    A JPEG is decoded at the size that is needed; what is no image is left to read_image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large size: that is what is checked here
            with open_file(photo) as file:
                file.draft("RGB", (WIDTH, WIDTH))
                width, height = file.size
                size = width * height * max(3, len(file.getbands()))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    if size > DECODED:
        raise Unusable(f"it has {width}x{height} px, more than this page decodes: make it smaller")


def restyle_counted(
    model: LoadedModel, photo: Image.Image, prompt: str, options: RestyleOptions, counting: Any
) -> Image.Image:
    """Redraw a photo and count the steps.

    Args:
        counting: context manager of a progress bar.
    """
    total, steps = int(options.steps * options.strength), 0
    with counting as on_progress:

        def on_step() -> None:
            nonlocal steps
            steps += 1
            on_progress(steps, total)

        return restyle_photo(model, photo, prompt, options, on_step)


def sample_grids(names: list[str]) -> list[tuple[Image.Image, str]]:
    """Return the sample grids of some runs with captions, the newest of each run first."""
    grids = []
    for name in names:
        files = sorted(RunDir(Path(name)).samples.glob("*.png"), key=lambda file: file.stat().st_mtime)
        for file in reversed(files):
            image = read_image(file)[0]
            image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
            grids.append((image, f"{name}: {file.stem}"))
    return grids
