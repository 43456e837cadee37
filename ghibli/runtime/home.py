"""Paths as people type them: with ~, and what can be no path at all."""

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with ~ or ~user at its beginning expanded; unchanged where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def exists(path: str | Path) -> bool:
    """Return whether there is such a file or folder; False for what can be none, such as a long text."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def without_home(path: str) -> str:
    """Return a path with ~ in the place of the home folder, whose name is the user's."""
    home = Path.home()
    inside = Path(path).is_relative_to(home) and home != Path("/")
    return str(Path("~") / Path(path).relative_to(home)) if inside else path
