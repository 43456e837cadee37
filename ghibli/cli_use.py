"""The part of the `ghibli` command line that uses what was trained: draw, restyle, export, share."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ghibli.mistakes import UserMistake, stop_at_once
from ghibli.progress import console

use = typer.Typer()
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN|FILE[:WEIGHT]]... [KEY=VALUE]...", help="none: the newest finished run, or the base"
    ),
]
Sampler = Annotated[str, typer.Option(help="ddim or ddpm")]
Guidance = Annotated[float | None, typer.Option(help="1 = off; none: what suits the training", min=0)]
Steps = Annotated[int, typer.Option(help="denoising steps")]
Seed = Annotated[int, typer.Option(help="picture i starts from the noise of seed + i")]
Negative = Annotated[str, typer.Option(help="what should not be seen; needs guidance")]
Scale = Annotated[float, typer.Option(help="of all adapters: 0 = the base, 1 = as trained")]


@use.command("export")
def export_command(
    run: Annotated[str, typer.Argument(help="a run folder, or latest")],
    folder: Annotated[Path | None, typer.Option("--to", help="folder to fill; RUN/export")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="also a whole pipeline, adapter merged in")] = False,
) -> None:
    """Writes a run's adapter for diffusers, ComfyUI and A1111, with a model card, and proves every file."""
    with stop_at_once():
        from ghibli import export, trained

    found = trained.finished_run(run)
    target = folder or found.path / "export"
    for proof in export.export(found, trained.config_of(found), target, merge=merge):
        console.print(f"{proof.file}: {proof.words}")
    console.print(f"card     {target / 'README.md'}")


@use.command("push")
def push_command(
    run: Annotated[str, typer.Argument(help="a run folder that `ghibli export` was used on, or latest")],
    hub_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="hub repository; made if missing")],
    really: Annotated[bool, typer.Option("--really", help="send; without it only say what would go")] = False,
    public: Annotated[bool, typer.Option("--public", help="for everybody to see, if it is new")] = False,
) -> None:
    """Sends adapter, card and grids of an exported run to the hub; says first what would go."""
    with stop_at_once():
        from ghibli import push, trained

    folder = trained.finished_run(run).path / "export"
    for name, size in push.files_of(folder):
        console.print(f"{size / 2**20:8.2f} MiB  {name}", markup=False)
    if not really:
        console.print(f"nothing was sent; to {hub_id} with --really")
        return
    console.print(f"sent to {push.push(folder, hub_id, private=not public)}")


@use.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="an adapter made elsewhere: diffusers' or kohya's layout")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py: the base")
    ] = None,
) -> None:
    """Says what an adapter file is, whether it fits the base, and how to train on from it or draw with it."""
    with stop_at_once():
        from ghibli import adapter_files, lora
        from ghibli.config import look_at

    config, _, mistakes = look_at(words or [])
    if config is None:
        raise UserMistake(mistakes[0])
    adapter = adapter_files.read_adapter(file, lora.load_base(config.model), "import")
    for line in adapter_files.described(adapter):
        console.print(line, markup=False)


@use.command("generate")
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
    batch: Annotated[int, typer.Option(help="pictures drawn together", min=1)] = 4,
    scale: Scale = 1.0,
    base: Annotated[bool, typer.Option("--base", help="also a sheet with the base above")] = False,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="also a sheet of adapter scales")
    ] = False,
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/generated"),
) -> None:
    """Draws prompts with a run, adapter files or the base, as PNG files that carry their settings."""
    with stop_at_once():
        from ghibli import generate

    lines = [*(prompt or []), *(generate.lines_of(prompts) if prompts else [])]
    if not lines:
        raise UserMistake("what shall it draw? --prompt TEXT, or --prompts FILE")
    dressed = dressed_of(sources)
    if interpolate and not dressed.weights:
        raise UserMistake("--interpolate changes the scale of an adapter, and there is none here")
    side = str(dressed.config.model.resolution)
    request = generate.Request(
        lines, sampler, dressed.guidance if guidance is None else guidance, steps, seed,
        generate.size_of(size or side), negative, batch, scale,
    )  # fmt: skip
    for sentence in generate.lost_words(lines, dressed.base):
        console.print(sentence, style="yellow", markup=False)
    pictures = generate.draw(dressed, request)
    files = generate.write_pictures(pictures, request, dressed, folder)
    more = f" ... {files[-1].name}" if len(files) > 1 else ""
    console.print(f"drawn    {files[0]}{more}, guidance {request.guidance:g}")
    if base:
        generate.write_png(folder / "beside_base.png", generate.beside_base(dressed, request, pictures))
        console.print(f"sheet    {folder / 'beside_base.png'}")
    if interpolate:
        generate.write_png(folder / "adapter_scales.png", generate.strip(dressed, request))
        console.print(f"sheet    {folder / 'adapter_scales.png'}")


@use.command("restyle")
def restyle_command(
    photos: Annotated[list[Path], typer.Argument(help="pictures, or a folder of them")],
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
        from ghibli import generate, restyle

    dressed = dressed_of(source)
    found = restyle.photos_of(photos, prompt, dressed.config.data.style)
    how = restyle.How(
        strength, sampler, dressed.guidance if guidance is None else guidance, steps, seed, negative, scale,
        dressed.config.model.resolution,
    )  # fmt: skip
    written, pairs = restyle.restyle_all(dressed, found, how, folder)
    generate.write_png(folder / restyle.SHEET, restyle.sheet(pairs))
    console.print(f"restyled {written} of {len(found)} into {folder}; sheet {folder / restyle.SHEET}")


@use.command("app")
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
            from ghibli import app
        except ImportError as error:
            raise UserMistake(f"the page needs gradio: pip install -e '.[app]' ({error})") from error
    with console.status("loading"):
        page, address = app.serve(words or [], host, port)
    console.print(f"page     {address}   Ctrl-C ends it")
    if host != "127.0.0.1":
        console.print(f"whoever reaches {host} may use it: there is no password", style="yellow")
    page.block_thread()


def dressed_of(sources: list[str] | None) -> Any:
    """What was named; nothing: the newest finished run, or the base where there is none."""
    from ghibli import trained, wardrobe

    words = [word for word in sources or [] if re.match(r"[a-z_.]+=", word) and not Path(word).exists()]
    named = [word for word in sources or [] if word not in words]
    if not named and not words:
        try:
            named = [str(trained.finished_run("latest").path)]
            console.print(f"with     {named[0]}")
        except UserMistake:
            console.print("no run below outputs/ yet: this is what the base draws", style="yellow")
    return wardrobe.dress(named, words)
