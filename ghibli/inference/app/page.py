"""`ghibli app`: a page in the browser that draws with what was trained, the base beside it; needs gradio."""

from typing import Any

import gradio as gr

from ghibli.inference.app.session import AppSession
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError

UPLOAD = "30mb"  # the largest photo
WAITING = 16  # requests in the queue; more are told to come back
KEPT = (600, 3600)  # seconds: how often uploads are looked at, and when one is deleted
ABOUT = "Each image starts from the same noise for the base and for what was trained on it."
STYLE = """
.gradio-container {max-width: 1200px !important; margin: auto}
.drawn img {width: 100% !important; height: 100% !important; object-fit: contain !important}
"""


def page(app_session: AppSession) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title="Ghibli LoRA Lab", delete_cache=KEPT) as blocks:
        gr.Markdown(f"# Ghibli LoRA Lab\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                names, inputs, safe = settings(app_session)
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=3, min_width=240), gr.Tabs():
                drawn = draw_tab(app_session, names, [*inputs, safe])
                redone = restyle_tab(app_session, names, [*inputs, safe])
                with gr.Tab("Grids of the runs"):
                    gallery = gr.Gallery(label="sample grids", columns=1, format="png", height=700)
        guidance = inputs[3]
        belongs = [guidance, safe, gallery]
        names.change(app_session.chosen, names, belongs, show_progress="hidden", api_visibility="private")
        cancel.click(app_session.stop, cancels=[drawn, redone], queue=False, api_visibility="private")
        blocks.load(
            lambda: gr.update(choices=app_session.choices()), None, names, show_progress="hidden",
            api_visibility="private",
        ).then(
            app_session.chosen, names, belongs, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        blocks.unload(app_session.leave)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=4)


def settings(app_session: AppSession) -> tuple[gr.Dropdown, list[Any], gr.Checkbox]:
    """What both tabs share: (runs, the inputs in the order of the handlers, the checker's switch)."""
    choices = app_session.choices()
    newest = [value for _, value in choices[:1]]
    try:
        prompt = app_session.loaded(newest).config.sample.prompts[0]
    except UserError as mistake:  # its base was moved away: the page opens all the same
        console.print(str(mistake), style="yellow", markup=False)
        newest, prompt = [], app_session.loaded([]).config.sample.prompts[0]
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


def draw_tab(app_session: AppSession, names: gr.Dropdown, inputs: list[Any]) -> Any:
    """Base and adapter side by side; returns the event that draws them."""
    with gr.Tab("Draw"):
        start = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            images = [image("base", "base"), image("trained", "trained")]
        words = gr.Markdown(elem_id="drawn")
    return start.click(
        app_session.draw, [names, *inputs], [*images, words], api_visibility="private", scroll_to_output=True
    )


def restyle_tab(app_session: AppSession, names: gr.Dropdown, inputs: list[Any]) -> Any:
    """A photo, and what base and adapter make of it; returns the event that redraws it."""
    with gr.Tab("Restyle a photo"):
        photo = gr.File(label=f"Photo, at most {UPLOAD}", file_types=["image"], type="filepath", height=110)
        what = gr.Textbox(label="What is on it", max_length=4000, elem_id="what")
        strength = gr.Slider(0.1, 1, value=0.5, step=0.05, label="Strength", info="1 = all new")
        start = gr.Button("Restyle", variant="primary", elem_id="restyle")
        with gr.Row():
            shown = image("photo", "photo")
            images = [image("base", "restyled-base"), image("trained", "restyled-trained")]
        words = gr.Markdown(elem_id="restyled")
    photo.change(app_session.preview, photo, shown, api_visibility="private", show_progress="hidden")
    return start.click(
        app_session.restyle, [names, photo, what, *inputs[1:], strength], [shown, *images, words],
        api_visibility="private",
    )  # fmt: skip


def image(label: str, name: str) -> gr.Image:
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
        UserError: the port is taken, or what draws cannot be loaded.
    """
    blocks = page(AppSession(words))
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, max_file_size=UPLOAD, share=False, quiet=True,
            prevent_thread_lock=True, show_error=True, footer_links=[], css=STYLE, ssr_mode=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        where = host if port is None else f"--port {port} on {host}"
        raise UserError(f"{where} cannot be used: {error}") from error
    return blocks, address
