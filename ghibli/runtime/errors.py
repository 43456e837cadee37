"""The one exception for what a user can put right, and how an entry point prints it."""

import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user can put right. Its text is one line: what is wrong, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def require_folder(key: str, folder: str | Path) -> None:
    """Raises a UserError unless the folder is there; `~` is the home folder."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        what = "that is a file, not a folder" if place.exists() else "no such folder"
        raise UserError(f"{key}={folder}: {what}")


def disk_trouble(error: Exception) -> str | None:
    """One line for a full disk or a folder that cannot be written; None for any other error."""
    if not isinstance(error, OSError):  # safetensors has an error of its own
        return "the disk is full: free some space" if "No space left on device" in str(error) else None
    elsewhere = "choose another place with hydra.run.dir=DIR (the cache: cache_dir=DIR)"
    reasons = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EIO: "the disk does not answer",
        errno.EROFS: f"the file system is read-only: {elsewhere}",
        errno.EACCES: f"no permission: {elsewhere}",
        errno.EPERM: f"no permission: {elsewhere}",
    }
    if error.errno not in reasons:
        return None
    return f"cannot write {error.filename or 'a file of the run'}: {reasons[error.errno]}"


def loader_trouble(error: Exception) -> str | None:
    """One line for a loader process that was killed; None for any other error."""
    if "DataLoader worker" not in str(error):  # torch's own words, in a plain RuntimeError
        return None
    return (
        "a loader process was killed, most often for want of memory: close other programs and go on, or "
        "start anew with data.workers=0"
    )


def fail(message: str) -> None:
    """Prints the mistake as one line on stderr and leaves with exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Around imports: Ctrl-C leaves the process there and then; a library may swallow its exception."""

    def leave(*_: Any) -> None:
        os.write(2, b"stopped\n")
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():  # signals reach only that one
        yield
        return
    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def one_line_errors(entry: Callable[[], Any]) -> Any:
    """Runs an entry point; a mistake, trouble of the machine or Ctrl-C ends it in one line, no traceback."""
    try:
        return entry()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as mistake:
        fail(str(mistake))
    except Exception as error:
        message = disk_trouble(error) or loader_trouble(error)
        if message is None:
            raise
        fail(message)


def first_line(error: Exception) -> str:
    """The first line of an error's text, without advice to programmers, for one-line messages."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". If you want")[0]
