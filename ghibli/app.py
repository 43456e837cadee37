"""`ghibli app`: a page in the browser that draws with what was trained, the base beside it; needs gradio."""

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

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody

import gradio as gr
from PIL import Image

from ghibli import restyle
from ghibli.captions import Unusable, read_picture
from ghibli.generate import Count, Request, draw, lost_words
from ghibli.mistakes import UserMistake
from ghibli.progress import console
from ghibli.run_dir import RunDir
from ghibli.safety import SafetyChecker, has_checker
from ghibli.sampling import to_image
from ghibli.trained import runs_with_weights
from ghibli.wardrobe import Dressed, dress

UPLOAD = "30mb"  # the largest photo
WAITING = 16  # requests in the queue; more are told to come back
KEPT = (600, 3600)  # seconds: how often uploads are looked at, and when one is deleted
WIDTH = 1200  # px, of the grids that are shown
ABOUT = "Each picture starts from the same noise for the base and for what was trained on it."
PROGRESS = gr.Progress()  # as a default it tells gradio to give the handler one of its own
STYLE = """
.gradio-container {max-width: 1200px !important; margin: auto}
.drawn img {width: 100% !important; height: 100% !important; object-fit: contain !important}
"""


class Stopped(Exception):
    """Somebody pressed Cancel or closed the tab."""


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler; the user's mistakes become a message on the page, and a stop changes nothing there."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except (UserMistake, Unusable) as mistake:
            raise gr.Error(str(mistake), print_exception=False) from mistake
        except Stopped:
            return gr.skip()

    return wrapped


class Studio:
    """The models behind the page; one request is drawn at a time, whoever asks."""

    def __init__(self, words: list[str]) -> None:
        """
        Args:
            words: settings of train.py that choose the base where no run is chosen.
        """
        self._words = words
        self._alone = threading.Lock()
        self._worn: tuple[list[str], Dressed] | None = None
        self._stops: defaultdict[str, set[threading.Event]] = defaultdict(set)  # of each visitor

    def runs(self) -> dict[str, RunDir]:
        """What may be chosen: finished runs that trained something, by path, the newest first."""
        return {str(run.path): run for run in reversed(runs_with_weights())}

    def choices(self) -> list[tuple[str, str]]:
        """(what the page shows, path) of the runs."""
        gains = {name: run.read_status().get("gain", 0.0) for name, run in self.runs().items()}
        return [(f"{name}, {100 * gain:.1f} % better than the base", name) for name, gain in gains.items()]

    def dressed(self, names: list[str]) -> Dressed:
        """The base of some runs with their adapters on it; the last one is kept.

        Raises:
            UserMistake: a name that is none of a run, or runs that do not go together.
        """
        known = self.runs()
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            raise UserMistake(f"{strange[:80]} is no finished run any more: reload the page")
        if self._worn is None or self._worn[0] != names:
            self._worn = None  # room for the next
            self._worn = (names, dress(names, [] if names else self._words))
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
            dressed = self.dressed(names)
        base, has_one = dressed.config.model.path, has_checker(dressed.config.model.path)
        why = f"of {base}" if has_one else f"{base} has none"
        return [
            gr.update(value=dressed.guidance),
            gr.update(value=has_one, interactive=has_one, label=f"Safety checker ({why})"),
            grids(names),
        ]

    @told
    def draw(
        self, names: list[str], prompt: str, negative: str, sampler: str, guidance: float, steps: float,
        seed: float, scale: float, safe: bool, request: gr.Request, progress: gr.Progress = PROGRESS,
    ) -> list[Any]:  # fmt: skip
        """Picture of the base, picture of the adapter, what was done in words."""
        start = time.monotonic()
        with self.turn(request.session_hash, progress) as count:
            dressed = self.dressed(names)
            side = dressed.config.model.resolution
            asked = Request(
                [prompt], sampler, guidance, int(steps), int(seed or 0), (side, side), negative, scale=scale
            )
            base = draw(dressed, replace(asked, scale=0.0), "base", count)
            trained = draw(dressed, asked, "trained", count) if names else base
            pictures, said = self._safe([to_image(base[0]), to_image(trained[0])], dressed, safe)
            said += lost_words([prompt], dressed.base)
        return [*pictures, done(said, start)]

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
            raise UserMistake("choose a photo first")
        if not prompt.strip():
            raise UserMistake("say what is on the photo")
        before = small(Path(photo))
        with self.turn(request.session_hash, progress) as count:
            dressed = self.dressed(names)
            how = restyle.How(
                strength, sampler, guidance, int(steps), int(seed or 0), negative, scale,
                dressed.config.model.resolution,
            )  # fmt: skip
            words = prompt + dressed.config.data.style
            afters = [redrawn(dressed, before, words, replace(how, scale=0.0), "base", count)]
            afters.append(redrawn(dressed, before, words, how, "trained", count) if names else afters[0])
            afters, said = self._safe(afters, dressed, safe)
        return [before, *afters, done(said, start)]

    def _safe(
        self, pictures: list[Image.Image], dressed: Dressed, safe: bool
    ) -> tuple[list[Image.Image], list[str]]:
        """The pictures after the checker, if it is wanted, and a sentence if it took some away."""
        if not safe:
            return pictures, []
        shown, gone = checker(dressed.config.model.path).black_out(pictures)
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
        Unusable: no picture, a damaged one, or one of more megapixels than Pillow opens.
    """
    picture = read_picture(photo, at_least=WIDTH)[0]
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return picture


def redrawn(
    dressed: Dressed, photo: Image.Image, prompt: str, how: restyle.How, label: str, count: Count
) -> Image.Image:
    """The photo redrawn, its steps counted."""
    total, steps = int(how.steps * how.strength), 0
    with count(label) as on_progress:

        def on_step() -> None:
            nonlocal steps
            steps += 1
            on_progress(steps, total)

        return restyle.restyle(dressed, photo, prompt, how, on_step)


def grids(names: list[str]) -> list[tuple[Image.Image, str]]:
    """The sample grids of some runs, the newest of each first, with their names."""
    found = []
    for name in names:
        files = sorted(RunDir(Path(name)).samples.glob("*.png"), key=lambda file: file.stat().st_mtime)
        for file in reversed(files):
            picture = read_picture(file)[0]
            picture.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
            found.append((picture, f"{name}: {file.stem}"))
    return found


def page(studio: Studio) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title="Ghibli LoRA Lab", delete_cache=KEPT) as blocks:
        gr.Markdown(f"# Ghibli LoRA Lab\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                names, inputs, safe = settings(studio)
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=3, min_width=240), gr.Tabs():
                drawn = draw_tab(studio, names, [*inputs, safe])
                redone = restyle_tab(studio, names, [*inputs, safe])
                with gr.Tab("Grids of the runs"):
                    gallery = gr.Gallery(label="sample grids", columns=1, format="png", height=700)
        guidance = inputs[3]
        belongs = [guidance, safe, gallery]
        names.change(studio.chosen, names, belongs, show_progress="hidden", api_visibility="private")
        cancel.click(studio.stop, cancels=[drawn, redone], queue=False, api_visibility="private")
        blocks.load(
            lambda: gr.update(choices=studio.choices()), None, names, show_progress="hidden",
            api_visibility="private",
        ).then(studio.chosen, names, belongs, show_progress="hidden", api_visibility="private")  # fmt: skip
        blocks.unload(studio.leave)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=4)


def settings(studio: Studio) -> tuple[gr.Dropdown, list[Any], gr.Checkbox]:
    """What both tabs share: (runs, the inputs in the order of the handlers, the checker's switch)."""
    choices = studio.choices()
    newest = [value for _, value in choices[:1]]
    try:
        prompt = studio.dressed(newest).config.sample.prompts[0]
    except UserMistake as mistake:  # its base was moved away: the page opens all the same
        console.print(str(mistake), style="yellow", markup=False)
        newest, prompt = [], studio.dressed([]).config.sample.prompts[0]
    names = gr.Dropdown(
        choices, value=newest, multiselect=True, label="Runs", elem_id="runs",
        info="none: the base alone; several of one base: their adapters add up",
    )  # fmt: skip
    inputs = [
        gr.Textbox(prompt, label="Prompt", lines=2, max_length=4000, elem_id="prompt"),
        gr.Textbox("", label="Negative prompt", max_length=4000),
        gr.Radio(["ddim", "ddpm"], value="ddim", label="Sampler"),
        gr.Slider(1, 30, value=7.5, step=0.5, label="Guidance", info="1 = off"),
        gr.Slider(1, 100, value=30, step=1, label="Steps", elem_id="steps"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed"),
        gr.Slider(0, 1.5, value=1, step=0.05, label="Adapter scale", info="0 = the base"),
    ]
    return names, inputs, gr.Checkbox(False, label="Safety checker", interactive=False)


def draw_tab(studio: Studio, names: gr.Dropdown, inputs: list[Any]) -> Any:
    """Base and adapter side by side; returns the event that draws them."""
    with gr.Tab("Draw"):
        start = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            pictures = [picture("base", "base"), picture("trained", "trained")]
        words = gr.Markdown(elem_id="drawn")
    return start.click(
        studio.draw, [names, *inputs], [*pictures, words], api_visibility="private", scroll_to_output=True
    )


def restyle_tab(studio: Studio, names: gr.Dropdown, inputs: list[Any]) -> Any:
    """A photo, and what base and adapter make of it; returns the event that redraws it."""
    with gr.Tab("Restyle a photo"):
        photo = gr.File(label=f"Photo, at most {UPLOAD}", file_types=["image"], type="filepath", height=110)
        what = gr.Textbox(label="What is on it", max_length=4000, elem_id="what")
        strength = gr.Slider(0.1, 1, value=0.5, step=0.05, label="Strength", info="1 = all new")
        start = gr.Button("Restyle", variant="primary", elem_id="restyle")
        with gr.Row():
            shown = picture("photo", "photo")
            pictures = [picture("base", "restyled-base"), picture("trained", "restyled-trained")]
        words = gr.Markdown(elem_id="restyled")
    photo.change(studio.preview, photo, shown, api_visibility="private", show_progress="hidden")
    return start.click(
        studio.restyle, [names, photo, what, *inputs[1:], strength], [shown, *pictures, words],
        api_visibility="private",
    )  # fmt: skip


def picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label, format="png", interactive=False, elem_id=name, min_width=140, height=320,
        elem_classes="drawn",
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def serve(words: list[str], host: str, port: int | None) -> tuple[gr.Blocks, str]:
    """Shows the page at http://host:port, without a port at the first free one, and returns at once.

    Returns:
        The page, to be waited for or closed, and its address.

    Raises:
        UserMistake: the port is taken, or what draws cannot be loaded.
    """
    blocks = page(Studio(words))
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, max_file_size=UPLOAD, share=False, quiet=True,
            prevent_thread_lock=True, show_error=True, footer_links=[], css=STYLE, ssr_mode=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        where = host if port is None else f"--port {port} on {host}"
        raise UserMistake(f"{where} cannot be used: {error}") from error
    return blocks, address
