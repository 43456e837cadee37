"""The `ghibli` command."""

import sys

from ghibli.cli import adapters, data, images, influence, jury, runs  # noqa: F401  (they register their commands)
from ghibli.cli.options import app
from ghibli.config.typed_paths import at_home
from ghibli.runtime.errors import one_line_errors


def main() -> None:
    """Run the console script; a user's error ends it with one line."""
    sys.argv[1:] = map(at_home, sys.argv[1:])
    one_line_errors(app)
