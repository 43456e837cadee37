"""The tabs of the page that draw: a prompt, a photo, a grid over settings; and what was drawn so far."""

from typing import Any

import gradio as gr

from ghibli.app.answers import errors_on_page
from ghibli.app.drawing import Drawing
from ghibli.app.history import Drawn
from ghibli.app.parts import (
    HANDLER,
    ONE_BY_ONE,
    PREVIEWS,
    UPLOAD_LIMIT,
    PromptFields,
    SettingsColumn,
    command_box,
    image_file,
    image_frame,
)
from ghibli.app.restyling import CONTROLNETS, OWN_IMAGE, Restyling
from ghibli.app.session import AppSession
from ghibli.app.settings import PROMPT_LIMIT, RANGES, parsed_settings
from ghibli.inference.request import AXES, KNEES, WAYS, default_way
from ghibli.runtime.errors import UserError


def draw_tab(handlers: Drawing, settings: SettingsColumn) -> tuple[Any, PromptFields]:
    """Build the tab that generates with base and adapter; return its event and what it has of its own."""
    with gr.Tab("Draw"):
        prompt = gr.Textbox(
            settings.prompt, label="Prompt", lines=2, max_length=PROMPT_LIMIT, elem_id="prompt",
            info="(word:1.3) weighs a word more, (word:0.7) less",
        )  # fmt: skip
        start = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            images = [image_frame("base", "base"), image_frame("trained", "trained")]
        status = gr.Markdown(elem_id="drawn")
        commands = [
            command_box("draw-command", "The trained one in the terminal"),
            command_box("base-command", "The base in the terminal"),
        ][::-1]  # as the handlers return them
        hires = gr.Slider(
            *RANGES["hires"], value=1, step=0.25, label="Larger", elem_id="hires",
            info="a second pass at so many times the size, by image-to-image; 1 = none",
        )  # fmt: skip
        stored = gr.File(
            label="Settings from a PNG of generate, restyle or this page", file_types=[".png"],
            type="filepath", height=90, elem_id="stored",
        )  # fmt: skip
    inputs = [settings.runs, prompt, *settings.others, hires]
    stored.upload(
        handlers.settings_of, [stored, *inputs], inputs, show_progress="hidden", **HANDLER, **PREVIEWS
    )
    event = start.click(
        handlers.draw, inputs, [*images, status, *commands], scroll_to_output=True, **HANDLER, **ONE_BY_ONE
    )
    return event, PromptFields(prompt, hires)


def grid_tab(handlers: Drawing, settings: SettingsColumn, first: PromptFields) -> Any:
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
    inputs = [settings.runs, first.prompt, *settings.others, first.hires, *given]
    return start.click(handlers.grid, inputs, [sheet, status, command], **HANDLER, **ONE_BY_ONE)


def restyle_tab(session: AppSession, settings: SettingsColumn) -> Any:
    """Build the tab that redraws a photo with base and adapter; return its event."""
    handlers, usual = Restyling(session), default_way("ddim")
    with gr.Tab("Restyle a photo"):
        photo = image_file(f"Photo, at most {UPLOAD_LIMIT}", "upload")
        prompt = gr.Textbox(
            label="What the photo shows", info="the style's words are added", max_length=PROMPT_LIMIT,
            elem_id="what",
        )  # fmt: skip
        strength = gr.Slider(0.1, 1, value=KNEES[usual], step=0.05, label="Strength", info="1 = all new")
        way = gr.Radio(
            list(WAYS), value=usual, label="Way", elem_id="way",
            info="inversion, with DDIM only, keeps more of the photo",
        )  # fmt: skip
        way.select(lambda chosen: KNEES[chosen], way, strength, show_progress="hidden", **HANDLER)
        structure = structure_fields(session)
        start = gr.Button("Restyle", variant="primary", elem_id="restyle")
        with gr.Row():
            preview = image_frame("photo", "photo")
            images = [image_frame("base", "restyled-base"), image_frame("trained", "restyled-trained")]
        status = gr.Markdown(elem_id="restyled")
        commands = [
            command_box("restyle-command", "The trained one in the terminal"),
            command_box("restyle-base-command", "The base in the terminal"),
        ][::-1]  # as the handlers return them
    photo.change(handlers.preview, photo, preview, show_progress="hidden", **HANDLER, **PREVIEWS)
    inputs = [settings.runs, photo, prompt, *settings.others, strength, way, *structure]
    outputs = [preview, *images, status, *commands]
    return start.click(handlers.restyle, inputs, outputs, **HANDLER, **ONE_BY_ONE)


def structure_fields(session: AppSession) -> list[Any]:
    """Build the fields for a mask and a ControlNet, in the order of restyling.Structure."""
    with gr.Accordion("Only a part, or along edges or depth", open=False, elem_id="structure"):
        mask = image_file("Mask, of the photo's size: white is redrawn, black is kept", "mask")
        with gr.Row():
            control = gr.Dropdown(
                [("nothing", ""), ("the photo's edges (canny)", "canny"), ("the photo's depth", "depth"),
                 ("an image of mine", OWN_IMAGE)],
                value="", label="A ControlNet sees", elem_id="control", min_width=140,
            )  # fmt: skip
            weights = gr.Dropdown(
                list(CONTROLNETS), value=None, label="Its weights", elem_id="control-model", min_width=140,
                allow_custom_value=session.is_private, info="folder or hub id, made for the base",
            )  # fmt: skip
        scale = gr.Slider(0, 2, value=1, step=0.05, label="How much it steers", info="0 = not at all")
        image = image_file("The image that it sees, in the photo's shape", "control-image")
    return [mask, control, weights, scale, image]


def history_tab(session: AppSession, drawing: Drawing, settings: SettingsColumn, first: PromptFields) -> None:
    """Build the tab with what was drawn so far, each image with its command and its settings."""
    kept = "until the page ends" if session.is_private else "until this tab is closed"
    with gr.Tab("History", elem_id="history-tab") as tab:
        gr.Markdown(f"What was drawn, the newest first; kept {kept}. Click an image for its command.")
        gallery = gr.Gallery(label="history", columns=4, format="png", height="auto", elem_id="history")
        command = command_box("history-command")
        again = gr.Button("Take its settings", elem_id="history-settings")
        numbers, chosen = gr.State([]), gr.State(None)
    inputs = [settings.runs, first.prompt, *settings.others, first.hires]

    def show(request: gr.Request) -> list[Any]:
        drawn = session.history.of(str(request.session_hash))
        return [[(one.image, one.label) for one in drawn], [one.number for one in drawn]]

    def choose(shown: list[int], event: gr.SelectData, request: gr.Request) -> list[Any]:
        number = shown[event.index]
        return [number, find(session, request, number).command]

    @errors_on_page
    def take(number: int | None, request: gr.Request, *current: Any) -> list[Any]:
        if number is None:
            raise UserError("click an image first")
        stored = parsed_settings(find(session, request, number).image.info.get("ghibli"))
        return drawing.found(stored, current)

    options: dict[str, Any] = {"show_progress": "hidden", **HANDLER}
    tab.select(show, None, [gallery, numbers], **options)
    gallery.select(errors_on_page(choose), numbers, [chosen, command], **options)
    again.click(take, [chosen, *inputs], inputs, **options)


def find(session: AppSession, request: gr.Request, number: int) -> Drawn:
    """Return an image of a visitor's history.

    Raises:
        UserError: it has been forgotten.
    """
    found = next((one for one in session.history.of(str(request.session_hash)) if one.number == number), None)
    if found is None:
        raise UserError("that image has been forgotten: open the tab again")
    return found
