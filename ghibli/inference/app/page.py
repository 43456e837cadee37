"""`ghibli app`: a page in the browser that shows what was trained beside the base; needs gradio."""

import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ghibli.config.registry import SAMPLERS
from ghibli.inference.app.address import find_address, in_url, is_wildcard, without_proxies
from ghibli.inference.app.guard import Guard
from ghibli.inference.app.private_folder import make_private_folder
from ghibli.inference.app.session import PROMPT_LIMIT, AppSession
from ghibli.inference.request import AXES, KNEES, WAYS, default_way
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)

UPLOAD_LIMIT = "30mb"  # of a photo
QUEUE_LIMIT = 16  # waiting requests; further ones are refused
UPLOAD_CLEANUP = (600, 3600)  # seconds: between two checks for old uploads, age at which one is deleted
ABOUT = "Base and trained model start from the same noise, so the difference is what was learned."
STYLE = """
.gradio-container {max-width: 1200px !important; margin: auto}
#grids img {object-fit: contain !important; height: auto !important; max-height: none !important}
#grids .grid-wrap {max-height: none !important; height: auto !important}
@media (max-width: 700px) {#settings {order: 2} #work {order: 1}}
.drawn img {width: 100% !important; height: 100% !important; object-fit: contain !important}
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
HANDLER = {"api_visibility": "private"}  # options of every event: not part of the page's API
ONE_BY_ONE = {"concurrency_limit": 1, "concurrency_id": "model"}  # of events that load or use a model
PREVIEWS = {"concurrency_limit": 1, "concurrency_id": "photo"}  # of events that decode a photo


@dataclass(frozen=True)
class SettingsColumn:
    """The components that both tabs share."""

    runs: gr.Dropdown
    others: list[Any]  # from the negative prompt to the safety checker, in the order of session.Settings
    guidance: gr.Slider  # one of the others
    safe: gr.Checkbox  # one of the others
    prompt: str  # what the prompt is at first


def page(session: AppSession) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="Ghibli LoRA Lab", delete_cache=UPLOAD_CLEANUP) as blocks:
        gr.Markdown(f"# Ghibli LoRA Lab\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=2, min_width=240, elem_id="settings"):
                settings, suggested = settings_column(session), gr.State(None)
            with gr.Column(scale=3, min_width=240, elem_id="work"):
                cancel = gr.Button("Cancel", size="sm", elem_id="cancel")
                with gr.Tabs():
                    drawn, prompt = draw_tab(session, settings)
                    restyled = restyle_tab(session, settings)
                    varied = grid_tab(session, settings, prompt)
                    with gr.Tab("Sample grids"):
                        gallery = gr.Gallery(
                            label="sample grids of the runs", columns=1, format="png", height="auto",
                            object_fit="contain", elem_id="grids",
                        )  # fmt: skip
        runs, now = settings.runs, [settings.runs, settings.guidance, suggested]
        updated = [settings.guidance, suggested, settings.safe, gallery]
        runs.change(session.on_runs_changed, now, updated, show_progress="hidden", **HANDLER, **ONE_BY_ONE)
        cancel.click(session.stop, cancels=[drawn, restyled, varied], queue=False, **HANDLER)
        loaded = blocks.load(
            lambda: gr.update(choices=session.run_choices()), None, runs, show_progress="hidden", **HANDLER
        )
        loaded.then(session.on_runs_changed, now, updated, show_progress="hidden", **HANDLER, **ONE_BY_ONE)
        blocks.unload(session.leave)
    return blocks.queue(max_size=QUEUE_LIMIT, default_concurrency_limit=4, api_open=False)


def settings_column(session: AppSession) -> SettingsColumn:
    """Build the settings that both tabs share; the newest run is selected."""
    choices = session.run_choices()
    newest = [value for _, value in choices[:1]]
    try:
        prompt = session.model_of(newest).config.sample.prompts[0]
    except UserError as error:  # such as a base that was moved away: open the page without the run
        logger.warning(str(error))
        newest, prompt = [], session.model_of([]).config.sample.prompts[0]
    runs = gr.Dropdown(
        choices, value=newest, multiselect=True, label="Runs", elem_id="runs",
        info="none: the base alone; several with the same base: their adapters add up",
    )  # fmt: skip
    negative = gr.Textbox("", label="Negative prompt", max_length=PROMPT_LIMIT)
    labels = [(entry.label, name) for name, entry in SAMPLERS.items()]
    sampler = gr.Dropdown(labels, value="ddim", label="Sampler", elem_id="sampler")
    guidance = gr.Slider(1, 30, value=7.5, step=0.5, label="Guidance", info="1 = off")
    steps = gr.Slider(1, 100, value=30, step=1, label="Steps", elem_id="steps")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
    scale = gr.Slider(0, 1.5, value=1, step=0.05, label="Adapter scale", info="0 = the base")
    safe = gr.Checkbox(False, label="Safety checker", interactive=False)
    others = [negative, sampler, guidance, steps, seed, scale, safe]
    return SettingsColumn(runs, others, guidance, safe, prompt)


def draw_tab(session: AppSession, settings: SettingsColumn) -> tuple[Any, gr.Textbox]:
    """Build the tab that generates with base and adapter; return its event and prompt."""
    with gr.Tab("Draw"):
        prompt = gr.Textbox(
            settings.prompt, label="Prompt", lines=2, max_length=PROMPT_LIMIT, elem_id="prompt",
            info="(word:1.3) weighs a word more, (word:0.7) less",
        )  # fmt: skip
        start = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            images = [image_frame("base", "base"), image_frame("trained", "trained")]
        status, command = gr.Markdown(elem_id="drawn"), command_box("draw-command")
        stored = gr.File(
            label="Settings from a PNG of generate or of this page", file_types=[".png"], type="filepath",
            height=90, elem_id="stored",
        )  # fmt: skip
    inputs = [settings.runs, prompt, *settings.others]
    stored.upload(
        session.settings_of, [stored, *inputs], inputs, show_progress="hidden", **HANDLER, **PREVIEWS
    )
    event = start.click(
        session.draw, inputs, [*images, status, command], scroll_to_output=True, **HANDLER,
        **ONE_BY_ONE,
    )  # fmt: skip
    return event, prompt


def grid_tab(session: AppSession, settings: SettingsColumn, prompt: gr.Textbox) -> Any:
    """Build the tab that draws the prompt over the values of two settings; return its event."""
    with gr.Tab("X/Y grid"):
        gr.Markdown("The prompt of the first tab, over the values of one setting or two.")
        given: list[Any] = []
        for name, usual, label, element in (
            ("guidance", "3, 5, 7.5", "To the right", "x"), ("steps", "", "Down, may be empty", "y"),
        ):  # fmt: skip
            with gr.Row():
                given.append(gr.Dropdown(list(AXES), value=name, label=label, min_width=120))
                given.append(
                    gr.Textbox(
                        usual, label="Values", max_length=200, elem_id=f"{element}-values", min_width=120
                    )
                )
        start = gr.Button("Draw the grid", variant="primary", elem_id="draw-grid")
        sheet = image_frame("grid", "grid")
        status, command = gr.Markdown(elem_id="grid-drawn"), command_box("grid-command")
    inputs = [settings.runs, prompt, *settings.others, *given]
    return start.click(session.grid, inputs, [sheet, status, command], **HANDLER, **ONE_BY_ONE)


def restyle_tab(session: AppSession, settings: SettingsColumn) -> Any:
    """Build the tab that redraws a photo with base and adapter; return its event."""
    with gr.Tab("Restyle a photo"):
        photo = gr.File(
            label=f"Photo, at most {UPLOAD_LIMIT}",
            file_types=["image"],
            type="filepath",
            height=110,
            elem_id="upload",
        )
        prompt = gr.Textbox(
            label="What the photo shows",
            info="the style's words are added",
            max_length=PROMPT_LIMIT,
            elem_id="what",
        )
        usual = default_way("ddim")
        strength = gr.Slider(0.1, 1, value=KNEES[usual], step=0.05, label="Strength", info="1 = all new")
        way = gr.Radio(
            list(WAYS), value=usual, label="Way", info="inversion, with DDIM only, keeps more of the photo"
        )
        start = gr.Button("Restyle", variant="primary", elem_id="restyle")
        with gr.Row():
            preview = image_frame("photo", "photo")
            images = [image_frame("base", "restyled-base"), image_frame("trained", "restyled-trained")]
        status, command = gr.Markdown(elem_id="restyled"), command_box("restyle-command")
    photo.change(session.preview, photo, preview, show_progress="hidden", **HANDLER, **PREVIEWS)
    inputs = [settings.runs, photo, prompt, *settings.others, strength, way]
    outputs = [preview, *images, status, command]
    return start.click(session.restyle, inputs, outputs, **HANDLER, **ONE_BY_ONE)


def command_box(element: str) -> gr.Textbox:
    """Build the field that shows the command of the images above it, to be copied."""
    return gr.Textbox(
        label="The same in the terminal", interactive=False, elem_id=element, buttons=["copy"], max_lines=3
    )


def image_frame(label: str, element: str) -> gr.Image:
    """Build a frame for an image, with the HTML id `element`."""
    return gr.Image(
        label=label, format="png", interactive=False, elem_id=element, min_width=140, height=320,
        elem_classes="drawn", buttons=["download", "fullscreen"],
    )  # fmt: skip


def serve(overrides: list[str], host: str, port: int | None) -> tuple[gr.Blocks, str]:
    """Serve the page at http://host:port, or at the first free port, in the background.

    Args:
        overrides: of train.py, which choose the base when no run is selected.
        host: name or IP address of this machine; 0.0.0.0 and :: stand for all of its addresses.

    Returns:
        The page, to be waited for or closed, and its address.

    Raises:
        UserError: the host is unknown, the port is taken, or the base cannot be loaded.
    """
    host, port = find_address(host, port)
    folder = make_private_folder()
    gr.routes.DEFAULT_TEMP_DIR = str(folder)  # set at gradio's import; the server makes a folder in it
    blocks = page(AppSession(overrides))
    guard = Middleware(Guard, host=host, folder=folder)
    try:
        with without_proxies(host):
            _, address, _ = blocks.launch(
                server_name=in_url(host), server_port=port, max_file_size=UPLOAD_LIMIT, share=False,
                quiet=True,  # its line with the address, which the command prints
                prevent_thread_lock=True, show_error=False, footer_links=[], css=STYLE, ssr_mode=False,
                theme=THEME, app_kwargs={"middleware": [guard]},
            )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {port} on {host} cannot be used: {error}") from error
    return blocks, f"http://localhost:{port}/" if is_wildcard(host) else address
