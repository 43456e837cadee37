"""Train the best trials of a study again with other seeds: how much chance alone changes."""

import logging
from collections.abc import Callable

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import repeated_config, repetition
from ghibli.sweeps.grid import Study
from ghibli.sweeps.jobs import run_trial
from ghibli.sweeps.trials import read_trials
from ghibli.sweeps.winner import is_close

logger = logging.getLogger(__name__)

UNASKED = 2  # repeats of each where the order of the best two is open: the fewest that have a spread


def repeat_best_trials(study: Study, train: Callable[[Config, RunDir], float]) -> None:
    """Train the `sweep.best` best trials `sweep.repeats` more times each, with the next seeds.

    Unasked, where the order of the best two may be chance: with two more seeds.
    """
    trials, repeats = read_trials(study.folder), study.settings.repeats
    best = [trial for trial in trials if trial.gain and not trial.repeats][: study.settings.best]
    if repeats is None:
        if not is_close(trials):
            return
        repeats = UNASKED
        logger.info(
            f"the second trial is within two errors of the best: training the best {len(best)} with "
            f"{repeats} more seeds each (sweep.repeats=0 leaves that out)"
        )
    for trial in best:
        for number in range(1, repeats + 1):
            repeat_trial(study, trial.run, trial.settings["seed"] + number, train)


def repeat_trial(study: Study, first: RunDir, seed: int, train: Callable[[Config, RunDir], float]) -> None:
    """Train a trial again with another seed."""
    run = repetition(first, seed)
    logger.info(run.path.name)
    run_trial(run, lambda: train(repeated_config(first, seed, study.cache_dir), run))
