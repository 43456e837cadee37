"""`ghibli jury`."""

from pathlib import Path
from typing import Annotated

import typer

from ghibli.cli.options import (
    Guidance,
    Negative,
    Prompt,
    Prompts,
    Sampler,
    Seed,
    Steps,
    app,
    loading,
    prompt_lines,
    split_words,
)
from ghibli.inference.request import ImageRequest, parse_size
from ghibli.runtime.commands import command_here
from ghibli.runtime.console import console, relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import require_target
from ghibli.runtime.terminal import one_line
from ghibli.runtime.wording import number_of

MOST_MODELS = 8
BYTES = 10**6  # of an image in the page, at most, about


@app.command("jury")
def jury_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|FILE[:WEIGHT]... [KEY=VALUE]...",
            help="2 to 8 to compare; or files of votes",
        ),
    ],
    count: Annotated[
        bool, typer.Option("--count", help="count votes instead: give the files that came back")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(help="the ballot's key, for --count; by default searched beside the votes")
    ] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    pairs: Annotated[int, typer.Option(help="pairs of images on the page", min=4, max=500)] = 60,
    sampler: Sampler = "ddim",
    guidance: Guidance = None,
    steps: Steps = 30,
    seed: Seed = 0,
    size: Annotated[
        str | None, typer.Option(help="px, or WIDTHxHEIGHT; by default that of the first one's training")
    ] = None,
    negative: Negative = "",
    folder: Annotated[Path, typer.Option("--to", help="folder to fill")] = Path("outputs/jury"),
) -> None:
    """Let people compare runs blindly: a page of image pairs to vote on, and what the votes say."""
    if count:
        count_votes([Path(source) for source in sources], key, folder)
        return
    lines = prompt_lines(prompt, prompts)
    named, overrides = split_words(sources)
    from ghibli.config.paths import check_model
    from ghibli.inference.sources import find_sources
    from ghibli.runs.compose import compose_config

    if not 2 <= len(named) <= MOST_MODELS:
        raise UserError(f"name from 2 to {MOST_MODELS} runs or adapter files to compare")
    for source in named:
        find_sources([source], [])  # before torch is loaded and anything drawn
    config = compose_config(overrides)
    check_model(config.model)
    with loading():
        from ghibli.jury import ballot

    lines = lines or list(config.sample.prompts)
    items = ballot.items_needed(len(named), len(lines), pairs)
    request = ImageRequest(
        ballot.items_of(lines, items), sampler, 1.0 if guidance is None else guidance, steps, seed,
        parse_size(size or "512"), negative,
    )  # fmt: skip
    require_target(folder, "--to", 2 * pairs * BYTES)
    planned = ballot.plan(len(named), len(lines), items, pairs)
    of_base = [word for word in overrides if not word.startswith("sample.prompts=")]  # those are read above
    drawn = ballot.draw(named, of_base, request, guidance=guidance, size=request.size if size else None)
    page = ballot.write(folder, named, request.prompts, planned, drawn)
    console.print(
        f"ballot   {relative_path(page)}: {number_of(len(planned), 'pair')}; send it to people, or open it"
    )
    console.print(f"         keep {relative_path(page.with_suffix('.key.json'))}, which says who drew what")
    console.print(f"count    {counting_command(folder)}")


def counting_command(folder: Path) -> str:
    """Return the command that counts the files of votes in this folder; the shell finds them."""
    return f"{command_here('ghibli', 'jury', '--count', '--to', folder)} votes-*.json"


def count_votes(files: list[Path], key: Path | None, folder: Path) -> None:
    """Print what the files of votes say about their ballot."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file")
    with loading():
        from ghibli.jury import count as counting

    if key is None:
        name = f"ballot-{counting.ballot_of(files[0])}.key.json"
        places = [place / name for place in (files[0].parent, folder)]
        key = next((place for place in places if place.is_file()), None)
        if key is None:
            raise UserError(f"{name} is neither beside {files[0]} nor in {folder}: give it with --key FILE")
    for line in counting.count(files, counting.read_key(key)):
        console.print(one_line(line))  # files have the names that voters gave them
