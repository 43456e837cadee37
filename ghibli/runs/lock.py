"""The lock of a run folder: who holds it writes there. It is released when its process dies.

On Linux and macOS it is a POSIX record lock: data loader processes do not inherit it, and Linux tells others
whether it is held without taking it. Windows has none, and gets the lock of the package filelock.
"""

import errno
import os
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ghibli.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # Windows; elsewhere filelock would only take time to load
    import filelock

    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, pid


@dataclass
class Lock:
    """A lock that this process holds until it is closed, at the end of a with block or by `close`."""

    release: Callable[[], object]
    closed: bool = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.release()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


held: dict[tuple[int, int], Lock] = {}  # device and inode of a file -> this process's lock on it


def take(path: Path, key: str) -> Lock:
    """Lock a file, made with its folder where they are missing, until it is closed or this process ends.

    Args:
        key: the setting that chooses another folder.

    Raises:
        UserError: another process has it, the folder cannot be made, or the file system knows no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", opener=open_no_link)  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {path.parent} ({error.strerror}): choose another, {key}=DIR"
        ) from error
    try:
        lock = Lock(hold(file, path))
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            raise UserError(
                f"the file system of {path.parent} has no file locks: choose a folder elsewhere, {key}=DIR"
            ) from error
        if not isinstance(error, BlockingIOError | PermissionError | TimeoutError):
            raise
        raise UserError(
            f"another process is at work in {path.parent}: wait for its end, or choose another folder "
            f"with {key}=DIR"
        ) from None
    held[identity(os.stat(path))] = lock
    return lock


def hold(file: BinaryIO, path: Path) -> Callable[[], object]:
    """Lock an open file and return what releases it, which closes the file too.

    Raises:
        OSError: another process has the lock, or there are no locks here.
    """
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file.close
    file.close()
    lock = filelock.FileLock(path, timeout=0, preserve_lock_file=True)
    lock.acquire()
    return lock.release


def is_held(path: Path) -> bool | None:
    """Return whether a process has locked the file; None where that cannot be told.

    The file is not opened where this very process has locked it: closing it again would release the lock.
    """
    try:
        if is_ours(path):
            return True
        return None if (found := other_holder(path)) is None else found[0]
    except OSError:
        return None


def holder(path: Path) -> int | None:
    """Return the id of the other process that has locked the file; None without one, or if it is hidden."""
    try:
        found = None if is_ours(path) else other_holder(path)
    except OSError:
        return None
    return found[1] if found is not None and found[0] and found[1] > 0 else None


def other_holder(path: Path) -> tuple[bool, int] | None:
    """Ask Linux who has locked a file that is not ours: (whether it is locked, process id); else None.

    The id is 0 for a process that this one cannot see, such as one outside its container.

    Raises:
        OSError: the file is not there, or may not be read.
    """
    found = os.stat(path)
    if fcntl is None or not (sys.platform.startswith("linux") and stat.S_ISREG(found.st_mode)):
        return None
    with open(path, "rb") as file:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, process = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return kind != fcntl.F_UNLCK, process


def is_ours(path: Path) -> bool:
    """Return whether this process holds the lock of a file."""
    try:
        ours = held.get(identity(os.stat(path)))
    except OSError:
        return False
    return ours is not None and not ours.closed


def identity(found: os.stat_result) -> tuple[int, int]:
    """Return what identifies a file, whatever its path: device and inode."""
    return found.st_dev, found.st_ino


def open_no_link(path: str, flags: int) -> int:
    """Open a file for `open`, but follow no link and wait for no reader of a pipe."""
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
    return os.open(path, flags | more, 0o666)
