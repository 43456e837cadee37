"""Runs that are trained one after another in the background, each in a process of its own.

All of it is in files: whoever looks again, after a crash too, finds what waits and what is trained. A run's
process has a session of its own, so neither the end of the one that started it nor its Ctrl-C reaches it.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from ghibli.runs import lock
from ghibli.runs.compose import check_overrides, run_dir_for
from ghibli.runs.find import OUTPUTS, run_to_resume
from ghibli.runs.folder import RunDir
from ghibli.runs.inputs import check_inputs
from ghibli.runs.jobs import Job, as_job, found_again, is_training
from ghibli.runs.launch import claimed
from ghibli.runs.status import LARGEST
from ghibli.runtime.commands import path_setting, quoted
from ghibli.runtime.console import relative_path
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import ROOT, read_plain, write_json, write_text
from ghibli.runtime.terminal import one_line

logger = logging.getLogger(__name__)

FOLDER = OUTPUTS / "queue"
PATIENCE = 10.0  # s to wait for another process that changes the queue
KEPT = 30  # jobs that are over
TAIL = 2**13  # bytes at the end of what a job printed that are looked at
SAVED_AT_STOP = (0, 130)  # exit codes of a run that finished, or was stopped by SIGINT


class Queue:
    """The jobs in a folder, which several threads and processes may change at once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Look at a folder, which is made when the first job comes.

        Args:
            folder: holds queue.json, and what each job printed.
        """
        self.folder = folder.absolute()
        self._turn = threading.Lock()
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # by the job's number

    @property
    def file(self) -> Path:
        return self.folder / "queue.json"

    def printed(self, job: Job) -> Path:
        """Return the file with what a job's process printed."""
        return self.folder / f"{job.number}.txt"

    def jobs(self) -> list[Job]:
        """Return the jobs in the order in which they came, as far as the file can be read."""
        return self._read()[0]

    def trouble(self) -> str | None:
        """Say why the file, or a part of it, cannot be read; None if it can. Until then it is not changed."""
        return self._read()[1]

    def at_work(self) -> Job | None:
        """Return the job whose run is being trained."""
        return next((job for job in self.jobs() if job.is_at_work), None)

    def add(self, words: list[str]) -> Job:
        """Check what follows train.py and put it at the end.

        Raises:
            UserError: a setting that is not accepted, or a path that does not exist.
        """
        return self._append(words, folder_of(words))

    def add_resume(self, folder: Path) -> Job:
        """Put an unfinished run at the end, to be resumed.

        Raises:
            UserError: there is nothing to resume from, or it is trained or waits already.
        """
        run = run_to_resume(str(folder))
        with self._changing() as jobs:
            same = [job for job in jobs if job.folder == str(run.path)]
            if lock.is_held(run.path / ".lock") or any(job.is_at_work for job in same):  # it may still load
                raise UserError(f"{run.path} is being trained")
            if any(job.waits or job.is_cut_off for job in same):
                raise UserError(f"{run.path} waits already")
            return self._added(jobs, [path_setting("resume", run.path)], str(run.path))

    def remove(self, number: int) -> None:
        """Take a job out that has not begun.

        Raises:
            UserError: it has, or there is no such job.
        """
        with self._changing() as jobs:
            found = next((job for job in jobs if job.number == number), None)
            if found is None or not found.waits:
                raise UserError(f"run {number} of the queue waits no longer")
            jobs.remove(found)

    def advance(self) -> None:
        """Note what ended, and start the next run if none is at work.

        Raises:
            UserError: the queue's file cannot be read or changed. What is wrong with a run is its outcome.
        """
        if not self._ended() and not any(job.waits or job.is_cut_off for job in self.jobs()):
            return
        with self._changing() as jobs:
            ended = self._ended()  # once more: another thread may have noted some meanwhile
            jobs[:] = [replace(job, code=ended.get(job.number, job.code)) for job in jobs]
            for number in ended:
                del self._children[number]
            jobs[:] = [found_again(job) if job.is_cut_off else job for job in jobs]
            at = next((at for at, job in enumerate(jobs) if job.waits), None)
            if at is not None and not self._children and not any(job.is_at_work for job in jobs):
                self._begin(jobs, at)

    def stop(self, folder: Path) -> None:
        """Ask the process that trains in a folder to stop, as Ctrl-C does: it saves after its step.

        A second call stops it at once.

        Raises:
            UserError: nothing is trained there, or this system cannot do it.
        """
        if os.name == "nt":
            raise UserError("on Windows a run in the background cannot be asked to stop: end its process")
        run = RunDir(folder)
        starting = next((job for job in self.jobs() if job.folder == str(folder) and job.is_alive), None)
        holder = lock.holder(run.path / ".lock")
        if lock.is_held(run.path / ".lock") is None and run.status.state == "running":  # as on macOS
            noted = run.status.read().get("process")
            holder = noted if is_training(noted) else None
        with suppress(ProcessLookupError):  # it has just ended: said below
            if holder is not None and holder != os.getpid():
                os.kill(holder, signal.SIGINT)
                return
            if starting is not None and starting.process is not None:  # a shell may have it ignore SIGINT
                os.kill(starting.process, signal.SIGTERM)
                return
        raise UserError(f"nothing is trained in {folder}")

    def outcome(self, job: Job) -> str:
        """Say in some words what a job does, or how it ended."""
        if job.is_at_work:
            return "is being trained"
        if job.waits or job.is_cut_off:
            return "waits"
        last = (self.tail(job, 1) or [""])[0]
        if job.process is None:
            return last or "could not be started"
        if job.code not in (None, *SAVED_AT_STOP) and last.startswith("error:"):
            return last
        status = RunDir(Path(job.folder or "")).status
        return status.state if status.path.exists() else last or "stopped before it began"

    def tail(self, job: Job, lines: int) -> list[str]:
        """Return the last lines that a job printed."""
        try:
            with open(self.printed(job), "rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
                text = file.read(TAIL).decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def _ended(self) -> dict[int, int]:
        """Return the exit codes of the children that ended since advance last looked, by job number."""
        polled = [(number, child.poll()) for number, child in tuple(self._children.items())]
        return {number: code for number, code in polled if code is not None}

    def _append(self, words: list[str], folder: str | None) -> Job:
        """Add a job under the next number."""
        with self._changing() as jobs:
            return self._added(jobs, words, folder)

    def _read(self) -> tuple[list[Job], str | None]:
        """Return the jobs that can be read, and why there may be others."""
        try:
            content = json.loads(read_plain(self.file, LARGEST))
        except FileNotFoundError:
            return [], None
        except (OSError, ValueError, RecursionError) as error:
            return [], self._unreadable(first_line(error))
        if not isinstance(content, list):
            return [], self._unreadable("it is no list")
        jobs = [job for entry in content if (job := as_job(entry)) is not None]
        if strange := len(content) - len(jobs):
            return jobs, self._unreadable(f"{strange} of its entries are damaged or of another version")
        return jobs, None

    def _unreadable(self, why: str) -> str:
        """Say what to do with a file that cannot be read."""
        file = relative_path(self.file)
        return f"{file} cannot be read, and no further run is trained: {why}: repair the file or move it away"

    def _added(self, jobs: list[Job], words: list[str], folder: str | None) -> Job:
        """Add a job to the list under the next number; forget the oldest that are over."""
        job = Job(max((other.number for other in jobs), default=0) + 1, words, folder)
        over = [other for other in jobs if not (other.waits or other.is_cut_off or other.is_at_work)]
        for old in over[: max(len(over) - KEPT, 0)]:
            jobs.remove(old)
            self.printed(old).unlink(missing_ok=True)
        jobs.append(job)
        return job

    def _begin(self, jobs: list[Job], at: int) -> None:
        """Start a job of the list; one that cannot be started is over, and the next one gets its turn.

        It is stored before: a kill in between, or a full disk, leaves no process that nobody knows of.
        """
        waiting = jobs[at]
        try:
            jobs[at] = replace(with_folder(waiting), began=time.time())
            self._store(jobs)
            jobs[at] = self._start(jobs[at])
        except (OSError, ValueError) as error:
            folder = jobs[at].folder
            if folder is not None and folder != waiting.folder:
                Path(folder).rmdir()
            jobs[at] = self._failed(waiting, error)

    def _start(self, job: Job) -> Job:
        """Start a job's process; return it with that.

        Raises:
            OSError, ValueError: it cannot be started.
        """
        with open(self.printed(job), "wb") as printed:
            child = subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "train.py"), *job.words],
                stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._children[job.number] = child
        began = time.time()
        with suppress(psutil.Error):  # it has ended already: the time of its start will do
            began = psutil.Process(child.pid).create_time()
        return replace(job, process=child.pid, began=began)

    def _failed(self, job: Job, error: Exception) -> Job:
        """Return a job that could not be started as one that is over, with the reason as what it printed."""
        with suppress(OSError):  # outcome has words of its own for a job that has printed nothing
            write_text(self.printed(job), f"error: it could not be started: {first_line(error)}\n")
        return replace(job, code=1)

    @contextmanager
    def _changing(self) -> Iterator[list[Job]]:
        """Yield the jobs to be changed in place, which nobody else changes meanwhile; store them.

        Raises:
            UserError: the file is locked, or cannot be read: it is left as it is.
        """
        with self._turn, patient_lock(self.folder / ".lock"):
            jobs, trouble = self._read()
            if trouble is not None:  # whatever it holds would be lost
                raise UserError(trouble)
            before = list(jobs)
            yield jobs
            if jobs != before:
                self._store(jobs)

    def _store(self, jobs: list[Job]) -> None:
        """Write queue.json."""
        write_json(self.file, [asdict(job) for job in jobs])


def with_folder(job: Job) -> Job:
    """Return a job with a folder of its own, which is made where its words name none.

    Raises:
        UserError: it cannot be made.
    """
    if job.folder is not None:
        return job
    folder = claimed(Path(run_dir_for(None, None)))
    return replace(job, words=[*job.words, path_setting("hydra.run.dir", folder)], folder=str(folder))


def patient_lock(path: Path) -> lock.Lock:
    """Take a lock, waiting up to PATIENCE for another process to release it.

    Raises:
        UserError: it did not, or the folder cannot be made.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return lock.take(path, "")
        except UserError as error:  # its advice is for a run's folder
            reason = error.__cause__
        if isinstance(reason, OSError):
            raise UserError(
                f"the queue of runs in {path.parent} cannot be changed ({reason.strerror}): start the page "
                "in a folder that can be written, on a disk with file locks"
            ) from reason
        if time.monotonic() > end:
            raise UserError(f"another process keeps the queue of runs in {path.parent} locked: end it")
        time.sleep(0.05)


def folder_of(words: list[str]) -> str | None:
    """Check what follows train.py as it does itself; return the run's folder if the words name one.

    Raises:
        UserError: what is wrong, all of it in one line.
    """
    for word in words:
        require_setting(word)
    config, run, errors = check_overrides(words)
    if config is None or run is None:
        raise UserError("; and: ".join(errors))
    check_inputs(config)
    return str(run.path) if config.name is not None else None


def require_setting(word: str) -> None:
    """Raise a UserError for a word that is no KEY=VALUE of a run, such as an option of Hydra's."""
    if not can_be_passed(word):
        raise UserError(f"{one_line(word[:60])} holds a character that no command takes: leave it out")
    if not re.match(r"[+~]{0,2}[\w./@]+=", word) or re.match(r"[+~]*hydra", word):
        raise UserError(f"{quoted(word[:60])} is no setting of a run: give KEY=VALUE, as after train.py")


def can_be_passed(word: str) -> bool:
    """Return whether a process can be given a word: it has no NUL and no half of a surrogate pair.

    But those that stand for the bytes of a file name that is no UTF-8.
    """
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False
