"""The settings of a resumed run: its own, with the few changes that are allowed on the command line."""

import dataclasses
from typing import Any

import yaml
from omegaconf import OmegaConf

from ghibli.config.files import LONGEST, as_node, from_yaml, plain_yaml, to_dataclass
from ghibli.config.keys import affects_result
from ghibli.config.schema import Config
from ghibli.config.trainer_flags import reject_unknown_flags
from ghibli.runs.compose import parse_overrides
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import Difference, describe_differences, differences, flatten
from ghibli.runtime.commands import path_setting
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_plain

PLACES = {  # key of a folder or file -> the hash in status.json of its content
    "data.root": "data_hash", "data.regularization": "regularization_hash",
    "model.path": "base_hash", "model.config": "base_hash", "model.adapter": "base_hash",
    "lora.init": "init_hash",
}  # fmt: skip
OPTIONAL = ("data.regularization", "lora.init")  # of these: without a place no hash is compared


def resumed_config(run: RunDir, overrides: Any) -> Config:
    """Return the run's own settings, with the allowed changes among the overrides given beside `resume`.

    Args:
        overrides: Hydra's record of them, `hydra.overrides` of a composed config.

    Raises:
        UserError: overrides ask for anything else; all of it is listed.
    """
    dropped = [text for text in overrides.hydra if not text.startswith("hydra.mode=")]
    if dropped:
        raise UserError(f"a resumed run continues in its own folder: drop {', '.join(dropped)}")
    stored = from_yaml(run.config)
    values, refused = overrides_beside_resume(run, overrides.task)
    config = with_values(stored, values)
    refused += refused_changes(stored, config, proven_places(run))
    if refused:
        what = describe_differences(refused, "in this run")
        raise UserError(
            f"{path_setting('resume', run.path)}: {what}; only trainer.max_epochs may change, and only grow: "
            "start a new run for other settings"
        )
    return config


def overrides_beside_resume(run: RunDir, overrides: list[str]) -> tuple[dict[str, Any], list[Difference]]:
    """Split overrides: (key -> value, groups for which the run was started with another choice)."""
    choices = chosen_groups(run)
    values, refused = {}, []
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if override.is_delete():
            raise UserError(f"a resumed run keeps its own settings: drop {override.input_line}")
        if key not in ("model", "data", "compute", "experiment"):
            values[key] = override.value()
        elif choices.get(key) != override.value():
            refused.append((key, choices.get(key), override.value()))
    values.pop("resume")
    return values, refused


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with these values; as in conf/, max_epochs follows data.epochs if it did."""
    content = as_node(config)
    for key, value in values.items():
        OmegaConf.update(content, key, value, force_add=key.startswith("trainer."))
    if "trainer.max_epochs" not in values and config.trainer["max_epochs"] == config.data.epochs:
        content.trainer.max_epochs = content.data.epochs
    changed = to_dataclass(OmegaConf.to_container(content, resolve=True))
    reject_unknown_flags(changed.trainer)
    return changed


def proven_places(run: RunDir) -> list[str]:
    """List the keys that may name another place now, since status.json has the hash of what was there.

    Before the first step that hash is compared with the content of the new place.
    """
    status = run.status.read()
    return [key for key, proof in PLACES.items() if status.get(proof)]


def refused_changes(stored: Config, config: Config, proven: list[str]) -> list[Difference]:
    """List the differences that a resumed run must not have.

    That is all that affects its result, but more epochs, and the places whose content a hash proves.
    """
    grows = config.trainer["max_epochs"] > stored.trainer["max_epochs"]
    growth = ("trainer.max_epochs", "data.epochs") if grows else ()

    def is_allowed(key: str, *values: Any) -> bool:
        is_proven = key in proven and not (key in OPTIONAL and None in values)
        return is_proven or key in growth or not affects_result(key)

    found = differences(*(flatten(dataclasses.asdict(one)) for one in (stored, config)))
    return [change for change in found if not is_allowed(*change)]


def chosen_groups(run: RunDir) -> dict[str, str]:
    """Read the choice of each group that a run was started with; empty when Hydra's file is unreadable."""
    try:
        content = plain_yaml(read_plain(run.path / ".hydra" / "hydra.yaml", LONGEST).decode())
        choices = content["hydra"]["runtime"]["choices"]
        return {str(group): choice for group, choice in choices.items() if isinstance(choice, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
