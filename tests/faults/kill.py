"""SIGKILL at random moments of a run, resumed until it is done, compared with the run left alone."""

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .compare import different_parts
from .runs import EPOCHS, FORTY_STEPS, STEPS, next_command, start

TWICE = 3  # every third run is killed a second time, after it was resumed
LIMIT = 1800  # seconds after which a run counts as hanging


@dataclass
class Killed:
    """One run that was killed once or twice: when, what it had saved then, and how it ended."""

    number: int
    moments: list[float] = field(default_factory=list)  # seconds after the process was started
    where: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # empty: bit-equal


class Killer:
    """Kills runs of one kind, each in a folder of its own with an empty cache."""

    def __init__(self, scratch: Path, settings: tuple[str, ...] = FORTY_STEPS):
        self.scratch, self.settings = scratch, settings
        self.undisturbed = scratch / "undisturbed_0" / "run"
        self.seconds = 0.0

    def command(self, folder: Path) -> list[str]:
        return next_command(folder, self.settings, folder.with_name("cache"))

    def leave_alone(self, jobs: int = 1) -> float:
        """Makes the run that nothing happens to, `jobs` times at once; the wall-clock in seconds."""
        runs = [self.scratch / f"undisturbed_{job}" / "run" for job in range(jobs)]
        began = time.monotonic()
        started = [start(self.command(run), run.with_name("log")) for run in runs]
        for run, process in zip(runs, started, strict=True):
            if process.wait(LIMIT) != 0:
                raise RuntimeError(run.with_name("log").read_text())
        self.seconds = time.monotonic() - began
        for run in runs[1:]:
            if different_parts(runs[0], run):
                raise RuntimeError(f"the same command twice: {different_parts(runs[0], run)} differ")
        return self.seconds

    def kill_and_resume(self, number: int, seed: int) -> Killed:
        """One run, killed at a moment that follows from (seed, number), to its end."""
        draws = random.Random(f"{seed} {number}")
        run, report = self.scratch / f"run_{number:03d}" / "run", Killed(number)
        began = time.monotonic()
        while not self.kill_once(run, draws.uniform(0, self.seconds), report):
            shutil.rmtree(run.parent)  # it was done before its moment came: that is no kill
            self.seconds, began = min(self.seconds, time.monotonic() - began), time.monotonic()
        if number % TWICE == TWICE - 1:
            self.kill_once(run, draws.uniform(0, self.seconds - 0.5 * report.moments[0]), report)
        if start(self.command(run), run.with_name("log")).wait(LIMIT) != 0:
            report.wrong = [run.with_name("log").read_text()[-2000:]]
        else:
            report.wrong = different_parts(self.undisturbed, run)
        if not report.wrong:
            shutil.rmtree(run.parent)
        return report

    def kill_once(self, run: Path, moment: float, report: Killed) -> bool:
        """Starts or resumes the run and kills it after `moment` seconds; False when it ended before."""
        process = start(self.command(run), run.with_name("log"))
        try:
            process.wait(moment)
            return False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            return False
        report.moments.append(round(moment, 2))
        report.where.append(where(run))
        return True


def where(run: Path) -> str:
    """What a killed run had behind it, from what is on the disk."""
    if list(run.rglob(".*.tmp")):
        return "while a file was written"
    if (run / "adapter").exists():
        return "after training"
    last = run / "checkpoints" / "last.ckpt"
    if not last.exists():
        return "before the first checkpoint"
    epoch = torch.load(last, weights_only=True)["global_step"] // STEPS + 1
    return f"in epoch {epoch}" if epoch <= EPOCHS else "after the last epoch"


def kill_runs(
    count: int, seed: int, jobs: int, scratch: Path, say: Callable[[str], None] = print
) -> dict[str, object]:
    """`count` runs killed and resumed, `jobs` at a time; what happened, as the table wants it."""
    killer = Killer(scratch)
    say(f"the undisturbed run took {killer.leave_alone(jobs):.0f} s")
    began, reports = time.monotonic(), []
    with ThreadPoolExecutor(jobs) as pool:
        for report in pool.map(lambda number: killer.kill_and_resume(number, seed), range(count)):
            reports.append(report)
            left = (time.monotonic() - began) / len(reports) * (count - len(reports)) / 60
            equal = "bit-equal" if not report.wrong else f"DIFFERENT: {'; '.join(report.wrong)}"
            moments = ", then ".join(
                f"{moment:5.1f} s ({place})"
                for moment, place in zip(report.moments, report.where, strict=True)
            )
            say(f"{len(reports)} of {count}, {left:.0f} min left: killed at {moments}: {equal}")
    equal = sum(not report.wrong for report in reports)
    say(f"{equal} of {count} bit-equal")
    return {
        "runs": count, "equal": equal, "kills": sum(len(report.moments) for report in reports),
        "twice": sum(len(report.moments) > 1 for report in reports), "seed": seed,
        "seconds": round(killer.seconds, 1),
        "where": dict(sorted(Counter(place for report in reports for place in report.where).items())),
        "moments": [report.moments for report in reports],
        "different": [vars(report) for report in reports if report.wrong],
    }  # fmt: skip
