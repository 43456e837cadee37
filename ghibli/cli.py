"""The `ghibli` command line: a thin frame, one verb a function."""

import typer
from rich.table import Table

from ghibli.mistakes import one_line_mistakes
from ghibli.progress import console
from ghibli.run_dir import RunDir, all_runs

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="What comes around and after a training run."
)


@app.callback()
def frame() -> None:
    """Keeps `ghibli VERB` the form even while there is one verb."""


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
