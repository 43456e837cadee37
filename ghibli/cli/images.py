"""`ghibli generate`, `restyle` and `app`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghibli.cli.options import (
    Guidance,
    Negative,
    Prompt,
    Prompts,
    Sampler,
    Scale,
    Seed,
    Sources,
    Steps,
    app,
    loading,
    prompt_lines,
    split_words,
)
from ghibli.inference.request import (
    CONTROLS,
    KNEES,
    Axis,
    ImageRequest,
    RestyleOptions,
    check_text,
    control_options,
    default_way,
    grid_requests,
    parse_axis,
    parse_size,
    unused_negative,
)
from ghibli.models.prompt_syntax import escaped
from ghibli.runtime.commands import install_command, quoted
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import require_target
from ghibli.runtime.terminal import one_line

if TYPE_CHECKING:  # torch takes seconds to load
    from ghibli.inference.load import LoadedModel
    from ghibli.inference.sources import FoundSources


@app.command("generate")
def generate_command(
    sources: Sources = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
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
    hires: Annotated[
        float, typer.Option(help="second pass at so many times the size, such as 2", show_default="off")
    ] = 1.0,
    hires_strength: Annotated[
        float | None, typer.Option(help="share of the steps of the second pass", show_default="0.5")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="also write a sheet with the base above")] = False,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="also write a sheet of adapter scales")
    ] = False,
    grid: Annotated[
        list[str] | None, typer.Option(help="SETTING=VALUE,VALUE: also write a sheet; twice for two settings")
    ] = None,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/generated"),
) -> None:
    """Generate images from prompts with a run, adapter files or the base, as PNG files with all settings."""
    lines = prompt_lines(prompt, prompts)
    if not lines:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    if hires_strength is not None and hires == 1:
        raise UserError("--hires-strength is that of a second pass: give --hires FACTOR too")
    request = ImageRequest(  # what is left to the model is filled in when that is loaded
        lines, sampler, 1.0 if guidance is None else guidance, steps, seed,
        parse_size(size or "512"), negative, batch, scale,
        hires, 0.5 if hires_strength is None else hires_strength,
    )  # fmt: skip
    axes = [parse_axis(text) for text in grid or []]
    if axes:
        grid_requests(request, axes)
    require_target(folder, "--to", len(lines) * 3 * request.final_size[0] * request.final_size[1])
    model = load(named_sources(sources))
    if interpolate and not model.weights:
        raise UserError("--interpolate varies the scale of an adapter, and no adapter is loaded")
    if base and not model.names:
        raise UserError("--base draws the base above what was trained, and nothing but the base is loaded")
    for factor in [scale, *(value for axis in axes if axis.name == "scale" for value in axis.values)]:
        model.at(factor)  # refuses what cannot be scaled, before anything is drawn
    side = model.config.model.resolution
    request = dataclasses.replace(
        request, guidance=model.guidance if guidance is None else guidance,
        size=request.size if size else (side, side),
    )  # fmt: skip
    write_generated(model, request, folder, base=base, interpolate=interpolate, axes=axes)


def write_generated(
    model: "LoadedModel",
    request: ImageRequest,
    folder: Path,
    *,
    base: bool,
    interpolate: bool,
    axes: list[Axis],
) -> None:
    """Generate the images and sheets, write each batch as it is done, and print their paths."""
    with loading():
        import torch

        from ghibli.inference import generate

    print_warnings(unused_negative(request.negative, request.guidance))
    images: list[torch.Tensor] = []
    files: list[Path] = []
    try:
        for batch in generate.generate_batches(model, request):
            files += generate.write_images(batch, request, model, folder, done=len(files))
            images += [batch] if base else []
    except BaseException:  # Ctrl-C, a full disk, an image that is not finite
        print_warnings(
            [f"{len(files)} of {len(request.prompts)} images are done and kept{span(files, ' as ')}"]
        )
        raise
    console.print(f"images   {span(files)}, guidance {request.guidance:g}")
    if base:
        sheet = generate.base_comparison_sheet(model, request, torch.cat(images))
        console.print(f"sheet    {quoted(str(generate.write_png(folder / 'beside_base.png', sheet)))}")
    if axes:
        sheet = generate.settings_grid(model, request, axes)
        console.print(f"sheet    {quoted(str(generate.write_png(folder / 'settings.png', sheet)))}")
    if interpolate:
        sheet = generate.adapter_scale_sheet(model, request)
        console.print(f"sheet    {quoted(str(generate.write_png(folder / 'adapter_scales.png', sheet)))}")


def span(files: list[Path], before: str = "") -> str:
    """Name the first and the last of some files, to be pasted into a shell; empty without files."""
    if not files:
        return ""
    more = f" ... {quoted(files[-1].name)}" if len(files) > 1 else ""
    return f"{before}{quoted(str(files[0]))}{more}"


def print_warnings(warnings: list[str]) -> None:
    """Print each warning on a line of its own."""
    for warning in warnings:
        console.print(one_line(warning), style="yellow")


@app.command("restyle")
def restyle_command(
    photos: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    sources: Annotated[
        list[str] | None, typer.Option("--with", help="run or adapter file, as for generate")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="what the photos show; by default their captions")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="0 = the photo, 1 = all new", min=0.05, max=1, show_default="0.65, of img2img 0.5"),
    ] = None,
    sampler: Sampler = "ddim",
    guidance: Guidance = None,
    steps: Steps = 30,
    seed: Seed = 0,
    negative: Negative = "",
    scale: Scale = 1.0,
    way: Annotated[
        str | None,
        typer.Option(
            help="inversion: from the photo's own noise; img2img: from random noise",
            show_default="inversion with ddim, else img2img",
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="image, white where to redraw; or a folder of them, named as photos")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="canny, depth, or a folder of control images, named as photos: keep the structure"),
    ] = None,
    control_model: Annotated[
        str | None, typer.Option(help="ControlNet for --control: its folder or hub id")
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option(help="factor on what the ControlNet adds", show_default="1")
    ] = None,
    depth_model: Annotated[
        str | None,
        typer.Option(
            help="for --control depth: folder or hub id",
            show_default="depth-anything/Depth-Anything-V2-Small-hf",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/restyled"),
) -> None:
    """Redraw photos in the trained style: a PNG file for each, and a sheet of before and after."""
    check_text(prompt or "")
    way = way or default_way(sampler)
    options = RestyleOptions(  # what is left to the model is filled in when that is loaded
        KNEES.get(way, 0.5) if strength is None else strength, sampler,
        1.0 if guidance is None else guidance, steps, seed, negative, scale, 512, way,
        control_options(control, control_model, control_scale, depth_model),
    )  # fmt: skip
    from ghibli.inference import photos as photo_files

    found = photo_files.with_masks(photo_files.find_photos(photos, prompt, ""), mask)
    if control is not None and control not in CONTROLS:
        found = photo_files.with_control_images(found, Path(control))
    require_target(folder, "--to", len(found) * 3 * options.resolution**2)
    named = named_sources(sources)
    with loading():
        from ghibli.images import grid
        from ghibli.inference import generate, restyle

    restyle.output_files([photo.path for photo in found], folder)
    model = load(named)
    model.at(scale)  # refuses what cannot be scaled, before anything is drawn
    options = dataclasses.replace(
        options, guidance=model.guidance if guidance is None else guidance,
        resolution=model.config.model.resolution,
    )  # fmt: skip
    style = escaped(model.config.data.style)
    found = [dataclasses.replace(photo, prompt=photo.prompt + style) for photo in found]
    print_warnings(unused_negative(negative, options.guidance))
    written, pairs = restyle.restyle_all(model, found, options, folder)
    sheet = generate.write_png(folder / restyle.SHEET, grid.before_after_sheet(pairs))
    console.print(
        f"restyled {written} of {len(found)} into {quoted(str(folder))}; sheet {quoted(str(sheet))}"
    )


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
    """Open a page in the browser to draw, restyle and train, with the base beside each run, until Ctrl-C."""
    from ghibli.app.address import find_address, is_loopback
    from ghibli.app.private_folder import ended_by_signals

    words = overrides or []
    require_settings(words)
    host, _ = find_address(host, port)
    with loading():
        try:
            from ghibli.app.page import serve
        except ImportError as error:
            raise UserError(f"the page needs gradio: {install_command('app')} ({error})") from error
    with ended_by_signals():
        with console.status("loading"):
            page, address = serve(words, host, port)
        console.print(f"page     {address}   stop with Ctrl-C")
        if not is_loopback(host):
            text = f"there is no password: anyone who can reach {host} can use it, but for training"
            console.print(text, style="yellow")
        page.block_thread()


def require_settings(words: list[str]) -> None:
    """Raise a UserError for a word that is not a setting of train.py, or names a base that is not there."""
    from ghibli.runs.compose import base_config

    for word in words:
        if "=" not in word:
            raise UserError(f"`{word}` is no setting: the page takes KEY=VALUE, and lists all runs itself")
    base_config(words)


def named_sources(sources: list[str] | None) -> "FoundSources":
    """Find what was named; by default the newest finished run, or the base if there is none."""
    from ghibli.inference.sources import find_sources
    from ghibli.runs.find import finished_run

    named, overrides = split_words(sources or [])
    if not named and not overrides:
        try:
            named = [str(finished_run("latest").path)]
            console.print(f"with     {quoted(named[0])}")
        except UserError:
            console.print("no finished run below outputs/ yet: generating with the base", style="yellow")
    return find_sources(named, overrides)


def load(found: "FoundSources") -> "LoadedModel":
    """Load what was named."""
    with loading():
        from ghibli.inference.load import load_found

    return load_found(found)
