"""Faults of the machine around a run: a full or read-only disk, a dead loader, a clock, a second command.

Each function does one fault to a real run and returns what happened; a rerun or resume follows, and
the end is compared with the run left alone.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .compare import different_parts
from .runs import ENVIRONMENT, REPO, TINY, new_command, next_command, resume_command, start

SETTINGS = (*TINY, "data.draw.count=24", "data.batch_size=1", "data.accumulate=2", "data.workers=2",
            "trainer.max_epochs=2", "sample.every_n_epochs=2", "checkpoint.every_n_steps=2")  # fmt: skip
SURVIVED, FAILED, SKIPPED = "survived", "FAILED", "skipped"
LIMIT = 900  # seconds after which a run counts as hanging


class Fault(Exception):
    """What was not as promised."""


class Skipped(Exception):
    """Why a fault cannot be done here."""


def require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Fault(otherwise)


class Place:
    """Where the faults are done: the undisturbed run, and commands with one cache for all."""

    def __init__(self, scratch: Path):
        self.scratch, self.cache, self.undisturbed = scratch, scratch / "cache", scratch / "undisturbed"
        self.said = ""

    def new(self, run: Path, *more: str) -> list[str]:
        return new_command(run, (*SETTINGS, *more), self.cache)

    def prepare(self) -> None:
        self.finish(self.new(self.undisturbed))

    def begin(self, command: list[str]) -> subprocess.Popen:
        """Starts a command with its stderr kept apart."""
        environment = os.environ | ENVIRONMENT
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=REPO, env=environment, stdout=pipe, stderr=pipe, text=True)

    def begin_and_wait(self, run: Path) -> subprocess.Popen:
        """Starts a new run and waits for its first checkpoint."""
        process, end = self.begin(self.new(run)), time.monotonic() + LIMIT
        while not (run / "checkpoints" / "last.ckpt").exists():
            require(process.poll() is None and time.monotonic() < end, "the run never got to a checkpoint")
            time.sleep(0.01)
        return process

    def one_line(self, process: subprocess.Popen) -> str:
        """The only line on stderr of a run that stops by itself."""
        _, error = process.communicate(timeout=LIMIT)
        require(process.returncode == 2, f"exit code {process.returncode}: {error[-1500:]}")
        require(error.startswith("error: ") and error.count("\n") == 1, f"more than a line: {error[-1500:]}")
        return error.strip()

    def finish(self, command: list[str]) -> None:
        log = self.scratch / "log"
        require(start(command, log).wait(LIMIT) == 0, f"the run failed: {log.read_text()[-1500:]}")

    def same_end(self, run: Path) -> None:
        """Resumes (or starts) a run to its end, which has to be that of the undisturbed one."""
        self.finish(next_command(run, SETTINGS, self.cache))
        different = different_parts(self.undisturbed, run)
        require(not different, f"another result: {', '.join(different)[:500]}")


@contextlib.contextmanager
def mounted(place: Path, *words: str) -> Iterator[None]:
    """A mount for a while; skips where that is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", *words, str(place)], capture_output=True)
    except FileNotFoundError:
        raise Skipped("there is no mount command") from None
    if done.returncode != 0:
        raise Skipped("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disk_fills_up(place: Place) -> str:
    """The disk fills up behind the first checkpoint; space is made; the run is resumed."""
    disk = place.scratch / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=24m", "tmpfs"):
        run = disk / "run"
        process = place.begin_and_wait(run)
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        line = place.one_line(process)
        require("the disk is full" in line, line)
        whole_checkpoint(run)
        (disk / "ballast").unlink()
        place.same_end(run)
    return line


def disk_becomes_read_only(place: Place) -> str:
    """The run folder becomes read-only behind the first checkpoint, then writable again."""
    run = place.scratch / "read_only"
    process = place.begin_and_wait(run)
    process.send_signal(signal.SIGSTOP)
    try:
        with mounted(run, "--bind", str(run)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(run)], check=True)
            process.send_signal(signal.SIGCONT)
            line = place.one_line(process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
    require("read-only" in line, line)
    whole_checkpoint(run)
    place.same_end(run)
    return line


def cache_fills_up(place: Place) -> str:
    """No room for the drawn images; with room the same command runs through."""
    cache, run = place.scratch / "small", place.scratch / "no_cache"
    with mounted(cache, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        command = new_command(run, SETTINGS, cache)
        line = place.one_line(place.begin(command))
        require("the disk is full" in line, line)
        subprocess.run(["mount", "-o", "remount,size=24m", str(cache)], check=True)
        place.finish(command)
    require(not different_parts(place.undisturbed, run), "another result")
    return line


def loader_dies(place: Place) -> str:
    """SIGKILL to a loader process, as the kernel sends it when memory runs out."""
    run = place.scratch / "loader"
    process = place.begin_and_wait(run)
    os.kill(a_child(process), signal.SIGKILL)
    line = place.one_line(process)
    require("a loader process was killed" in line, line)
    place.same_end(run)
    return line


def a_child(process: subprocess.Popen) -> int:
    """The number of a loader process; between two epochs there is none for a while."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        raise Skipped("this system does not list a process's children")
    while process.poll() is None:
        with contextlib.suppress(OSError):
            found = children.read_text().split()
            if found:
                return int(found[0])
        time.sleep(0.01)
    raise Fault("the run ended before it was seen with a loader process")


def two_at_once(place: Place) -> str:
    """The same command, and resume=RUN, while a run is under way: both say so, the run is unharmed."""
    run = place.scratch / "twice"
    first = place.begin_and_wait(run)
    first.send_signal(signal.SIGSTOP)  # it may not end before the others have looked
    try:
        for command in (place.new(run), resume_command(run)):
            line = place.one_line(place.begin(command))
            require(str(run) in line and "wait for it" in line, line)
    finally:
        first.send_signal(signal.SIGCONT)
    code = first.wait(LIMIT)
    require(code == 0, f"the first one ended with {code}")
    require(not different_parts(place.undisturbed, run), "another result")
    return line


def clock_goes_back(place: Place) -> str:
    """Every look at the clock is an hour before the last one."""
    run = place.scratch / "clock"
    words = place.new(run)[1:]
    place.finish([sys.executable, "-c", BACKWARDS, *words])
    require(not different_parts(place.undisturbed, run), "another result")
    return "the same end"


BACKWARDS = f"""
import datetime, itertools, pathlib, sys, time
sys.path.insert(0, {str(REPO)!r})
hours, real = itertools.count(), time.time
time.time = lambda: real() - 3600 * next(hours)
class Backwards(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(time.time(), tz)
import ghibli.runs.compose, ghibli.runtime.provenance
ghibli.runs.compose.datetime = ghibli.runtime.provenance.datetime = Backwards
sys.argv = sys.argv[1:]
import train
from ghibli.runs.launch import hydra_entry
hydra_entry(pathlib.Path({str(REPO / "conf")!r}), "train", train.main)
"""


def latents_that_are_no_numbers(place: Place) -> str:
    """A VAE that makes NaN of one image: the image is named; no such code is left in the cache."""
    run, cache = place.scratch / "nan", place.scratch / "nan_cache"  # a full cache would need no VAE
    command = new_command(run, SETTINGS, cache)
    line = place.one_line(place.begin([sys.executable, "-c", NAN, *command[1:]]))
    require("its latents are not finite" in line, line)
    place.finish(command)
    require(not different_parts(place.undisturbed, run), "another result")
    return line


NAN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(REPO)!r})
from diffusers import AutoencoderKL
original = AutoencoderKL.encode
def encode(vae, pixels, *more, **options):
    pixels = pixels.clone()
    pixels[2:3] = float("nan")  # a preflight encodes one alone
    return original(vae, pixels, *more, **options)
AutoencoderKL.encode = encode
sys.argv = sys.argv[1:]
import train
from ghibli.runs.launch import hydra_entry
hydra_entry(Path({str(REPO / "conf")!r}), "train", train.main)
"""


def whole_checkpoint(run: Path) -> None:
    """The files from before the fault are there and whole, and no part of one lies about."""
    from ghibli.runtime.files import is_whole

    require(is_whole(run / "checkpoints" / "last.ckpt"), "last.ckpt is damaged")
    require(not list(run.rglob(".*.tmp")), "a part of a file was left")


FAULTS = (
    disk_fills_up, disk_becomes_read_only, cache_fills_up, loader_dies, two_at_once, clock_goes_back,
    latents_that_are_no_numbers,
)  # fmt: skip


def do(fault: Callable[[Place], str], place: Place) -> dict[str, str]:
    """One fault, as a row of the table."""
    said = {"fault": " ".join(fault.__doc__.split("\n")[0].split())}
    try:
        line = fault(place).replace(f"{place.scratch}/", "")
        return said | {"outcome": SURVIVED, "detail": line}
    except Skipped as reason:
        return said | {"outcome": SKIPPED, "detail": str(reason)}
    except Fault as reason:
        return said | {"outcome": FAILED, "detail": str(reason)}


def all_faults(scratch: Path, say: Callable[[str], None] = print) -> dict[str, object]:
    """Each fault once, as the table wants it."""
    place, rows = Place(scratch), []
    place.prepare()
    for fault in FAULTS:
        rows.append(do(fault, place))
        say(f"{len(rows)} of {len(FAULTS)}: {' '.join(rows[-1].values())}")
    shutil.rmtree(place.undisturbed, ignore_errors=True)
    return {"faults": rows}
