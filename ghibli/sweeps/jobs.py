"""Run one trial of a sweep so that its failure stops no other, and estimate the time left."""

import logging
import math
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError, disk_trouble
from ghibli.runtime.files import write_text

logger = logging.getLogger(__name__)

seconds: list[float] = []  # duration of each trial in this process
failures: list[Path] = []  # trials that failed in this process; those in a launcher's processes leave a note


def run_trial(run: RunDir, job: Callable[[], float]) -> float:
    """Run `job` and return its objective; NaN, a printed line and a note in the run folder if it raises."""
    began = time.monotonic()
    run.no_result.unlink(missing_ok=True)
    try:
        return job()
    except Exception as error:
        trouble = str(error) if isinstance(error, UserError) else disk_trouble(error)
        if trouble is None:
            traceback.print_exc()
        logger.warning(f"this trial failed: {trouble or repr(error)}")
        failures.append(run.path)
        with suppress(OSError):  # a full disk; `failures` knows about it
            write_text(run.no_result, (trouble or repr(error)).removeprefix(f"{run.path} "))
        return math.nan
    finally:
        seconds.append(time.monotonic() - began)


def progress(done: int, total: int | None) -> str:
    """Format the progress of a study: `trial 3 of 8, about 12 min left`.

    Trials that took no time were finished before and do not count.
    """
    if total is None:
        return f"trial {done + 1}"
    trained = [duration for duration in seconds if duration > 1]
    if not trained:
        return f"trial {done + 1} of {total}"
    left = sum(trained) / len(trained) * (total - done) / 60
    return f"trial {done + 1} of {total}, about {left:.0f} min left"
