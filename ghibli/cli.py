"""The `ghibli` command line: a thin frame, one verb a function."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ghibli import cli_use, compare, scenes
from ghibli.mistakes import UserMistake, one_line_mistakes, stop_at_once
from ghibli.progress import console, counted, whole
from ghibli.run_dir import RunDir, all_runs

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="What comes around and after a training run."
)


demo = typer.Typer(no_args_is_help=True, help="The embedded demo.")
app.add_typer(demo, name="demo")
app.add_typer(cli_use.use)


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
    caption: Annotated[str | None, typer.Option(help="of pictures that have none")] = None,
    into: Annotated[Path, typer.Option(help="where zip and parquet files are unpacked")] = Path("data"),
) -> None:
    """Gets the base and your pictures, looks at both, and makes them what train.py takes here."""
    with stop_at_once():
        from ghibli import preflight, prepare
        from ghibli.config import conf_folder

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
    folder: Annotated[Path, typer.Argument(help="a picture folder of any layout")],
    model: Annotated[
        str, typer.Option(help="BLIP: a hub id or a folder")
    ] = "Salesforce/blip-image-captioning-base",
    batch_size: Annotated[int, typer.Option(help="pictures captioned together", min=1)] = 8,
) -> None:
    """Writes captions by BLIP for the pictures that have none; hand-made ones stay. It may be stopped."""
    with stop_at_once():
        from ghibli import blip
        from ghibli.captions import summarise

    with counted("captioning") as on_progress:
        done = blip.caption_folder(folder, blip.blip(model), batch_size=batch_size, on_progress=on_progress)
    if done.skipped:
        console.print(f"pictures: {summarise(done.skipped, elsewhere='')}", style="yellow")
    if done.written:
        console.print(f"{len(done.written)} captions written to {done.table}; {done.had_one} were there")
        for name, words in list(done.written.items())[:5]:
            console.print(f"  {name}: {words}", markup=False)
    elif not done.skipped:
        console.print(f"every picture has a caption: {done.had_one} in {folder}")


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


@app.command("evaluate")
def evaluate(
    words: Annotated[
        list[str], typer.Argument(metavar="RUN... [KEY=VALUE...]", help="run folders, settings")
    ],
) -> None:
    """Samples finished runs and their base in every cell and measures the distance to real pictures."""
    folders = [word for word in words if "=" not in word or Path(word).is_dir()]  # trials have names with =
    runs = [RunDir(Path(word)) for word in folders]
    if not runs:
        raise UserMistake("which run? ghibli evaluate RUN... (`ghibli list` shows them)")
    from ghibli import dashboard, evaluation, trained  # torch takes seconds to load
    from ghibli.config import changed

    settings = [word for word in words if word not in folders]
    configs = [changed(trained.config_of(run), settings, evaluation.CHANGEABLE) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        result = evaluation.evaluate(run, config)
        console.print(evaluation_table(run, result))
        for finding in result["findings"]:
            console.print(f"{finding['name']}: {finding['text']}", style="yellow")
        console.print(f"numbers {run.evaluation}, pictures {run.evaluation_pictures}\n")
        dashboard.log_evaluation(config, run, result)


def evaluation_table(run: RunDir, result: dict[str, Any]) -> Table:
    """The slides' table of one run: a row for each model and cell."""
    from ghibli.features import called

    kernel, frechet = called(result["features"])
    counts = f"{result['samples']} samples, {result['reference_pictures']} real pictures"
    table = Table(title=f"{run.path}: {counts}", box=None, pad_edge=False, title_justify="left")
    for name in ("model", "cell", kernel, "below base", frechet, "captions", "precision", "recall"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("model", "cell") else "right")
    for model, rows in result["models"].items():
        for row in rows:
            cell = f"{row['sampler'].upper()} {row['guidance']:g}"
            table.add_row(model, cell, *evaluation_cells(row))
    table.add_row("real", f"floor of {result['floor_pictures']}", *evaluation_cells(result["real"]))
    return whole(table)


def evaluation_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Kernel distance, paired difference, Frechet distance, caption fit, precision and recall as text."""

    def with_error(pair: list[float] | None, digits: int) -> str:
        return "-" if pair is None else f"{pair[0]:.{digits}f} +- {pair[1]:.{digits}f}"

    difference = row.get("kernel_minus_base")
    return (
        with_error(row["kernel"], 2),
        with_error(difference and [-difference[0], difference[1]], 2),
        f"{row['frechet']:.1f}",
        with_error(row["caption_fit"], 1),
        f"{100 * row['precision']:.0f} %",
        f"{100 * row['recall']:.0f} %",
    )


def row_of(run: RunDir) -> tuple[str, ...]:
    """One run as the cells of the table."""
    status = run.read_status()
    gain, error = status.get("gain"), status.get("gain_se")
    words = "-" if gain is None or error is None else f"{100 * gain:.1f} % +- {100 * error:.1f} %"
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


@app.command("report")
def report_page(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_OR_STUDY...", help="run or study folders")],
    out: Annotated[Path | None, typer.Option(help="the file; else report.html in the first folder")] = None,
) -> None:
    """Writes one HTML page about runs or a study: verdict, curves, pictures, tables; it needs no network."""
    from ghibli import report  # torch takes seconds to load

    file = report.write(folders, out)
    console.print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB): one page, for any browser")


def main() -> None:
    """The console script; a user's mistake ends it with one line."""
    one_line_mistakes(app)
