"""`ghibli influence`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ghibli.cli.options import app, loading
from ghibli.config.checks import require_finite, share
from ghibli.runtime.commands import path_setting, quoted
from ghibli.runtime.console import console, full_width, relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.terminal import one_line
from ghibli.runtime.wording import number_of

if TYPE_CHECKING:
    from ghibli.evaluation.influence import Influences

ROWS = 5  # images of each kind in the terminal's table; influence.csv has all


@app.command("influence")
def influence_command(
    run: Annotated[str, typer.Argument(help="a finished LoRA run, or latest")],
    items: Annotated[
        int | None,
        typer.Option(help="(timestep, noise) items of an image", min=1, show_default="those of the probe"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="begin no further image after so many; the same command goes on", min=0,
            show_default="no limit",
        ),
    ] = None,
    exclude: Annotated[
        str, typer.Option("--exclude", help="share of the images, the worst, that the list names")
    ] = "10%",
) -> None:  # fmt: skip
    """Rank a run's training images by what each did to its gain."""
    from ghibli.runs.compose import cache_of_this_machine
    from ghibli.runs.find import finished_run
    from ghibli.runs.here import on_this_machine
    from ghibli.runs.settings import finished_config

    worst = share("--exclude", exclude)
    if minutes is not None:
        require_finite("--minutes", minutes)
    found = finished_run(run)
    config = finished_config(found)
    if config.finetune != "lora":
        what = "trained all weights" if config.finetune == "full" else "only measured the base"
        raise UserError(
            f"{found.path} {what} (finetune={config.finetune}): influence is measured by the gradients of an "
            "adapter"
        )
    found.refuse_links()
    with loading():
        from ghibli.inference.influence import InfluenceOptions, influence

    here = on_this_machine(config, cache_of_this_machine())
    result = influence(found, here, InfluenceOptions(items, minutes, worst))
    for table in influence_tables(result):
        console.print(table)
        console.print("")
    for line in closing_lines(result, worst, relative_path(found.path)):
        console.print(one_line(line))


def influence_tables(found: "Influences") -> Iterator[Table]:
    """Build a table of the images at each end of the rankings."""
    for title, images in found.ends(ROWS).items():
        table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for name in ("influence", "agreement"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("image", "caption"):
            table.add_column(name, overflow="fold")
        for one in images:
            name, caption = one_line(one.name), one_line(one.caption)
            table.add_row(one.text, f"{one.agreement:.1f}", name, caption)
        yield table if console.is_terminal else full_width(table)


def closing_lines(found: "Influences", share: float, folder: str) -> list[str]:
    """Say what was ranked, where it is, and what to do with it."""
    harmful, odd = sum(one.is_harmful for one in found.ranked), sum(one.is_odd for one in found.ranked)
    left = found.images - len(found.ranked)
    lines = [
        f"ranked   {len(found.ranked)} of {found.images} training images on {found.held_out} held-out ones, "
        f"at {' and '.join(found.checkpoints)}: {harmful} lower the gain (95 %), {odd} disagree with "
        "held-out images at some noise"
    ]
    if left:
        lines.append(f"left     {number_of(left, 'image')}: the same command goes on")
    lines.append(f"files    {quoted(f'{folder}/influence.csv')}, influence.png: both rankings")
    file = f"{folder}/influence_exclude.txt"
    if not found.listed:
        return [*lines, f"list     {quoted(file)} was edited and stays as it is: move it away for a new one"]
    exclude = path_setting("data.exclude", file)
    return [
        *lines,
        f"list     {quoted(file)}: {list_in_words(found, share)}; to train without them, add "
        f"{quoted(exclude)} to the run's command",
    ]


def list_in_words(found: "Influences", share: float) -> str:
    """Say which images the list names: the worst, their copies, and what the run left out itself."""
    worst = found.worst(share)
    copies = sum(len(one.copies) for one in worst)
    parts = [f"the {len(worst)} that agree least"]
    if copies:
        parts.append(f"{copies} {'copy' if copies == 1 else 'copies'} of them")
    if found.left_out:
        parts.append(f"the {len(found.left_out)} that the run left out already")
    return " and ".join(parts)
