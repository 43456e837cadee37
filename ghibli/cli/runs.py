"""`ghibli list`, `evaluate`, `compare` and `report`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ghibli.cli.options import app
from ghibli.config.registry import sampler_label
from ghibli.config.schema import CONFIG_VERSION
from ghibli.runs import compare
from ghibli.runs.find import all_runs
from ghibli.runs.folder import RunDir
from ghibli.runs.identity import age_of
from ghibli.runtime.console import console, full_width
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import exists
from ghibli.runtime.terminal import one_line


@app.command("list")
def list_command() -> None:
    """Show every run below outputs/ with its state, settings and gain."""
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
def evaluate_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN... [KEY=VALUE...]", help="run folders, settings")
    ],
) -> None:
    """Sample finished runs and their base in every cell and measure the distance to real images."""
    folders = [word for word in arguments if "=" not in word or exists(word)]  # trial names contain =
    runs = [RunDir(Path(folder)) for folder in folders]
    if not runs:
        raise UserError("which run? ghibli evaluate RUN... (`ghibli list` shows them)")
    from ghibli.config.files import CHANGED_BY_EVALUATE, apply_overrides
    from ghibli.runs.compose import cache_of_this_machine
    from ghibli.runs.find import finished_config
    from ghibli.runs.here import on_this_machine

    settings = [word for word in arguments if word not in folders]
    configs = []
    for stored in [finished_config(run) for run in runs]:
        usual = replace(stored, cache_dir=cache_of_this_machine())
        cache = apply_overrides(usual, settings, CHANGED_BY_EVALUATE).cache_dir
        configs.append(apply_overrides(on_this_machine(stored, cache), settings, CHANGED_BY_EVALUATE))
    from ghibli.evaluation import evaluate as evaluate_module  # torch takes seconds to load
    from ghibli.training import wandb_logger

    for run in runs:
        run.refuse_links()
    for run, config in zip(runs, configs, strict=True):
        result = evaluate_module.evaluate(run, config)
        console.print(evaluation_table(run, result))
        for finding in result["findings"]:
            console.print(f"{finding['name']}: {finding['text']}", style="yellow")
        console.print(f"numbers {run.evaluation}, images {run.evaluation_images}\n")
        wandb_logger.log_evaluation(config, run, result)


def evaluation_table(run: RunDir, result: dict[str, Any]) -> Table:
    """Build the table of the reference study for one run: a row per model and cell."""
    from ghibli.evaluation.evaluate import steps_text
    from ghibli.evaluation.features import distance_names

    kernel, frechet = distance_names(result["features"])
    counts = f"{result['samples']} samples, {steps_text(result)}, {result['reference_images']} real images"
    table = Table(title=f"{run.path}: {counts}", box=None, pad_edge=False, title_justify="left")
    for name in ("model", "cell", kernel, "below base", frechet, "captions", "precision", "recall"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("model", "cell") else "right")
    for model, rows in result["models"].items():
        for row in rows:
            cell = f"{sampler_label(row['sampler'])} {row['guidance']:g}"
            table.add_row(model, cell, *evaluation_cells(row))
    table.add_row("real", f"floor of {result['floor_images']}", *evaluation_cells(result["real"]))
    return full_width(table)


def evaluation_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format kernel distance, paired difference, Frechet distance, caption fit, precision and recall."""

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
    """Format a run as the cells of a row of `ghibli list`."""
    status = run.status.read()
    gain, error = status.get("gain"), status.get("gain_se")
    gain_text = "-"
    if isinstance(gain, int | float) and isinstance(error, int | float):
        gain_text = f"{100 * gain:.1f} % +- {100 * error:.1f} %"
    epochs = str(status.get("epoch", "-"))
    settings = "damaged" if run.status.is_damaged else settings_of(run, status)
    return tuple(map(one_line, (run.path, run.status.state, settings, epochs, gain_text)))


def settings_of(run: RunDir, status: dict[str, Any]) -> str:
    """Return the summary of a run's settings, and whether another version of this code made it."""
    text, version = str(status.get("settings", "?")), status.get("config_version", CONFIG_VERSION)
    return text if version == CONFIG_VERSION else f"{text} (made by {age_of(version)} version)"


@app.command("compare")
def compare_command(
    one: Annotated[str, typer.Argument(help="a run folder")],
    other: Annotated[str, typer.Argument(help="another one")],
) -> None:
    """Show how two runs differ, and whether that explains their results."""
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
def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_OR_STUDY...", help="run or study folders")],
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: report.html in the first folder")
    ] = None,
) -> None:
    """Write one HTML page about runs or a study: verdict, curves, images, tables; it needs no network."""
    from ghibli.report import page  # torch takes seconds to load

    file = page.write(folders, out)
    console.print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB): one page, for any browser")
