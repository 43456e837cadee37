"""Train the best trials of a study again with other seeds: how much chance alone changes."""

import logging
from collections.abc import Callable
from itertools import count, islice

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import repeated_config, repetition
from ghibli.sweeps.grid import Study
from ghibli.sweeps.jobs import run_trial
from ghibli.sweeps.trials import read_trials
from ghibli.sweeps.winner import by_settings, is_close

logger = logging.getLogger(__name__)

UNASKED = 2  # further seeds of the best two where their order is open: the fewest that have a spread


def repeat_best_trials(study: Study, train: Callable[[Config, RunDir], float]) -> None:
    """Train the `sweep.best` best trials `sweep.repeats` more times each, with the next seeds.

    Unasked, where the order of the best two settings may be chance: with two more seeds each. Not with a
    launcher, as they would be trained by this process, where the study may not be.
    """
    trials, repeats = read_trials(study.folder), study.settings.repeats
    groups = by_settings(trials)
    if repeats is not None:
        for best, *_ in groups[: study.settings.best]:
            for number in range(1, repeats + 1):
                repeat_trial(study, best.run, best.settings["seed"] + number, train)
    elif study.is_local and is_close(trials):
        logger.info(
            f"the second trial is within two errors of the best: training both with {UNASKED} more seeds "
            "(sweep.repeats=0 leaves that out)"
        )
        for best, *others in groups[:2]:
            taken = {trial.settings["seed"] for trial in (best, *others)}
            free = (seed for seed in count(best.settings["seed"] + 1) if seed not in taken)
            for seed in islice(free, max(0, UNASKED - len(others))):
                repeat_trial(study, best.run, seed, train)


def repeat_trial(study: Study, first: RunDir, seed: int, train: Callable[[Config, RunDir], float]) -> None:
    """Train a trial again with another seed."""
    run = repetition(first, seed)
    logger.info(run.path.name)
    run_trial(run, lambda: train(repeated_config(first, seed, study.cache_dir), run))
