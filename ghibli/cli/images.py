"""`ghibli generate`, `restyle` and `app`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghibli.cli.options import Guidance, Negative, Sampler, Scale, Seed, Sources, Steps, app
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, stop_at_once

if TYPE_CHECKING:  # torch takes seconds to load
    from ghibli.inference.generate import ImageRequest
    from ghibli.inference.load import LoadedModel


@app.command("generate")
def generate_command(
    sources: Sources = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="can be repeated")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file with a prompt per line")] = None,
    sampler: Sampler = "ddim",
    guidance: Guidance = None,
    steps: Steps = 30,
    seed: Seed = 0,
    size: Annotated[
        str | None, typer.Option(help="px, or WIDTHxHEIGHT; by default that of the training")
    ] = None,
    negative: Negative = "",
    batch: Annotated[int, typer.Option(help="images generated together", min=1)] = 4,
    scale: Scale = 1.0,
    base: Annotated[bool, typer.Option("--base", help="also write a sheet with the base above")] = False,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="also write a sheet of adapter scales")
    ] = False,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/generated"),
) -> None:
    """Generate images from prompts with a run, adapter files or the base, as PNG files with all settings."""
    with stop_at_once():
        from ghibli.inference import generate

    lines = [*(prompt or []), *(generate.read_prompts(prompts) if prompts else [])]
    if not lines:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    model = load_sources(sources)
    if interpolate and not model.weights:
        raise UserError("--interpolate varies the scale of an adapter, and no adapter is loaded")
    request = generate.ImageRequest(
        lines, sampler, model.guidance if guidance is None else guidance, steps, seed,
        generate.parse_size(size or str(model.config.model.resolution)), negative, batch, scale,
    )  # fmt: skip
    write_generated(model, request, folder, base=base, interpolate=interpolate)


def write_generated(
    model: "LoadedModel", request: "ImageRequest", folder: Path, *, base: bool, interpolate: bool
) -> None:
    """Generate the images and sheets, write them into a folder and print their paths."""
    from ghibli.inference import generate

    print_warnings(generate.truncation_warnings(request.prompts, model.base))
    images = generate.generate_images(model, request)
    files = generate.write_images(images, request, model, folder)
    more = f" ... {files[-1].name}" if len(files) > 1 else ""
    console.print(f"images   {files[0]}{more}, guidance {request.guidance:g}")
    if base:
        file = folder / "beside_base.png"
        generate.write_png(file, generate.base_comparison_sheet(model, request, images))
        console.print(f"sheet    {file}")
    if interpolate:
        file = folder / "adapter_scales.png"
        generate.write_png(file, generate.adapter_scale_sheet(model, request))
        console.print(f"sheet    {file}")


def print_warnings(warnings: list[str]) -> None:
    """Print each warning on a line of its own."""
    for warning in warnings:
        console.print(warning, style="yellow", markup=False)


@app.command("restyle")
def restyle_command(
    photos: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    sources: Annotated[
        list[str] | None, typer.Option("--with", help="run or adapter file, as for generate")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="what the photos show; by default their captions")
    ] = None,
    strength: Annotated[float, typer.Option(help="0 = the photo, 1 = all new", min=0.05, max=1)] = 0.5,
    sampler: Sampler = "ddim",
    guidance: Guidance = None,
    steps: Steps = 30,
    seed: Seed = 0,
    negative: Negative = "",
    scale: Scale = 1.0,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/restyled"),
) -> None:
    """Redraw photos in the trained style: a PNG file for each, and a sheet of before and after."""
    with stop_at_once():
        from ghibli.images import grid
        from ghibli.inference import generate, restyle

    model = load_sources(sources)
    options = restyle.RestyleOptions(
        strength, sampler, model.guidance if guidance is None else guidance, steps, seed, negative, scale,
        model.config.model.resolution,
    )  # fmt: skip
    found = restyle.find_photos(photos, prompt, model.config.data.style)
    print_warnings(generate.truncation_warnings(dict.fromkeys(p.prompt for p in found), model.base))
    written, pairs = restyle.restyle_all(model, found, options, folder)
    generate.write_png(folder / restyle.SHEET, grid.before_after_sheet(pairs))
    console.print(f"restyled {written} of {len(found)} into {folder}; sheet {folder / restyle.SHEET}")


@app.command("app")
def app_command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py, for the base")
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; 0.0.0.0 = reachable from other machines")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="by default the first free one from 7860")] = None,
) -> None:
    """Open a page in the browser to generate and restyle with a run, the base beside it, until Ctrl-C."""
    with stop_at_once():
        try:
            from ghibli.inference.app.page import serve
        except ImportError as error:
            raise UserError(f"the page needs gradio: pip install -e '.[app]' ({error})") from error
    with console.status("loading"):
        page, address = serve(overrides or [], host, port)
    console.print(f"page     {address}   stop with Ctrl-C")
    if host != "127.0.0.1":
        console.print(f"there is no password: anyone who can reach {host} can use it", style="yellow")
    page.block_thread()


def load_sources(sources: list[str] | None) -> "LoadedModel":
    """Load what was named; by default the newest finished run, or the base if there is none."""
    from ghibli.inference.load import load_model
    from ghibli.runs.find import finished_run

    overrides = [w for w in sources or [] if re.match(r"[a-z_.]+=", w) and not Path(w).exists()]
    named = [word for word in sources or [] if word not in overrides]
    if not named and not overrides:
        try:
            named = [str(finished_run("latest").path)]
            console.print(f"with     {named[0]}")
        except UserError:
            console.print("no finished run below outputs/ yet: generating with the base", style="yellow")
    return load_model(named, overrides)
