"""`ghibli demo`, `check`, `prepare`, `caption` and `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ghibli.cli.options import app
from ghibli.demo.scenes import canvas
from ghibli.demo.scenes.scene import write_folder
from ghibli.runtime.console import console, counted
from ghibli.runtime.errors import UserError, stop_at_once

demo = typer.Typer(no_args_is_help=True, help="The embedded demo.")
app.add_typer(demo, name="demo")


@demo.command("draw")
def draw(
    folder: Annotated[Path, typer.Argument(help="folder to fill; made if missing")],
    look: Annotated[str, typer.Option(help="drawn or photo")] = "drawn",
    count: Annotated[int, typer.Option(help="number of images", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="first scene; the default is used by no training")] = 2_000_000,
    size: Annotated[int, typer.Option(help="side in px", min=32, max=1024)] = 128,
) -> None:
    """Draws images with captions into a folder that `data.root=` reads."""
    if look not in canvas.LOOKS:
        raise UserError(f"--look {look} is unknown: choose one of {', '.join(canvas.LOOKS)}")
    if (folder / "captions.txt").exists():
        raise UserError(f"{folder} holds captions.txt already: choose another folder")
    with counted("drawing") as on_progress:
        write_folder(folder, look, count, seed, size=size, on_progress=on_progress)
    console.print(f"{count} {look} images in {folder}: train.py data=ghibli data.root={folder}")


@app.command("check")
def check(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py")
    ] = None,
) -> None:
    """Looks at settings, base, images, memory and disk of a run before it starts; trains nothing."""
    with stop_at_once():
        from ghibli.prepare import preflight

    found = preflight.check(words or [])
    preflight.tell(found)
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(2)


@app.command("prepare")
def prepare_command(
    base: Annotated[
        str, typer.Option(help="hub id, diffusers folder, one .safetensors file, or demo")
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    data: Annotated[
        str, typer.Option(help="folder, .zip or .parquet file, hub data set, or kaggle: the slides' set")
    ] = "kaggle",
    config: Annotated[
        str | None, typer.Option(help="for one file: a folder with its configs and tokenizer")
    ] = None,
    caption: Annotated[str | None, typer.Option(help="of images that have none")] = None,
    into: Annotated[Path, typer.Option(help="where zip and parquet files are unpacked")] = Path("data"),
) -> None:
    """Gets the base and your images, looks at both, and makes them what train.py takes here."""
    with stop_at_once():
        from ghibli.prepare import preflight, prepare
        from ghibli.runs.compose import conf_folder

    found = prepare.prepare(base, config, data, caption, into, conf_folder() / "local")
    preflight.tell(found)
    if any(finding.level == "error" for finding in found):
        console.print("nothing was noted: put the errors right and run this again", style="yellow")
        raise typer.Exit(2)
    console.print(
        "noted in conf/local/default.yaml; next: python train.py   (model=demo data=demo is the demo)"
    )


@app.command("caption")
def caption_command(
    folder: Annotated[Path, typer.Argument(help="an image folder of any layout")],
    model: Annotated[
        str, typer.Option(help="BLIP: a hub id or a folder")
    ] = "Salesforce/blip-image-captioning-base",
    batch_size: Annotated[int, typer.Option(help="images captioned together", min=1)] = 8,
) -> None:
    """Writes captions by BLIP for the images that have none; hand-made ones stay. It may be stopped."""
    with stop_at_once():
        from ghibli.data.folder import summarise
        from ghibli.prepare import captioning

    with counted("captioning") as on_progress:
        done = captioning.caption_folder(
            folder, captioning.blip(model), batch_size=batch_size, on_progress=on_progress
        )
    if done.skipped:
        console.print(f"images: {summarise(done.skipped, elsewhere='')}", style="yellow")
    if done.written:
        console.print(f"{len(done.written)} captions written to {done.table}; {done.had_one} were there")
        for name, words in list(done.written.items())[:5]:
            console.print(f"  {name}: {words}", markup=False)
    elif not done.skipped:
        console.print(f"every image has a caption: {done.had_one} in {folder}")


@app.command("convert")
def convert(
    files: Annotated[list[Path], typer.Argument(help="weights as .bin, .ckpt, .pt or .pth")],
) -> None:
    """Writes a .safetensors file beside each pickled file of weights; runs no code hidden in them."""
    from ghibli.models.convert import to_safetensors

    for file in files:
        console.print(f"wrote {to_safetensors(file)}")
