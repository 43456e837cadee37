"""One run with several seeds: the further trainings, each in a folder beside the first, and what all say."""

import logging
from collections.abc import Callable
from functools import partial

from ghibli.config.schema import Config
from ghibli.evaluation.scores import best_probe
from ghibli.evaluation.seeds import over_seeds
from ghibli.runs.attempts import attempt
from ghibli.runs.find import has_checkpoint
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import repetition, with_seed
from ghibli.runs.reuse import has_ended, require_free
from ghibli.runtime.commands import command_here
from ghibli.runtime.console import relative_path
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)

Train = Callable[[Config, RunDir, bool], float]  # (settings, folder, resumes) -> objective


def train_other_seeds(
    first: RunDir, seeds: list[int], config: Config, resumed: RunDir | None, train: Train
) -> None:
    """Train what is missing of a run with several seeds; a training that fails stops none of the others.

    Args:
        first: trained with seeds[0]; the others lie beside it.
        config: its settings.
        resumed: the one of them that this command has resumed: the others go on from checkpoints that are
            there, whatever code they were made by; None = a new run.
    """
    for number, seed in enumerate(seeds[1:], start=2):
        run, own = repetition(first, seed), with_seed(config, first, seed)
        resumes = resumed is not None and has_checkpoint(run)
        if run == resumed and has_ended(own, run):
            continue
        logger.info("")
        logger.info(f"seed {seed}: training {number} of {len(seeds)}, {relative_path(run.path)}")
        check = partial(require_free, own, run, resumes)
        attempt(run, partial(train, own, run, resumes), "training", check)


def runs_of(first: RunDir, seeds: list[int]) -> dict[int, RunDir]:
    """Return seed -> folder of a run with several seeds."""
    return {seed: first if seed == seeds[0] else repetition(first, seed) for seed in seeds}


def closing_lines(first: RunDir, seeds: list[int]) -> list[str]:
    """Say what the trainings with several seeds come to.

    Raises:
        UserError: fewer than two of them have a result on the same items.
    """
    runs = {seed: run for seed, run in runs_of(first, seeds).items() if run.status.state == "finished"}
    probes = {seed: best_probe(run) for seed, run in runs.items()}
    found = over_seeds({seed: probe for seed, probe in probes.items() if probe is not None})
    if found is None:
        raise UserError(
            f"seeds={len(seeds)}: fewer than two trainings have a result on the same held-out images, so "
            f"there is no mean ({relative_path(first.path)} and the folders beside it say why)"
        )
    missing = [seed for seed in seeds if seed not in found.seeds]
    lines = [f"missing  seed {', '.join(map(str, missing))}: no result"] if missing else []
    folders = [relative_path(runs[seed].path) for seed in found.seeds]
    return ["", *found.lines, *lines, f"next     {command_here('ghibli', 'report', *folders)}"]
