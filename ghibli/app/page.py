"""`ghibli app`: a page in the browser that draws with what was trained, and trains; needs gradio."""

import threading
from typing import Any, NoReturn

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware

from ghibli.app.address import find_address, in_url, is_loopback, is_wildcard, without_proxies
from ghibli.app.drawing import Drawing
from ghibli.app.guard import Guard
from ghibli.app.parts import HANDLER, ONE_BY_ONE, UPLOAD_LIMIT, settings_column, sheets
from ghibli.app.private_folder import make_private_folder
from ghibli.app.session import AppSession
from ghibli.app.tabs import draw_tab, grid_tab, history_tab, restyle_tab
from ghibli.app.training_tab import keep_advancing, training_tab
from ghibli.runs.queue import Queue
from ghibli.runtime.errors import UserError

ATTEMPTS = 10  # at a free port, which another program may take first
QUEUE_LIMIT = 16  # waiting requests; further ones are refused
UPLOAD_CLEANUP = (600, 3600)  # seconds: between two checks for old uploads, age at which one is deleted
ABOUT = "Base and trained model start from the same noise, so the difference is what was learned."
STYLE = """
.gradio-container {max-width: 1200px !important; margin: auto}
.sheets img {object-fit: contain !important; height: auto !important; max-height: none !important}
.sheets .grid-wrap {max-height: none !important; height: auto !important}
@media (max-width: 700px) {#settings {order: 2} #work {order: 1}}
.drawn img {width: 100% !important; height: 100% !important; object-fit: contain !important}
#run {--c0: #1b62a5; --c1: #b4501a; --line: #dcd8ce}
.dark #run {--c0: #74b3ee; --c1: #ef9a63; --line: #363a3e}
#run pre {white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; line-height: 1.5}
#run .figures {display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr))}
#run figcaption {font-weight: 600}
#run .legend span {margin-right: 1rem; font-size: .85rem}
#run .c0 {color: var(--c0)} #run .c1 {color: var(--c1)}
#run svg * {color: inherit}
#run svg.chart {width: 100%; height: auto}
#run svg text {fill: currentColor; font-size: 12px}
#run svg .grid, #run svg .tick {stroke: var(--line)}
#run svg .zero {stroke: currentColor}
#run svg .line {fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round}
#run svg .band {fill: currentColor; opacity: .18}
#run svg circle {fill: currentColor}
#findings .error {color: #b3261e; font-weight: 600} #findings .warning {color: #9a6700}
.dark #findings .error {color: #ff8a80} .dark #findings .warning {color: #e3b341}
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def page(session: AppSession, queue: Queue | None) -> gr.Blocks:
    """Build the page.

    Args:
        queue: that runs are put into; None where it may start none.
    """
    drawing = Drawing(session)
    with gr.Blocks(title="Ghibli LoRA Lab", delete_cache=UPLOAD_CLEANUP) as blocks:
        gr.Markdown(f"# Ghibli LoRA Lab\n{ABOUT}")
        with gr.Tabs():
            with gr.Tab("Images"), gr.Row():
                with gr.Column(scale=2, min_width=240, elem_id="settings"):
                    settings = settings_column(session)
                    suggested = gr.State(settings.guidance.value)
                with gr.Column(scale=3, min_width=240, elem_id="work"):
                    cancel = gr.Button("Cancel", size="sm", elem_id="cancel")
                    with gr.Tabs():
                        drawn, first = draw_tab(drawing, settings)
                        restyled = restyle_tab(session, settings)
                        varied = grid_tab(drawing, settings, first)
                        history_tab(session, drawing, settings, first)
                        with gr.Tab("Sample grids"):
                            gallery = sheets("sample grids of the runs", "grids")
            training_tab(blocks, queue)
        runs, now = settings.runs, [settings.runs, settings.guidance, suggested]
        updated = [settings.guidance, suggested, settings.safe, gallery]
        changed = drawing.on_runs_changed
        runs.change(changed, now, updated, show_progress="hidden", **HANDLER, **ONE_BY_ONE)
        cancel.click(session.stop, cancels=[drawn, restyled, varied], queue=False, **HANDLER)
        loaded = blocks.load(
            lambda: gr.update(choices=session.run_choices()), None, runs, show_progress="hidden", **HANDLER
        )
        loaded.then(changed, now, updated, show_progress="hidden", **HANDLER, **ONE_BY_ONE)
        blocks.unload(session.leave)
    return blocks.queue(max_size=QUEUE_LIMIT, default_concurrency_limit=4, api_open=False)


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
    host, found = find_address(host, port)
    fetch_no_url()
    folder = make_private_folder()
    gr.routes.DEFAULT_TEMP_DIR = str(folder)  # set at gradio's import; the server makes a folder in it
    is_private = is_loopback(host)
    queue = Queue() if is_private else None
    blocks = page(AppSession(overrides, is_private), queue)
    guard = Middleware(Guard, host=host, folder=folder, is_private=is_private)
    for further in reversed(range(1 if port else ATTEMPTS)):
        try:
            address = listen(blocks, guard, host, found)
            break
        except OSError as error:  # another program took the port while the page was built
            if not further:
                raise UserError(f"--port {found} on {host} cannot be used: {error}") from error
            host, found = find_address(host, None)
    if queue is not None:
        words = (queue, lambda: blocks.is_running)
        threading.Thread(target=keep_advancing, args=words, name="queue", daemon=True).start()
    return blocks, f"http://localhost:{found}/" if is_wildcard(host) else address


def listen(blocks: gr.Blocks, guard: Middleware, host: str, port: int) -> str:
    """Serve a page in the background; return its address.

    Raises:
        OSError: the port is taken.
    """
    with without_proxies(host):
        _, address, _ = blocks.launch(
            server_name=in_url(host), server_port=port, max_file_size=UPLOAD_LIMIT, share=False,
            quiet=True,  # its line with the address, which the command prints
            prevent_thread_lock=True, show_error=False, footer_links=[], css=STYLE, ssr_mode=False,
            theme=THEME, app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    return str(address)


def fetch_no_url() -> None:
    """Have gradio refuse a file that is named by a URL, in this process.

    It would download it for whichever component is sent one, past the limits of guard.py.
    """
    for name in ("async_ssrf_protected_download", "async_ssrf_protected_get"):
        setattr(processing_utils, name, refuse_url)


async def refuse_url(*_: Any, **__: Any) -> NoReturn:
    """Raise an error that gradio shows on the page."""
    raise gr.Error("a URL is no file: save it and choose the file", print_exception=False)
