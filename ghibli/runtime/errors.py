"""The exception for errors that the user can fix, and how an entry point reports it in one line."""

import difflib
import errno
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ghibli.runtime.home import expanded
from ghibli.runtime.terminal import guard_terminal, one_line
from ghibli.runtime.wrapping import fold


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what is wrong and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known word closest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def require_folder(key: str, folder: str | Path) -> None:
    """Require that a folder exists; `~` is the home folder.

    Raises:
        UserError: it does not, or is a file; the message names the setting `key`.
    """
    path = expanded(folder)
    if not path.is_dir():
        reason = "that is a file, not a folder" if path.exists() else "no such folder"
        raise UserError(f"{key}={folder}: {reason}")


def disk_trouble(error: Exception) -> str | None:
    """Return one line about a full disk or a folder that cannot be written; None for any other error."""
    if not isinstance(error, OSError):  # safetensors raises its own type
        return "the disk is full: free some space" if "No space left on device" in str(error) else None
    elsewhere = "choose another folder with hydra.run.dir=DIR (for the cache: cache_dir=DIR)"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # found in reading as well
        reason = "too long for a file name" if error.errno == errno.ENAMETOOLONG else "a circle of links"
        return f"{error.filename}: that is {reason}"
    reasons = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EIO: "the disk reports an input/output error",
        errno.EROFS: f"the file system is read-only: {elsewhere}",
        errno.EACCES: f"no permission: {elsewhere}",
        errno.EPERM: f"no permission: {elsewhere}",
    }
    if error.errno not in reasons:
        return None
    return f"cannot write {error.filename or 'a file of the run'}: {reasons[error.errno]}"


def loader_trouble(error: Exception) -> str | None:
    """Return one line about DataLoader workers that were killed or hang; None for any other error."""
    text = str(error)  # of a plain RuntimeError by torch
    if "DataLoader timed out" in text or (
        "DataLoader worker" in text and re.search("bus error|shm", text, re.I)
    ):
        return (
            "the loader processes stopped sending batches, most likely because shared memory is full: empty "
            "/dev/shm and resume, or start again with data.workers=0"
        )
    if "DataLoader worker" not in text:
        return None
    return (
        "a loader process was killed, most likely because memory ran out: close other programs and resume, "
        "or start again with data.workers=0"
    )


def fail(message: str) -> None:
    """Print the error as one line on stderr, broken between words on a terminal, and exit with code 2."""
    text = f"error: {one_line(' '.join(message.split()))}"
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    print(fold(text, shutil.get_terminal_size().columns) if is_terminal else text, file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Make Ctrl-C end the process immediately; around imports, where a library may swallow its exception."""

    def leave(*_: Any) -> None:
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"stopped\n")
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield
        return
    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def one_line_errors(entry: Callable[[], Any]) -> Any:
    """Run an entry point; report user errors, disk and memory trouble and Ctrl-C in one line each."""
    guard_terminal()
    try:
        return entry()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        fail(str(error))
    except Exception as error:
        message = disk_trouble(error) or loader_trouble(error)
        if message is None:
            raise
        fail(message)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message without its advice to programmers."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". If you want")[0]
