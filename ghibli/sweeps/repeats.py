"""Train the best trials of a study again with other seeds: how much chance alone changes."""

import logging
from collections.abc import Callable

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import repeated_config, repetition
from ghibli.sweeps.grid import Study
from ghibli.sweeps.jobs import run_trial
from ghibli.sweeps.trials import read_trials

logger = logging.getLogger(__name__)


def repeat_best_trials(study: Study, train: Callable[[Config, RunDir], float]) -> None:
    """Train the `sweep.best` best trials `sweep.repeats` more times each, with the next seeds."""
    first_attempts = [trial for trial in read_trials(study.folder) if trial.gain and not trial.repeats]
    for trial in first_attempts[: study.settings.best]:
        for number in range(1, study.settings.repeats + 1):
            repeat_trial(study, trial.run, trial.settings["seed"] + number, train)


def repeat_trial(study: Study, first: RunDir, seed: int, train: Callable[[Config, RunDir], float]) -> None:
    """Train a trial again with another seed."""
    run = repetition(first, seed)
    logger.info(run.path.name)
    run_trial(run, lambda: train(repeated_config(first, seed, study.cache_dir), run))
