"""The Trainer's flags by name: the same as those of the installed Lightning."""

import inspect

import lightning

from ghibli.config.trainer_flags import REFUSED_FLAGS, REQUIRED_FLAGS, TRAINER_FLAGS


def test_the_names_are_those_of_the_installed_lightning() -> None:
    installed = set(inspect.signature(lightning.Trainer).parameters)
    assert set(TRAINER_FLAGS) == installed, f"lightning {lightning.__version__} has other flags"
    assert len(TRAINER_FLAGS) == len(installed)


def test_flags_with_rules_exist_and_are_required_or_refused() -> None:
    assert set(REQUIRED_FLAGS) | set(REFUSED_FLAGS) <= set(TRAINER_FLAGS)
    assert not set(REQUIRED_FLAGS) & set(REFUSED_FLAGS)
