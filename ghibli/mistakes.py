"""The one exception for what a user can put right, and how an entry point prints it."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable


class UserMistake(ValueError):
    """Something the user can put right. Its text is one line: what is wrong, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def disk_trouble(error: OSError) -> str | None:
    """One line for a full disk or a folder that cannot be written; None for any other error."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: choose another folder with hydra.run.dir=DIR",
        errno.EACCES: "no permission to write there: choose another folder with hydra.run.dir=DIR",
        errno.EPERM: "no permission to write there: choose another folder with hydra.run.dir=DIR",
    }
    if error.errno not in reasons:
        return None
    return f"cannot write {error.filename or 'a file of the run'}: {reasons[error.errno]}"


def fail(message: str) -> None:
    """Prints the mistake as one line on stderr and leaves with exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def one_line_mistakes(entry: Callable[[], None]) -> None:
    """Runs an entry point; a user's mistake or a full disk ends it with one line, no traceback."""
    try:
        entry()
    except UserMistake as mistake:
        fail(str(mistake))
    except OSError as error:
        message = disk_trouble(error)
        if message is None:
            raise
        fail(message)
