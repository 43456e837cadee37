"""The folder for uploads and images of the page: for this user only, gone when the process ends."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ghibli.runtime.errors import UserError

PREFIX = "ghibli-page-"


def make_private_folder() -> Path:
    """Make an empty folder with mode 0700 that gradio keeps its files in; remove those of killed pages.

    Raises:
        UserError: the disk is full or read-only.
    """
    remove_left_over()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    except OSError as error:
        raise UserError(f"no temporary folder can be made: {error}; set TMPDIR to one") from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def remove_left_over() -> None:
    """Remove this user's folders whose process was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        ours = folder.is_dir() and not folder.is_symlink() and is_own(folder)
        if ours and pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def is_own(folder: Path) -> bool:
    """Tell whether a folder is this user's; on Windows the temporary folder is each user's own."""
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def is_running(pid: int) -> bool:
    """Tell whether a process with this id exists."""
    try:
        return psutil.pid_exists(pid)
    except OverflowError:
        return False


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the process as Ctrl-C does, so that the folder is removed."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
