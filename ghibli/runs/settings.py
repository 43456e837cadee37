"""Settings as flat key -> value: which ones count for a run's result, and how two sets differ."""

from collections.abc import Iterator
from typing import Any

from ghibli.config.files import from_yaml, read_settings
from ghibli.config.keys import affects_result
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import list_hint, resume_command
from ghibli.runtime.errors import UserError

DEFAULTS_OF_OTHER_KEYS = ("data.epochs", "data.accumulate", "model.lr")  # the keys set from them do count
Difference = tuple[str, Any, Any]  # full key, the first value, the second


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to full key -> value; lists and empty sections are values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        is_section = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def relevant_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings and keep those that can change a run's result.

    The folder of images that are drawn from a seed is not one: wherever it is, its content is the same.
    """
    flat = flatten(settings)
    is_drawn = any(key.startswith("data.draw.") for key in flat)
    return {
        key: value
        for key, value in flat.items()
        if affects_result(key) and key not in DEFAULTS_OF_OTHER_KEYS and not (is_drawn and key == "data.root")
    }


def stored_settings(run: RunDir) -> dict[str, Any]:
    """Read the relevant settings of a run's config.yaml; empty when the file cannot be read."""
    return relevant_settings(read_settings(run.config) or {})


def finished_config(run: RunDir) -> Config:
    """Read the settings of a finished run.

    Raises:
        UserError: no such folder, no run in it, or one that has not finished.
    """
    if not run.config.is_file():
        raise UserError(f"{run.path} holds no run {list_hint()}")
    if run.status.state != "finished":
        raise UserError(f"{run.path} is {run.status.state}, not finished: {resume_command(run.path)}")
    return from_yaml(run.config)


def differences(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Difference]:
    """Yield every key whose value differs between flat settings; a missing one has the value `not set`."""
    for key in dict.fromkeys([*first, *second]):
        pair = first.get(key, "not set"), second.get(key, "not set")
        if pair[0] != pair[1]:
            yield key, *pair


def describe_differences(found: list[Difference], where: str) -> str:
    """List differences between stored and given settings: `lora.rank is 32 WHERE, 16 requested; ...`."""
    return "; ".join(
        f"{key} is {as_yaml(stored)} {where}, {as_yaml(given)} requested" for key, stored, given in found
    )


def as_yaml(value: Any) -> str:
    """Format a value as it is typed in YAML, without quotes."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
