"""What a command says while its libraries are imported."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ghibli.runtime.console import console
from ghibli.runtime.errors import stop_at_once


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that libraries are loaded, around imports that take seconds; Ctrl-C ends them."""
    if console.is_terminal and "torch" not in sys.modules:
        console.print("loading torch and diffusers ...")
    with stop_at_once():
        yield
