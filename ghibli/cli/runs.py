"""`ghibli list`, `watch`, `rm`, `clean`, `evaluate`, `compare` and `report`."""

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ghibli.cli.options import app, loading
from ghibli.config.checks import require_finite
from ghibli.config.registry import sampler_label
from ghibli.runs import cleaning, listing, monitor, removal
from ghibli.runs.find import OUTPUTS, finished_run, folders_with, require_there, run_named
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here, list_hint
from ghibli.runtime.console import console, full_width
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import exists
from ghibli.runtime.terminal import one_line

WATCH_STYLES = {"doctor": "yellow", "reason": "red", "gain": "bold"}  # first word of a line -> its colour
FEWEST = 100  # samples of a cell below which precision and recall say nothing
LEGEND = (
    "cell: sampler and guidance. Distances to real images: lower is better, and the floor is what other real "
    "images have. below base: by how much, +- one standard error. layout: the same distance by where things "
    "are in the image, which the first does not see. captions: how well an image fits its prompt, higher is "
    f"better. precision and recall: shown from {FEWEST} samples on. See docs/evaluation.md"
)


@app.command("list")
def list_command(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]...", help="only rows in which every word occurs")
    ] = None,
    sort: Annotated[str, typer.Option(help=" or ".join(listing.SORTS))] = listing.SORTS[0],
    last: Annotated[int | None, typer.Option(help="only the last so many", min=1)] = None,
) -> None:
    """Show the runs below outputs/ with their state, settings and gain over their base."""
    every = listing.listed(map(RunDir, folders_with("status.json", OUTPUTS)))
    if not every:
        console.print(f"no runs below {OUTPUTS}/ yet: {command_here('python', 'train.py')} makes one")
        return
    rows = listing.chosen(every, words or [], sort, last)
    if not rows:
        wanted = " and ".join(words or [])
        console.print(f"none of the {len(every)} runs below outputs/ has {wanted} in its row")
        return
    groups = listing.by_base(rows)
    width = console.width if console.is_terminal else None
    for label, own in groups.items():
        console.print(one_line(label), style="bold")
        for line in listing.lines(own, width):
            console.print(line)
    if len(groups) > 1:
        console.print("gains compare with each other over one base and one set of images only")


@app.command("watch")
def watch_command(
    folder: Annotated[
        str, typer.Argument(metavar="[RUN_OR_STUDY]", help="by default the newest run")
    ] = "latest",
    every: Annotated[float, typer.Option(help="seconds between two looks at the files", min=0.2)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print it once and stop")] = False,
) -> None:
    """Watch a run or a study from another terminal: gain, loss, doctor, time left; it reads files only."""
    require_finite("--every", every)
    path = run_named(folder).path

    def current_view(height: int | None) -> Text:
        return coloured(monitor.view(path, console.width, monitor.utc_now(), height))

    if once or not console.is_terminal:
        console.print(current_view(None))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(current_view(console.height - 1), refresh=True)
            if monitor.is_over(path):
                return
            time.sleep(every)


def coloured(lines: list[str]) -> Text:
    """Colour what `ghibli watch` shows: findings and reasons, and the marks of the chart."""
    shown, style = Text(), ""
    for number, line in enumerate(lines):
        if not line.startswith(" "):  # else it belongs to the line above
            style = WATCH_STYLES.get(line.partition(" ")[0], "")
        text = Text(line, style)
        if monitor.CHART_ROW.fullmatch(line):
            text = Text(line)
            text.highlight_regex("o", "bold green")
            text.highlight_regex(r"\|", "green")
        shown.append("\n" if number else "").append_text(text)
    return shown


@app.command("rm")
def rm_command(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or latest")],
    really: Annotated[bool, typer.Option("--really", help="delete; without it, only list")] = False,
) -> None:
    """Delete runs: what a run wrote and nothing else; without --really only say what would go."""
    for run in [run_named(name) for name in names]:
        plan = removal.plan_removal(run)
        if really:
            removal.remove(plan)
        console.print(one_line(plan.summary(done=really)))
    if not really:
        console.print("nothing was deleted; --really deletes this")


@app.command("clean")
def clean_command(
    cache: Annotated[
        Path | None, typer.Argument(metavar="[CACHE]", help="by default cache_dir of conf/train.yaml")
    ] = None,
    older: Annotated[
        float | None, typer.Option(help="delete what was not used for so many days", min=0)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="delete the longest unused until so much is left, such as 2GB")
    ] = None,
    really: Annotated[bool, typer.Option("--really", help="delete; without it, only list")] = False,
) -> None:
    """Delete old entries of the cache (drawn images, latents, scores); runs and adapters stay."""
    from ghibli.runs.compose import cache_of_this_machine

    folder = cache or Path(cache_of_this_machine())
    found = cleaning.entries(folder)
    if older is None and keep is None:
        for line in cleaning.summaries(found) or [f"{folder} is empty"]:
            console.print(line)
        console.print("nothing was deleted; choose with --older DAYS or --keep SIZE")
        return
    going = cleaning.chosen(found, older, None if keep is None else cleaning.parse_size(keep), time.time())
    for line in cleaning.summaries(going):
        console.print(line)
    if really:
        cleaning.require_idle()
        cleaning.delete(going)
    size = sum(one.size for one in going) / 1e6
    verb = "deleted" if really else "would delete"
    console.print(one_line(f"{verb} {len(going)} of {len(found)} entries of {folder}, {size:.1f} MB"))
    if not really:
        console.print("nothing was deleted; --really deletes this")


@app.command("evaluate")
def evaluate_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN... [KEY=VALUE...]", help="run folders or latest, settings")
    ],
) -> None:
    """Sample finished runs and their base in every cell and measure the distance to real images."""
    folders = [word for word in arguments if "=" not in word or exists(word)]  # trial names contain =
    runs = [finished_run(folder) for folder in folders]
    if not runs:
        raise UserError(f"which run? ghibli evaluate RUN... {list_hint()}")
    from ghibli.config.files import CHANGED_BY_EVALUATE, apply_overrides
    from ghibli.runs.compose import cache_of_this_machine
    from ghibli.runs.here import on_this_machine
    from ghibli.runs.settings import finished_config

    settings = [word for word in arguments if word not in folders]
    configs = []
    for stored in [finished_config(run) for run in runs]:
        usual = replace(stored, cache_dir=cache_of_this_machine())
        cache = apply_overrides(usual, settings, CHANGED_BY_EVALUATE).cache_dir
        configs.append(apply_overrides(on_this_machine(stored, cache), settings, CHANGED_BY_EVALUATE))
    with loading():
        from ghibli.evaluation import evaluate as evaluate_module
        from ghibli.training.loggers.choice import log_evaluation

    for run in runs:
        run.refuse_links()
    for run, config in zip(runs, configs, strict=True):
        result = evaluate_module.evaluate(run, config)
        width = console.width if console.is_terminal else None
        for table in evaluation_tables(run, result, width):
            console.print(table)
        console.print(LEGEND)
        for finding in result["findings"]:
            console.print(one_line(f"{finding['name']}: {finding['text']}"), style="yellow")
        console.print(one_line(f"numbers {run.evaluation}, images {run.evaluation_images}"))
        console.print()
        log_evaluation(config, run, result)


def evaluation_tables(run: RunDir, result: dict[str, Any], width: int | None = None) -> list[Table]:
    """Build the table of the reference study for one run: a row per model and cell.

    Args:
        width: columns of the terminal, None = as many as needed. Where the table needs more, it is two.
    """
    from ghibli.evaluation.evaluate import steps_text
    from ghibli.evaluation.features import distance_names

    kernel, frechet = distance_names(result["features"])
    names = (kernel, "below base", "layout", frechet, "captions", "precision", "recall")
    counts = f"{result['samples']} samples, {steps_text(result)}, {result['reference_images']} real images"
    rows = [
        (
            model,
            f"{sampler_label(row['sampler'])} {row['guidance']:g}",
            evaluation_cells(row, result["samples"]),
        )
        for model, found in result["models"].items()
        for row in found
    ]
    floor = f"floor of {result['floor_images']}", evaluation_cells(result["real"], result["samples"])
    rows.append(("real", *floor))

    def table(part: slice, title: str | None = None) -> Table:
        made = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for name in ("model", "cell", *names[part]):
            made.add_column(name, no_wrap=True, justify="left" if name in ("model", "cell") else "right")
        for model, cell, values in rows:
            made.add_row(model, cell, *values[part])
        return full_width(made)

    title = one_line(f"{run.path}: {counts}")
    whole = table(slice(None), title)
    if width is None or whole.width is None or whole.width <= width:
        return [whole]
    return [table(slice(3), title), table(slice(3, None))]


def evaluation_cells(row: dict[str, Any], samples: int) -> tuple[str, ...]:
    """Format kernel distance, difference to the base, layout, Frechet distance, captions, precision, recall.

    Precision and recall of few samples say nothing and are left out.
    """

    def with_error(pair: list[float] | None, digits: int) -> str:
        return "-" if pair is None else f"{pair[0]:.{digits}f} +- {pair[1]:.{digits}f}"

    difference = row.get("kernel_minus_base")
    return (
        with_error(row["kernel"], 2),
        with_error(difference and [-difference[0], difference[1]], 2),
        with_error(row.get("layout"), 2),
        f"{row['frechet']:.1f}",
        with_error(row["caption_fit"], 1),
        f"{100 * row['precision']:.0f} %" if samples >= FEWEST else "-",
        f"{100 * row['recall']:.0f} %" if samples >= FEWEST else "-",
    )


@app.command("compare")
def compare_command(
    one: Annotated[str, typer.Argument(help="a run folder, or latest")],
    other: Annotated[str, typer.Argument(help="another one")],
) -> None:
    """Show how two runs differ, and whether that explains their results."""
    from ghibli.runs import compare

    one, other = (str(run_named(name).path) for name in (one, other))
    sides = [compare.read_side(folder) for folder in (one, other)]
    differing, results, verdict = compare.compare(*sides)
    for letter, name in zip("AB", (one, other), strict=True):
        console.print(one_line(f"{letter}        {name}"))
    for name, rows in (("differs", differing), ("result", results)):
        if rows:
            table = Table(box=None, pad_edge=False)
            for head in (name, "A", "B"):
                table.add_column(head, overflow="fold", no_wrap=head == name)
            for row in rows:
                table.add_row(*map(one_line, row))
            console.print("")
            console.print(table if console.is_terminal else full_width(table))
    console.print("")
    console.print(one_line(verdict))


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_STUDY...", help="run or study folders, or latest")
    ],
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: report.html in the first folder")
    ] = None,
) -> None:
    """Write one HTML page about runs or a study: verdict, curves, images, tables; it needs no network."""
    folders = [run_named(str(folder)).path if str(folder) == "latest" else folder for folder in folders]
    for folder in folders:
        require_there(folder)
    with loading():
        from ghibli.report import page

    file = page.write(folders, out)
    console.print(one_line(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB): one page, for any browser"))
