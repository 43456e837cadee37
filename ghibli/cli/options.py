"""The Typer app, the order of its commands in the help, and what several commands share."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ghibli.config.registry import SAMPLERS
from ghibli.inference.request import read_prompts
from ghibli.runtime.console import console
from ghibli.runtime.errors import stop_at_once
from ghibli.runtime.home import exists

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN|FILE[:WEIGHT]]... [KEY=VALUE]...",
        help="by default the newest finished run, or the base if there is none",
    ),
]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="can be repeated")]
Prompts = Annotated[Path | None, typer.Option(help="text file with a prompt per line")]
Sampler = Annotated[str, typer.Option(help=f"{', '.join(SAMPLERS)}; names of A1111 and ComfyUI too")]
Guidance = Annotated[float | None, typer.Option(help="1 = off; by default what suits the training", min=0)]
Steps = Annotated[int, typer.Option(help="denoising steps")]
Seed = Annotated[int, typer.Option(help="image i starts from the noise of seed + i")]
Negative = Annotated[str, typer.Option(help="negative prompt; needs guidance")]
Scale = Annotated[float, typer.Option(help="factor on all adapters: 0 = the base, 1 = as trained")]

PANELS = {  # of --help, in the order of a project's life
    "Before training": ("check", "prepare", "caption", "convert", "demo"),
    "Runs": ("list", "watch", "compare", "evaluate", "influence", "report", "rm", "clean"),
    "Images": ("generate", "restyle", "jury", "app"),
    "Adapters": ("export", "import", "resize", "merge", "extract", "slim", "push"),
}


class CommandGroup(TyperGroup):
    """Lists the commands in the order of PANELS, not in that of their modules' imports."""

    def list_commands(self, ctx: Any) -> list[str]:  # a click.Context, which newer Typers vendor
        """Return all commands, panel by panel."""
        ordered = []
        for panel, names in PANELS.items():
            for name in names:
                command = self.commands[name]
                assert isinstance(command, TyperCommand | TyperGroup), "Typer makes no others"
                command.rich_help_panel = panel
                ordered.append(name)
        return ordered


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # rich's would print what an error quotes unfiltered
    help="Everything around a training run: prepare, compare, generate, share. Training itself is train.py.",
)


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that libraries are loaded, around imports that take seconds; Ctrl-C ends them."""
    if console.is_terminal and "torch" not in sys.modules:
        console.print("loading torch and diffusers ...")
    with stop_at_once():
        yield


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell what is named, runs and files, from KEY=VALUE settings; a file that is there is no setting."""
    settings = [word for word in words if re.match(r"[a-z_.]+=", word) and not exists(word)]
    return [word for word in words if word not in settings], settings


def prompt_lines(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    """Return the prompts of --prompt, then those of the file --prompts."""
    return [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
