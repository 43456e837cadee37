"""What a handler of the page answers when it cannot do what it was asked: a message, or nothing."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ghibli.images.read import Unusable
from ghibli.runtime.errors import UserError

Handler = Callable[..., list[Any]]


class Stopped(Exception):
    """The visitor pressed Cancel or closed the tab."""


def without_places(message: str) -> str:
    """Return a message without the folders of this machine: relative to the current one, `~` for home."""
    for folder, shorter in ((f"{Path.cwd()}/", ""), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        message = message.replace(folder, shorter) if folder != "/" else message
    return message


def errors_in_words(frames: int, commands: int) -> Callable[[Handler], Handler]:
    """Have a handler return, on a UserError, its message between its images and its commands.

    These stay as they are on the page. A message that pops up would vanish, and gradio would write Error
    across every frame.

    Args:
        frames, commands: how many of each it returns, before and after the message.
    """

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        def wrapped(*args: Any, **options: Any) -> list[Any]:
            try:
                return handler(*args, **options)
            except (UserError, Unusable) as error:
                message = f"**{without_places(str(error))}**"
            except Stopped:
                message = "stopped"
            return [*[gr.skip()] * frames, message, *[gr.skip()] * commands]

        return wrapped

    return decorate


def errors_as_text(handler: Callable[..., str]) -> Callable[..., str]:
    """Have a handler return the message of a UserError in the place of its text, in bold."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **options: Any) -> str:
        try:
            return handler(*args, **options)
        except UserError as error:
            return f"**{without_places(str(error))}**"

    return wrapped


def errors_on_page(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show a handler's UserError as a message on the page; on a stop, leave the page unchanged."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except (UserError, Unusable) as error:
            raise gr.Error(without_places(str(error)), print_exception=False) from error
        except Stopped:
            return gr.skip()

    return wrapped
