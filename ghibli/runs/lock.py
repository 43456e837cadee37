"""The lock of a run folder: who holds it writes there. It is released when its process dies."""

import errno
import fcntl
import os
import stat
import struct
import sys
from pathlib import Path
from typing import BinaryIO

from ghibli.runtime.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, pid
held: dict[tuple[int, int], BinaryIO] = {}  # device and inode -> file that this process has locked


def take(path: Path, key: str) -> BinaryIO:
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
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data loader processes do not inherit it
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            raise UserError(
                f"the file system of {path.parent} has no file locks: choose a folder elsewhere, {key}=DIR"
            ) from error
        if not isinstance(error, BlockingIOError | PermissionError):
            raise
        raise UserError(
            f"another process is at work in {path.parent}: wait for its end, or choose another folder "
            f"with {key}=DIR"
        ) from None
    held[identity(file)] = file
    return file


def is_held(path: Path) -> bool | None:
    """Return whether a process has locked the file; None where that cannot be told.

    The file is not opened where this very process has locked it: closing it again would release the lock.
    """
    try:
        found = os.stat(path)
        ours = held.get((found.st_dev, found.st_ino))
        if ours is not None and not ours.closed:
            return True
        if not (sys.platform.startswith("linux") and stat.S_ISREG(found.st_mode)):
            return None
        with open(path, "rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return None


def identity(file: BinaryIO) -> tuple[int, int]:
    """Return what identifies an open file, whatever its path: device and inode."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def open_no_link(path: str, flags: int) -> int:
    """Open a file for `open`, but follow no link and wait for no reader of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
