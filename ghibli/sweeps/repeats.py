"""Train the best trials of a study again with other seeds: how much chance alone changes."""

import logging
from collections.abc import Callable
from itertools import chain, count, islice

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import repeated_config, repetition
from ghibli.sweeps.grid import Study
from ghibli.sweeps.jobs import run_trial
from ghibli.sweeps.trials import Trial, read_trials
from ghibli.sweeps.winner import PAIRED_SEEDS, by_settings, is_close, shared_seeds

logger = logging.getLogger(__name__)


def repeat_best_trials(study: Study, train: Callable[[Config, RunDir], float]) -> None:
    """Train the `sweep.best` best trials `sweep.repeats` more times each, with the next seeds.

    Unasked, where the order of the best two settings may be chance: with the same two seeds each. Not with a
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
            "the second trial is within two errors of the best: training both with the same "
            f"{PAIRED_SEEDS} other seeds (sweep.repeats=0 leaves that out)"
        )
        for best, seed in missing_for_order(groups):
            repeat_trial(study, best.run, seed, train)


def missing_for_order(groups: list[list[Trial]]) -> list[tuple[Trial, int]]:
    """Return (trial to repeat, seed) until the best two groups share PAIRED_SEEDS that chose neither.

    Seeds that one of the two was trained with already come first.
    """
    bests = [best for best, *_ in groups[:2]]
    had = [{trial.settings["seed"] for trial in others} for _, *others in groups[:2]]
    chosen = {best.settings["seed"] for best in bests}
    new = (seed for seed in count(bests[0].settings["seed"] + 1) if seed not in chosen.union(*had))
    missing = max(0, PAIRED_SEEDS - len(shared_seeds(groups)))
    seeds = islice(chain(sorted((had[0] ^ had[1]) - chosen), new), missing)
    return [(best, seed) for seed in seeds for best, own in zip(bests, had, strict=True) if seed not in own]


def repeat_trial(study: Study, first: RunDir, seed: int, train: Callable[[Config, RunDir], float]) -> None:
    """Train a trial again with another seed."""
    run = repetition(first, seed)
    logger.info(run.path.name)
    run_trial(run, lambda: train(repeated_config(first, seed, study.cache_dir), run))
