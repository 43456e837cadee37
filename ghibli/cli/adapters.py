"""`ghibli export`, `import` and `push`."""

from pathlib import Path
from typing import Annotated

import typer

from ghibli.adapters.files import Adapter, is_dora, written
from ghibli.cli.options import app
from ghibli.runtime.console import console
from ghibli.runtime.errors import stop_at_once


def described(adapter: Adapter) -> list[str]:
    """What a file is, in lines, the last two saying what takes it."""
    ranks, alphas = (", ".join(map(written, values)) for values in (adapter.ranks, adapter.alphas))
    what = "DoRA" if is_dora(adapter) else "LoRA"
    said = {
        key: adapter.metadata[key]
        for key in ("modelspec.title", "modelspec.trigger_phrase", "ss_sd_model_name", "ss_training_comment")
        if adapter.metadata.get(key)
    }
    return [
        f"layout   {adapter.layout}, {what} of {len(adapter.layers)} layers, rank {ranks}, alpha {alphas}",
        f"targets  {', '.join(adapter.targets)}{'; text encoder' if adapter.has_text_encoder else ''}",
        *(f"says     {key}: {value[:200]}" for key, value in said.items()),
        f"train on {train_on(adapter)}",
        f"draw     ghibli generate {adapter.file} --prompt TEXT",
    ]


def train_on(adapter: Adapter) -> str:
    """The command that goes on from a file, or why there is none."""
    if len(adapter.ranks) > 1 or len(adapter.alphas) > 1:
        return "cannot be done: its layers differ in rank or alpha"
    words = [
        f"lora.init={adapter.file}",
        f"lora.rank={adapter.ranks[0]}",
        f"lora.alpha={written(adapter.alphas[0])}",
        f"lora.targets=[{','.join(adapter.targets)}]",
        f"lora.text_encoder={str(adapter.has_text_encoder).lower()}",
        *(["lora.variant=dora"] if is_dora(adapter) else []),
    ]
    return f"python train.py {' '.join(words)}"


@app.command("export")
def export_command(
    run: Annotated[str, typer.Argument(help="a run folder, or latest")],
    folder: Annotated[Path | None, typer.Option("--to", help="folder to fill; RUN/export")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="also a whole pipeline, adapter merged in")] = False,
) -> None:
    """Writes a run's adapter for diffusers, ComfyUI and A1111, with a model card, and proves every file."""
    with stop_at_once():
        from ghibli.inference import export
        from ghibli.runs.find import finished_config, finished_run

    found = finished_run(run)
    target = folder or found.path / "export"
    for proof in export.export(found, finished_config(found), target, merge=merge):
        console.print(f"{proof.file}: {proof.words}")
    console.print(f"card     {target / 'README.md'}")


@app.command("push")
def push_command(
    run: Annotated[str, typer.Argument(help="a run folder that `ghibli export` was used on, or latest")],
    hub_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="hub repository; made if missing")],
    really: Annotated[bool, typer.Option("--really", help="send; without it only say what would go")] = False,
    public: Annotated[bool, typer.Option("--public", help="for everybody to see, if it is new")] = False,
) -> None:
    """Sends adapter, card and grids of an exported run to the hub; says first what would go."""
    with stop_at_once():
        from ghibli.inference import push
        from ghibli.runs.find import finished_run

    folder = finished_run(run).path / "export"
    for name, size in push.files_of(folder):
        console.print(f"{size / 2**20:8.2f} MiB  {name}", markup=False)
    if not really:
        console.print(f"nothing was sent; to {hub_id} with --really")
        return
    console.print(f"sent to {push.push(folder, hub_id, private=not public)}")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="an adapter made elsewhere: diffusers' or kohya's layout")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py: the base")
    ] = None,
) -> None:
    """Says what an adapter file is, whether it fits the base, and how to train on from it or draw with it."""
    with stop_at_once():
        from ghibli.adapters import apply, files
        from ghibli.runs.compose import compose_config

    config = compose_config(words or [])
    adapter = files.read_adapter(file, apply.load_base(config.model), "import")
    for line in described(adapter):
        console.print(line, markup=False)
