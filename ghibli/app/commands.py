"""The commands that make in the terminal what the page has drawn."""

from collections.abc import Sequence
from pathlib import Path

from ghibli.adapters.files import format_number
from ghibli.app.settings import Settings
from ghibli.inference.request import RestyleOptions
from ghibli.runtime.commands import command_here, quoted


def draw_command(settings: Settings, sources: list[str], axes: Sequence[str] = ()) -> str:
    """Return the command that draws an image of some settings.

    Args:
        axes: settings that a grid varies, such as guidance=3,7.
    """
    words = ["--hires", format_number(settings.hires)] if settings.hires != 1 else []
    command = command_here(
        "ghibli", "generate", *sources, "--prompt", settings.prompt, *shared_words(settings), *words
    )
    return command + "".join(f" --grid {quoted(axis)}" for axis in axes)


def restyle_command(
    settings: Settings, photo: Path, options: RestyleOptions, sources: list[str], *,
    mask: Path | None = None, control_image: Path | None = None,
) -> str:  # fmt: skip
    """Return the command that restyles the photo of this name.

    Args:
        mask, control_image: names of the files that belong to it.
    """
    loaded = [word for name in sources for word in ("--with", name)]
    more: list[str | Path] = [] if mask is None else ["--mask", mask]
    if options.control is not None:
        more += ["--control", control_image or options.control.source]
        more += ["--control-model", options.control.model]
        if options.control.scale != 1:
            more += ["--control-scale", format_number(options.control.scale)]
    return command_here(
        "ghibli", "restyle", photo, *loaded, "--prompt", settings.prompt,
        "--strength", format_number(options.strength), "--way", options.way, *shared_words(settings), *more,
    )  # fmt: skip


def shared_words(settings: Settings) -> list[str]:
    """Return the options that both commands have."""
    words = ["--sampler", settings.sampler, "--guidance", format_number(settings.guidance)]
    words += ["--steps", str(int(settings.steps)), "--seed", str(int(settings.seed or 0))]
    words += ["--scale", format_number(settings.scale)] if settings.scale != 1 and settings.runs else []
    return words + (["--negative", settings.negative] if settings.negative else [])
