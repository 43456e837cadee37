"""The `ghibli` command line: a thin frame, one verb a function."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ghibli import compare, scenes
from ghibli.mistakes import UserMistake, one_line_mistakes
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


@app.command("compare")
def compare_runs(
    one: Annotated[str, typer.Argument(help="a run folder")],
    other: Annotated[str, typer.Argument(help="another one")],
) -> None:
    """Says in what two runs differ, and whether that explains their results."""
    sides = [compare.read_side(folder) for folder in (one, other)]
    differing, results, verdict = compare.compare(*sides)
    for name, rows in (("differs", differing), ("result", results)):
        if rows:
            table = Table(name, one, other, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*row)
            console.print(table, "")
    console.print(verdict)


def main() -> None:
    """The console script; a user's mistake ends it with one line."""
    one_line_mistakes(app)
