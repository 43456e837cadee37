"""Run one trial of a sweep so that its failure stops no other, and estimate the time left."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from ghibli.config.files import read_settings
from ghibli.config.schema import Config, base_name, images_name
from ghibli.runs.attempts import attempt
from ghibli.runs.find import all_runs
from ghibli.runs.folder import RunDir
from ghibli.runs.monitor import in_words

PAST_RUNS = 5  # the newest, from which the time of a sweep is estimated before its first trial


@dataclass(frozen=True)
class Work:
    """What the time of a trial depends on most."""

    epochs: int
    is_guided: bool  # a guided loss takes two forward passes

    @classmethod
    def of(cls, config: Config) -> "Work":
        return cls(int(config.trainer["max_epochs"]), config.loss.own_guidance != 1)


Timed = tuple[Work, float]  # a trial that was trained, and its seconds
timed: list[Timed] = []  # of this process


def run_trial(run: RunDir, job: Callable[[], float]) -> float:
    """Run `job` and return its objective; NaN, a printed line and a note in the run folder if it raises."""
    return attempt(run, job, "trial")


class Stopwatch:
    """Note how long a trial takes, unless it was finished before and takes no time."""

    def __init__(self, work: Work):
        self.work, self.began = work, time.monotonic()

    def stop(self) -> None:
        seconds = time.monotonic() - self.began
        if seconds > 1:
            timed.append((self.work, seconds))


def seconds_left(left: list[Work], past: list[Timed]) -> float | None:
    """Estimate the seconds that trials take from those of others; None without any.

    A trial takes as long as the others of its kind did on average; if there are none of its kind, as long as
    the others, scaled by its epochs.
    """
    if not past:
        return None
    pace = sum(seconds for _, seconds in past) / sum(work.epochs for work, _ in past)
    total = 0.0
    for work in left:
        alike = [seconds for other, seconds in past if other == work]
        total += sum(alike) / len(alike) if alike else pace * work.epochs
    return total


def progress(number: int, plan: list[Work] | None) -> str:
    """Format the progress of a study: `trial 3 of 8, about 12 min left`.

    Args:
        number: of the trial that begins, from 0.
        plan: the work of all trials; None where that is decided while the study runs.
    """
    if plan is None:
        return f"trial {number + 1}"
    left = seconds_left(plan[number:], timed)
    return f"trial {number + 1} of {len(plan)}" + ("" if left is None else f", about {in_words(left)} left")


def past_runs(config: Config) -> list[Timed]:
    """Return the newest finished runs below outputs/ of this base and image set, with their seconds."""
    found: list[Timed] = []
    for run in reversed(all_runs()):
        status = run.status.read()
        origin = (status.get("base"), status.get("images"))
        if status.get("state") != "finished" or origin != (base_name(config.model), images_name(config.data)):
            continue
        loss = (read_settings(run.config) or {}).get("loss") or {}
        is_guided = loss.get("guidance", 1) != 1 or loss.get("guidance_target") is not None
        with suppress(KeyError, TypeError, ValueError):
            began, ended = (datetime.fromisoformat(status[key]) for key in ("started", "ended"))
            if len(status["starts"]) == 1 and status["epoch"] > 0:
                found.append((Work(status["epoch"], is_guided), (ended - began).total_seconds()))
        if len(found) == PAST_RUNS:
            break
    return found
