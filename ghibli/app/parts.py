"""The components that several tabs of the page have."""

import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ghibli.app.session import AppSession
from ghibli.app.settings import PROMPT_LIMIT, RANGES
from ghibli.config.registry import SAMPLERS
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)

UPLOAD_LIMIT = "30mb"  # of a photo
HANDLER = {"api_visibility": "private"}  # options of every event: not part of the page's API
ONE_BY_ONE = {"concurrency_limit": 1, "concurrency_id": "model"}  # of events that load or use a model
PREVIEWS = {"concurrency_limit": 1, "concurrency_id": "photo"}  # of events that decode a photo


@dataclass(frozen=True)
class SettingsColumn:
    """The components that the drawing tabs share."""

    runs: gr.Dropdown
    others: list[Any]  # from the negative prompt to the safety checker, in the order of settings.Settings
    guidance: gr.Slider  # one of the others
    safe: gr.Checkbox  # one of the others
    prompt: str  # what the prompt is at first


@dataclass(frozen=True)
class PromptFields:
    """What the first tab has and the grid's tab uses too."""

    prompt: gr.Textbox
    hires: gr.Slider


def settings_column(session: AppSession) -> SettingsColumn:
    """Build the settings that the drawing tabs share; the newest run is selected."""
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
    guidance = gr.Slider(
        *RANGES["guidance"], value=7.5, step=0.5, label="Guidance", info="1 = off", elem_id="guidance"
    )
    steps = gr.Slider(*RANGES["steps"], value=30, step=1, label="Steps", elem_id="steps")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
    scale = gr.Slider(*RANGES["scale"], value=1, step=0.05, label="Adapter scale", info="0 = the base")
    safe = gr.Checkbox(False, label="Safety checker", interactive=False)
    others = [negative, sampler, guidance, steps, seed, scale, safe]
    return SettingsColumn(runs, others, guidance, safe, prompt)


def command_box(element: str, label: str = "The same in the terminal") -> gr.Textbox:
    """Build the field that shows the command of the image above it, to be copied."""
    return gr.Textbox(label=label, interactive=False, elem_id=element, buttons=["copy"], max_lines=3)


def image_frame(label: str, element: str) -> gr.Image:
    """Build a frame for an image, with the HTML id `element`."""
    return gr.Image(
        label=label, format="png", interactive=False, elem_id=element, min_width=140, height=320,
        elem_classes="drawn", buttons=["download", "fullscreen"],
    )  # fmt: skip


def image_file(label: str, element: str) -> gr.File:
    """Build a field to drop an image file into."""
    return gr.File(label=label, file_types=["image"], type="filepath", height=110, elem_id=element)


def sheets(label: str, element: str) -> gr.Gallery:
    """Build a gallery that shows sheets whole, one below the other."""
    return gr.Gallery(
        label=label, columns=1, format="png", height="auto", object_fit="contain", elem_id=element,
        elem_classes="sheets", show_label=False,
    )  # fmt: skip
