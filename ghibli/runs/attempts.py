"""One run of several: its failure stops none of the others."""

import logging
import math
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError, disk_trouble
from ghibli.runtime.files import write_text

logger = logging.getLogger(__name__)

failures: list[Path] = []  # runs that failed in this process; those in a launcher's processes leave a note


def attempt(
    run: RunDir, job: Callable[[], float], what: str, check: Callable[[], None] = lambda: None
) -> float:
    """Run `job` and return its objective; NaN, a printed line and a note in the run folder if it raises.

    Args:
        what: the word for the run in that line, such as trial.
        check: raises a UserError where the folder is not the job's: then nothing is left in it.
    """
    try:
        check()
    except UserError as error:
        return failed(run, what, str(error))
    run.no_result.unlink(missing_ok=True)
    try:
        return job()
    except Exception as error:
        trouble = str(error) if isinstance(error, UserError) else disk_trouble(error)
        if trouble is None:
            traceback.print_exc()
        with suppress(OSError):  # a full disk; `failures` knows about it
            write_text(run.no_result, (trouble or repr(error)).removeprefix(f"{run.path} "))
        return failed(run, what, trouble or repr(error))


def failed(run: RunDir, what: str, trouble: str) -> float:
    """Say that a run failed, remember it and return NaN as its objective."""
    logger.warning(f"this {what} failed: {trouble}")
    failures.append(run.path)
    return math.nan
