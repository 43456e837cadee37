"""A run that was asked for in the background, and whether the process that trains it is alive."""

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from ghibli.runs import lock
from ghibli.runs.status import RunStatus

CLOCK = 2.0  # s by which the clock may have been set since a process began
SCRIPTS = ("train.py", "sweep.py")


@dataclass(frozen=True)
class Job:
    """A run that was asked for: it waits, is at work, or is over."""

    number: int
    words: list[str]  # what follows train.py
    folder: str | None = None  # of the run; None until it begins, if nothing names it
    process: int | None = None  # its id; None until it begins, and of one that could not be started
    began: float | None = None  # when its process was made or was about to be, in seconds since 1970
    code: int | None = None  # what it exited with; None until then, and where nobody waited for it

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.process is None and self.began is None and self.code is None

    @property
    def is_cut_off(self) -> bool:
        """Whether its start was not seen to its end: somebody is at it, or was killed meanwhile."""
        return self.process is None and self.began is not None and self.code is None

    @property
    def is_alive(self) -> bool:
        """Whether its process runs, and not a later one that has its id."""
        return self.process is not None and is_process(self.process, self.began)

    @property
    def is_at_work(self) -> bool:
        """Whether its process runs, or its folder is locked."""
        if self.waits or self.code is not None or self.folder is None:
            return False
        return self.is_alive or lock.is_held(Path(self.folder) / ".lock") is True


def is_process(number: int, began: float | None) -> bool:
    """Return whether a process of this id runs that was made at this time."""
    try:
        process = psutil.Process(number)
        is_same = began is None or abs(process.create_time() - began) <= CLOCK
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False


def is_training(number: Any) -> bool:
    """Return whether a process of this id was started as a training."""
    try:
        words = psutil.Process(number).cmdline()
    except (psutil.Error, ValueError, TypeError, OverflowError):
        return False
    return any(Path(word).name in SCRIPTS for word in words)


def found_again(job: Job) -> Job:
    """Return a job whose start was cut off with the process that it has or had, else as one that waits."""
    began, status = job.began or 0.0, RunStatus(Path(job.folder or "") / "status.json")
    process = process_with(job.words, began)
    if process is None and job.is_at_work:  # by a process that cannot be seen from here
        return job
    with suppress(OSError):  # it has written nothing yet
        if process is None and status.path.stat().st_mtime >= began - CLOCK:
            process = status.read().get("process")
    return replace(job, began=None) if process is None else replace(job, process=process)


def process_with(words: list[str], since: float) -> int | None:
    """Return the id of a training that was started with these words at the end, not before a time, if any."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            began, line = process.create_time(), process.cmdline()
            if line[-len(words) :] == words and began >= since - CLOCK and is_training(process.pid):
                found.append((began, process.pid))
    return min(found)[1] if found else None  # the first: its helpers are copies of it


def as_job(entry: Any) -> Job | None:
    """Read a job from an entry of queue.json; None where it is damaged."""
    kinds: dict[str, Any] = {
        "number": int, "words": list, "folder": str | None, "process": int | None, "began": float | None,
        "code": int | None,
    }  # fmt: skip
    names = {field.name for field in fields(Job)}
    if not isinstance(entry, dict) or entry.keys() != names:
        return None
    if not all(isinstance(entry[name], kind) for name, kind in kinds.items()):
        return None
    return Job(**entry) if all(isinstance(word, str) for word in entry["words"]) else None
