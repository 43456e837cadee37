"""Repetitions of a run with other seeds: their folders beside the first one's, and their settings."""

import re
from dataclasses import asdict
from pathlib import Path

from ghibli.config.files import apply_overrides, from_yaml
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.here import on_this_machine
from ghibli.runs.settings import differences, flatten
from ghibli.runtime.commands import path_setting
from ghibli.runtime.errors import UserError

REPEAT = "+seed="  # in the folder name of a run that repeats another one with another seed
MEMBER = re.compile(rf"(?P<first>.+){re.escape(REPEAT)}\d+", re.DOTALL)


def repetition(first: RunDir, seed: int) -> RunDir:
    """Return the folder of a run's repetition with another seed, beside its own."""
    return RunDir(first.path.with_name(f"{first.path.name}{REPEAT}{seed}"))


def repeated_config(first: RunDir, seed: int, cache_dir: str) -> Config:
    """Return the settings of a stored run's repetition.

    Args:
        cache_dir: of this command: the first run may be a stranger's.
    """
    return with_seed(on_this_machine(from_yaml(first.config), cache_dir), first, seed)


def with_seed(config: Config, first: RunDir, seed: int) -> Config:
    """Return the settings of the repetition of a run with these; a dashboard shows its folder's name."""
    config = apply_overrides(config, [f"seed={seed}", "seeds=1"], ("seed", "seeds"))
    config.wandb.name = repetition(first, seed).path.name
    return config


def first_of(run: RunDir) -> RunDir:
    """Return the run that a run repeats with another seed; itself if it repeats none that is there."""
    match = MEMBER.fullmatch(run.path.resolve().name)
    if match is None:
        return run
    first = RunDir(Path(run.path).with_name(match["first"]))
    return first if first.config.is_file() else run


def planned_seeds(run: RunDir, config: Config) -> tuple[RunDir, list[int]]:
    """Return the first run and all seeds of the trainings that a run is one of; itself if it is the only one.

    Args:
        config: the settings of `run`.
    """
    first = first_of(run)
    if first is not run:
        try:
            config = from_yaml(first.config)
        except UserError:  # it is damaged: then nobody knows of others
            return run, [config.seed]
    return first, [config.seed + number for number in range(config.seeds)]


def shares_settings_with(run: RunDir, config: Config) -> RunDir:
    """Return the first of the trainings with several seeds that a run is one of; itself if it is alone.

    What `sweep.repeats` trained is alone: the study's settings say how many there are.
    """
    first, seeds = planned_seeds(run, config)
    return first if config.seed in seeds else run


def refuse_change_of_one(run: RunDir, stored: Config, config: Config) -> None:
    """Check that one of the further trainings with several seeds is resumed as it is.

    Raises:
        UserError: its settings were changed, and those of the others would stay.
    """
    first, seeds = planned_seeds(run, config)
    if shares_settings_with(run, stored) is run:
        return
    found = differences(*(flatten(asdict(one)) for one in (stored, config)))
    changed = [key for key, *_ in found if key != "cache_dir"]
    if changed:
        raise UserError(
            f"{path_setting('resume', run.path)}: one of {len(seeds)} trainings that share all settings "
            f"but the seed: give {', '.join(changed)} beside {path_setting('resume', first.path)}, for all"
        )
