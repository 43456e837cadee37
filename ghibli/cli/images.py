"""`ghibli generate`, `restyle` and `app`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ghibli.cli.options import Guidance, Negative, Sampler, Scale, Seed, Sources, Steps, app
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, stop_at_once


@app.command("generate")
def generate_command(
    sources: Sources = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="may be given again")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file, a prompt a line")] = None,
    sampler: Sampler = "ddim",
    guidance: Guidance = None,
    steps: Steps = 30,
    seed: Seed = 0,
    size: Annotated[str | None, typer.Option(help="px, or WIDTHxHEIGHT; none: that of the training")] = None,
    negative: Negative = "",
    batch: Annotated[int, typer.Option(help="images drawn together", min=1)] = 4,
    scale: Scale = 1.0,
    base: Annotated[bool, typer.Option("--base", help="also a sheet with the base above")] = False,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="also a sheet of adapter scales")
    ] = False,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/generated"),
) -> None:
    """Draws prompts with a run, adapter files or the base, as PNG files that carry their settings."""
    with stop_at_once():
        from ghibli.inference import generate

    lines = [*(prompt or []), *(generate.lines_of(prompts) if prompts else [])]
    if not lines:
        raise UserError("what shall it draw? --prompt TEXT, or --prompts FILE")
    loaded = load_sources(sources)
    if interpolate and not loaded.weights:
        raise UserError("--interpolate changes the scale of an adapter, and there is none here")
    side = str(loaded.config.model.resolution)
    request = generate.Request(
        lines, sampler, loaded.guidance if guidance is None else guidance, steps, seed,
        generate.size_of(size or side), negative, batch, scale,
    )  # fmt: skip
    for sentence in generate.lost_words(lines, loaded.base):
        console.print(sentence, style="yellow", markup=False)
    images = generate.draw(loaded, request)
    files = generate.write_images(images, request, loaded, folder)
    more = f" ... {files[-1].name}" if len(files) > 1 else ""
    console.print(f"drawn    {files[0]}{more}, guidance {request.guidance:g}")
    if base:
        generate.write_png(folder / "beside_base.png", generate.beside_base(loaded, request, images))
        console.print(f"sheet    {folder / 'beside_base.png'}")
    if interpolate:
        generate.write_png(folder / "adapter_scales.png", generate.strip(loaded, request))
        console.print(f"sheet    {folder / 'adapter_scales.png'}")


@app.command("restyle")
def restyle_command(
    photos: Annotated[list[Path], typer.Argument(help="images, or a folder of them")],
    source: Annotated[
        list[str] | None, typer.Option("--with", help="run or adapter file, as for generate")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="what is on them; none: their captions")] = None,
    strength: Annotated[float, typer.Option(help="0 = the photo, 1 = all new", min=0.05, max=1)] = 0.5,
    sampler: Sampler = "ddim",
    guidance: Guidance = None,
    steps: Steps = 30,
    seed: Seed = 0,
    negative: Negative = "",
    scale: Scale = 1.0,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/restyled"),
) -> None:
    """Redraws photos in the trained look: a PNG for each, and a sheet of before and after."""
    with stop_at_once():
        from ghibli.images import grid
        from ghibli.inference import generate, restyle

    loaded = load_sources(source)
    found = restyle.photos_of(photos, prompt, loaded.config.data.style)
    how = restyle.RestyleOptions(
        strength, sampler, loaded.guidance if guidance is None else guidance, steps, seed, negative, scale,
        loaded.config.model.resolution,
    )  # fmt: skip
    written, pairs = restyle.restyle_all(loaded, found, how, folder)
    generate.write_png(folder / restyle.SHEET, grid.before_after_sheet(pairs))
    console.print(f"restyled {written} of {len(found)} into {folder}; sheet {folder / restyle.SHEET}")


@app.command("app")
def app_command(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py: the base")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: also for other machines")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="none: the first free one from 7860")] = None,
) -> None:
    """Opens a page for the browser: draw with a run, its base beside it, restyle a photo. Ctrl-C ends it."""
    with stop_at_once():
        try:
            from ghibli.inference.app.page import serve
        except ImportError as error:
            raise UserError(f"the page needs gradio: pip install -e '.[app]' ({error})") from error
    with console.status("loading"):
        page, address = serve(words or [], host, port)
    console.print(f"page     {address}   Ctrl-C ends it")
    if host != "127.0.0.1":
        console.print(f"whoever reaches {host} may use it: there is no password", style="yellow")
    page.block_thread()


def load_sources(sources: list[str] | None) -> Any:
    """What was named; nothing: the newest finished run, or the base where there is none."""
    from ghibli.inference.load import load_model
    from ghibli.runs.find import finished_run

    words = [word for word in sources or [] if re.match(r"[a-z_.]+=", word) and not Path(word).exists()]
    named = [word for word in sources or [] if word not in words]
    if not named and not words:
        try:
            named = [str(finished_run("latest").path)]
            console.print(f"with     {named[0]}")
        except UserError:
            console.print("no run below outputs/ yet: this is what the base draws", style="yellow")
    return load_model(named, words)
