"""`ghibli demo`, `check`, `prepare`, `caption` and `convert`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from ghibli.cli.options import app, loading
from ghibli.runtime.commands import command_here, path_setting, quoted
from ghibli.runtime.console import console, counted
from ghibli.runtime.errors import UserError, require_folder
from ghibli.runtime.files import require_target
from ghibli.runtime.terminal import one_line
from ghibli.runtime.wording import number_of

demo = typer.Typer(no_args_is_help=True, help="The embedded demo.")
app.add_typer(demo, name="demo")
logger = logging.getLogger(__name__)


@demo.command("draw")
def draw_command(
    folder: Annotated[Path, typer.Argument(help="folder to fill; created if missing")],
    look: Annotated[str, typer.Option(help="drawn or photo")] = "drawn",
    count: Annotated[int, typer.Option(help="number of images", min=1)] = 1000,
    seed: Annotated[
        int, typer.Option(help="first scene; no training uses those from the default on", min=0)
    ] = 2_000_000,
    size: Annotated[int, typer.Option(help="side in px", min=32, max=1024)] = 128,
) -> None:
    """Draw images with captions into a folder that `data.root=` can read."""
    from ghibli.demo.scenes import canvas
    from ghibli.demo.scenes.scene import write_folder

    if look not in canvas.LOOKS:
        raise UserError(f"--look {look} is unknown: choose one of {', '.join(canvas.LOOKS)}")
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise UserError(f"{folder} is not an empty folder: choose another folder")
    require_target(folder, "FOLDER", 3 * count * size**2)
    with counted("drawing") as on_progress:
        write_folder(folder, look, count, seed, size=size, on_progress=on_progress)
    command = command_here("python", "train.py", "data=ghibli", path_setting("data.root", folder))
    console.print(f"{number_of(count, f'{look} image')} in {quoted(str(folder))}: {command}")


@app.command("check")
def check_command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="memory of a GPU, such as 8GB: say what fits on it, without having it")
    ] = None,
) -> None:
    """Check settings, base, images, memory and disk of a run before it starts; trains nothing."""
    from ghibli.runs.compose import check_overrides

    config, run, errors = check_overrides(overrides or [])
    for error in errors:  # known without torch, and at once
        logger.error(f"error: config: {error}")
    if config is None or run is None:
        raise typer.Exit(2)
    with loading():
        from ghibli.prepare import preflight

    found = preflight.check_run(config, run, card)
    preflight.log_findings(found)
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(2)


@app.command("prepare")
def prepare_command(
    base: Annotated[
        str, typer.Option(help="hub id, diffusers folder, one .safetensors file, or demo")
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    data: Annotated[
        str,
        typer.Option(
            help="folder, .zip or .parquet file, hub dataset, or kaggle: that of the reference study"
        ),
    ] = "kaggle",
    config: Annotated[
        str | None, typer.Option(help="for a single file: a folder with its configs and tokenizer")
    ] = None,
    caption: Annotated[str | None, typer.Option(help="for images that have none")] = None,
    into: Annotated[Path, typer.Option(help="where zip and parquet files are unpacked")] = Path("data"),
) -> None:
    """Fetch the base and your images, check both, and make them the defaults of train.py."""
    from ghibli.config.paths import check_base_path
    from ghibli.prepare.request import require_images
    from ghibli.runs.compose import conf_folder

    require_images(data)
    check_base_path(base)
    with loading():
        from ghibli.prepare import preflight, prepare

    local = conf_folder() / "local" / "default.yaml"
    found = prepare.prepare(base, config, data, caption, into, local.parent)
    preflight.log_findings(found)
    if any(finding.level == "error" for finding in found):
        console.print("nothing was saved: fix the errors and run this again", style="yellow")
        raise typer.Exit(2)
    console.print(f"saved    {local}; model=demo data=demo is the demo")
    console.print(f"next     {command_here('python', 'train.py')}")


@app.command("caption")
def caption_command(
    folder: Annotated[Path, typer.Argument(help="an image folder of any layout")],
    model: Annotated[
        str, typer.Option(help="BLIP: a hub id or a folder")
    ] = "Salesforce/blip-image-captioning-base",
    batch_size: Annotated[int, typer.Option(help="images captioned together", min=1)] = 8,
) -> None:
    """Caption the images that have no caption, with BLIP. Existing captions stay; Ctrl-C loses one batch."""
    require_folder("folder", folder)
    with loading():
        from ghibli.data.folder import summarise
        from ghibli.prepare import captioning

    with counted("captioning") as on_progress:
        result = captioning.caption_folder(
            folder, captioning.blip_loader(model), batch_size=batch_size, on_progress=on_progress
        )
    if result.skipped:
        console.print(one_line(f"images: {summarise(result.skipped, elsewhere='')}"), style="yellow")
    if result.written:
        existing = f"{result.already_captioned} already had one"
        console.print(
            one_line(f"{number_of(len(result.written), 'caption')} written to {result.table}; {existing}")
        )
        for name, caption in list(result.written.items())[:5]:
            console.print(one_line(f"  {name}: {caption}"))
    elif not result.skipped:
        console.print(one_line(f"every image has a caption: {result.already_captioned} in {folder}"))


@app.command("convert")
def convert_command(
    files: Annotated[list[Path], typer.Argument(help="weights as .bin, .ckpt, .pt or .pth")],
) -> None:
    """Write a .safetensors file beside each pickled weights file, without running code hidden in it."""
    from ghibli.models.convert import to_safetensors

    for file in files:
        console.print(one_line(f"wrote {to_safetensors(file)}"))
