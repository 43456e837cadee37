"""The Typer app and the options that several commands share."""

from typing import Annotated

import typer

from ghibli.config.registry import SAMPLERS

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN|FILE[:WEIGHT]]... [KEY=VALUE]...", help="none: the newest finished run, or the base"
    ),
]
Sampler = Annotated[str, typer.Option(help=" or ".join(SAMPLERS))]
Guidance = Annotated[float | None, typer.Option(help="1 = off; none: what suits the training", min=0)]
Steps = Annotated[int, typer.Option(help="denoising steps")]
Seed = Annotated[int, typer.Option(help="image i starts from the noise of seed + i")]
Negative = Annotated[str, typer.Option(help="what should not be seen; needs guidance")]
Scale = Annotated[float, typer.Option(help="of all adapters: 0 = the base, 1 = as trained")]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="What comes around and after a training run."
)
