"""`ghibli export`, `import` and `push`."""

from pathlib import Path
from typing import Annotated

import typer

from ghibli.cli.options import app
from ghibli.runtime.console import console
from ghibli.runtime.errors import stop_at_once


@app.command("export")
def export_command(
    run: Annotated[str, typer.Argument(help="a run folder, or latest")],
    folder: Annotated[Path | None, typer.Option("--to", help="folder to fill; by default RUN/export")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="also write a pipeline with the adapter merged in")
    ] = False,
) -> None:
    """Write a run's adapter for diffusers, ComfyUI and A1111, with a model card, and verify every file."""
    with stop_at_once():
        from ghibli.inference import export
        from ghibli.runs.find import finished_config, finished_run

    found = finished_run(run)
    target = folder or found.path / "export"
    for check in export.export(found, finished_config(found), target, merge=merge):
        console.print(f"{check.file}: {check.summary}")
    console.print(f"card     {target / 'README.md'}")


@app.command("push")
def push_command(
    run: Annotated[str, typer.Argument(help="a run folder that was exported, or latest")],
    hub_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="hub repository; created if missing")],
    really: Annotated[bool, typer.Option("--really", help="upload; without it, only list the files")] = False,
    public: Annotated[bool, typer.Option("--public", help="make a new repository public")] = False,
) -> None:
    """Upload adapter, card and grids of an exported run to the hub; without --really only list them."""
    with stop_at_once():
        from ghibli.inference import push
        from ghibli.runs.find import finished_run

    folder = finished_run(run).path / "export"
    for name, size in push.files_to_push(folder):
        console.print(f"{size / 2**20:8.2f} MiB  {name}", markup=False)
    if not really:
        console.print(f"nothing was sent; --really sends this to {hub_id}")
        return
    console.print(f"sent to {push.push(folder, hub_id, private=not public)}")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="an adapter file from elsewhere")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py, for the base")
    ] = None,
) -> None:
    """Describe an adapter file, check that it fits the base, and print the commands that use it."""
    with stop_at_once():
        from ghibli.adapters import apply, files
        from ghibli.adapters.describe import describe_adapter
        from ghibli.runs.compose import compose_config

    config = compose_config(overrides or [])
    base = apply.load_base(config.model)
    for line in describe_adapter(files.read_adapter(file, base, "import"), base, overrides or []):
        console.print(line, markup=False)
