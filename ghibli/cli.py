"""The `ghibli` command line: a thin frame, one verb a function."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ghibli import scenes
from ghibli.mistakes import UserMistake, one_line_mistakes, stop_at_once
from ghibli.progress import console, counted
from ghibli.run_dir import RunDir, all_runs

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="What comes around and after a training run."
)


demo = typer.Typer(no_args_is_help=True, help="The embedded demo.")
app.add_typer(demo, name="demo")


@demo.command("draw")
def draw(
    folder: Annotated[Path, typer.Argument(help="folder to fill; made if missing")],
    look: Annotated[str, typer.Option(help="drawn or photo")] = "drawn",
    count: Annotated[int, typer.Option(help="number of pictures", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="first scene; the default is used by no training")] = 2_000_000,
    size: Annotated[int, typer.Option(help="side in px", min=32, max=1024)] = 128,
) -> None:
    """Draws pictures with captions into a folder that `data.root=` reads."""
    if look not in scenes.LOOKS:
        raise UserMistake(f"--look {look} is unknown: choose one of {', '.join(scenes.LOOKS)}")
    if (folder / "captions.txt").exists():
        raise UserMistake(f"{folder} holds captions.txt already: choose another folder")
    with counted("drawing") as on_progress:
        scenes.write_folder(folder, look, count, seed, size=size, on_progress=on_progress)
    console.print(f"{count} {look} pictures in {folder}: train.py data=ghibli data.root={folder}")


@app.command("check")
def check(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as for train.py")
    ] = None,
) -> None:
    """Looks at settings, base, pictures, memory and disk of a run before it starts; trains nothing."""
    with stop_at_once():
        from ghibli import preflight

    found = preflight.check(words or [])
    preflight.tell(found)
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(2)


@app.command("convert")
def convert(
    files: Annotated[list[Path], typer.Argument(help="weights as .bin, .ckpt, .pt or .pth")],
) -> None:
    """Writes a .safetensors file beside each pickled file of weights; runs no code hidden in them."""
    from ghibli.convert import to_safetensors

    for file in files:
        console.print(f"wrote {to_safetensors(file)}")


@app.command("list")
def list_runs() -> None:
    """Shows every run below outputs/ with its state, settings and gain."""
    runs = all_runs()
    if not runs:
        console.print("no runs below outputs/ yet: python train.py makes one")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "settings", "epochs", "gain over the base"):
        table.add_column(name, no_wrap=name == "run", overflow="fold")
    for run in runs:
        table.add_row(*row_of(run))
    console.print(table)


def row_of(run: RunDir) -> tuple[str, ...]:
    """One run as the cells of the table."""
    status = run.read_status()
    gain, error = status.get("gain"), status.get("gain_se")
    words = "-" if gain is None else f"{100 * gain:.1f} % +- {100 * error:.1f} %"
    epochs = str(status.get("epoch", "-"))
    return str(run.path), run.state, status.get("settings", "?"), epochs, words


def main() -> None:
    """The console script; a user's mistake ends it with one line."""
    one_line_mistakes(app)
