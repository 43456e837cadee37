"""The `ghibli` command."""

from ghibli.cli import adapters, data, images, runs  # noqa: F401  (they register their commands)
from ghibli.cli.options import app
from ghibli.runtime.errors import one_line_errors


def main() -> None:
    """Run the console script; a user's error ends it with one line."""
    one_line_errors(app)
