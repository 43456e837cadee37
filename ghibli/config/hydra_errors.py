"""What is wrong with a command, in one line: Hydra's and OmegaConf's words, and keys that do not exist."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ghibli.config import schema
from ghibli.config.schema import RENAMED_KEYS, Config
from ghibli.config.trainer_flags import reject_unknown_flags
from ghibli.runtime.errors import UserError, did_you_mean


def reject_unknown_keys(node: Any, section: type, prefix: str = "") -> None:
    """Raises for keys that slipped past the schema through a `+key=value` override."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key in node:
        if key not in fields:
            raise UserError(unknown_key(f"{prefix}{key}", fields))
        inner = fields[key].type
        if dataclasses.is_dataclass(inner) and node._get_node(key) is not None:
            reject_unknown_keys(node[key], inner, f"{prefix}{key}.")


def unknown_key(key: str, known: Any) -> str:
    """The sentence for a key that is not there: one of that name elsewhere, or a similar one here."""
    prefix, _, name = key.rpartition(".")
    if (prefix, name) in RENAMED_KEYS:
        return f"unknown key {key}: it is called {prefix}.{RENAMED_KEYS[prefix, name]} now"
    elsewhere = [full for full in all_keys(Config) if full.endswith(f".{name}") and full != key]
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, known)
    here = f"in {prefix}" if prefix else "at the top"
    return f"unknown key {key}{hint} (known {here}: {', '.join(known)})"


def all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every key of the schema in full, such as lora.rank."""
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            yield from all_keys(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turns the exceptions of Hydra and OmegaConf into a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's several lines as one that names the key and what is accepted."""
    text = f"{error}\n{error.__cause__ or ''}"
    own = re.search(r"UserError raised while resolving interpolation: (.*)", text)
    if own:
        return own[1]
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read `{error.override}`: expected KEY=VALUE without spaces around =; a text with commas "
            """or spaces needs quotes twice, 'KEY="a, b"', and a list brackets, 'KEY=["a, b",c]'"""
        )
    override = re.search(r"Could not override '([^']+)'", text)
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown and hasattr(schema, unknown[2]):
        known = [field.name for field in dataclasses.fields(getattr(schema, unknown[2]))]
        return unknown_key(override[1] if override else getattr(error, "full_key", unknown[1]), known)
    if override and override[1].startswith("trainer."):
        flag = override[1].removeprefix("trainer.")
        reject_unknown_flags([flag])
        return f"trainer.{flag} has no default here: give it with a plus, +trainer.{flag}=..."
    group = re.search(r"Could not find '(\w+)/([^']+)'\s+Available options in '\w+':(.*)", text, re.S)
    if group:
        choices = group[3].split("Config search path")[0].split()
        hint = did_you_mean(group[2], choices)
        return f"{group[1]}={group[2]} is unknown: choose one of {', '.join(choices)}{hint}"
    plugin = re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", text)
    if plugin:
        return missing_plugin(*plugin.groups())
    merging = re.match(r"Error merging override (.*)", str(error))
    if merging:
        return f"{merging[1].lstrip('+')}: {expected(str(error.__cause__))}"
    ambiguous = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if ambiguous:
        return f"{ambiguous[1]} could be several things: a list is KEY=[a,b], a grid of runs needs -m"
    if isinstance(error, InterpolationKeyError):
        reason = str(error).splitlines()[0]
        return f"{error.full_key} depends on a key that is not set ({reason}): give {error.full_key}=VALUE"
    if str(error).startswith("Multiple values for"):
        return f"{str(error).split('.')[0]}: give it once, as GROUP=NAME without a plus"
    return f"{key_of(error)}{re.split('full_key:|See https|Config search path', str(error))[0]}"


def missing_plugin(kind: str, name: str) -> str:
    """What to do about a launcher or sweeper that is not there."""
    if (kind, name) == ("sweeper", "optuna"):
        return "hydra/sweeper=optuna is not needed: python sweep.py sweep.search=12 asks Optuna itself"
    extra = name.split("_")[0]
    if kind == "launcher" and extra in ("ray", "submitit", "joblib"):
        return f'hydra/{kind}={name} is not installed: pip install -e ".[{extra}]"'
    return f"hydra/{kind}={name} is unknown; launchers: basic, joblib, ray, submitit_local, submitit_slurm"


def expected(text: str) -> str:
    """OmegaConf's words for a value of the wrong type, as what is expected instead."""
    section = re.search(r"is not a subclass of (\w+)Config", text)
    if section and hasattr(schema, f"{section[1]}Config"):
        fields = dataclasses.fields(getattr(schema, f"{section[1]}Config"))
        return f"expected a section; set its keys one by one ({', '.join(f.name for f in fields)})"
    kinds = {
        "converted to Integer": "a whole number", "converted to Float": "a number",
        "not a valid bool": "true or false", "is not a ListConfig": "a list: [VALUE,VALUE]",
        "is not Optional": "a value, not null",
    }  # fmt: skip
    kind = next((words for sign, words in kinds.items() if sign in text), None)
    return f"expected {kind}" if kind else text.splitlines()[0]


def key_of(error: Exception) -> str:
    """`KEY: ` of an OmegaConf error that knows its key, unless its text names it."""
    key = getattr(error, "full_key", None)
    return f"{key}: " if key and key not in str(error).split("full_key:")[0] else ""
