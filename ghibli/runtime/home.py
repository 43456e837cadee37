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
