"""Turn the errors of Hydra and OmegaConf, several lines each, into one line that names the key."""

import dataclasses
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from ghibli.config import schema
from ghibli.config.keys import unknown_key
from ghibli.config.trainer_flags import TRAINER_FLAGS, unknown_flag
from ghibli.runtime.commands import command_here, install_command
from ghibli.runtime.errors import UserError, did_you_mean, first_line


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn exceptions of Hydra and OmegaConf into a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        if str(error).startswith("Only one of --run"):
            raise UserError(str(error)) from error
        if not str(error).startswith("Config group override"):
            raise
        groups = "model, data, grid and experiment take a name, such as model=sd15"
        raise UserError(f"{groups}; leave one out for its default") from error
    except AssertionError as error:  # OmegaConf's, where a key lies below a section that is null
        override = override_being_applied(error)
        if override is None:
            raise
        section = override.lstrip("+").partition("=")[0].rpartition(".")[0]
        raise UserError(
            f"{override}: {section} is null here and has no keys: choose another group, such as data=demo, "
            f"or give the whole section, {section}={{...}}"
        ) from error


def override_being_applied(error: BaseException) -> str | None:
    """Return the override, as typed, that Hydra was applying when an error was raised; None if none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_apply_overrides_to_config" and "override" in frame.f_locals:
            return frame.f_locals["override"].input_line
    return None


def explain(error: Exception) -> str:
    """Explain the commonest errors in one line; of any other, return the first line, with its key."""
    if isinstance(error.__cause__, UserError):  # raised by a check in the schema
        return str(error.__cause__)
    if isinstance(error, OverrideParseException):
        return (
            f"cannot parse `{error.override}`: expected KEY=VALUE without spaces around =; text with commas "
            """or spaces needs two pairs of quotes, 'KEY="a, b"', and a list brackets, 'KEY=["a, b",c]'"""
        )
    text = f"{error}\n{error.__cause__ or ''}"
    for pattern, sentence in EXPLANATIONS:
        match = re.search(pattern, text)
        if match:
            return match.expand(sentence) if isinstance(sentence, str) else sentence(match)
    line, key = first_line(error), getattr(error, "full_key", None)
    return f"{key}: {line}" if key and key not in line else line


def names_in(section: str) -> list[str]:
    """List the field names of a dataclass of the schema; none for a section of Hydra's own."""
    found = getattr(schema, section, None)
    return [field.name for field in dataclasses.fields(found)] if found else []


def unset_flag(match: re.Match[str]) -> str:
    """Explain trainer.FLAG=VALUE for a flag without a default in conf/."""
    flag = match[1]
    if flag not in TRAINER_FLAGS:
        return unknown_flag(flag)
    return f"trainer.{flag} has no default here: add it with a plus, +trainer.{flag}=..."


def unknown_option(match: re.Match[str]) -> str:
    """Explain GROUP=NAME for a name that conf/GROUP does not have."""
    group, name, choices = match[1], match[2], match[3].split()
    return f"{group}={name} is unknown: choose one of {', '.join(choices)}{did_you_mean(name, choices)}"


def missing_plugin(match: re.Match[str]) -> str:
    """Explain how to get a launcher or sweeper that is not installed."""
    kind, name = match.groups()
    if (kind, name) == ("sweeper", "optuna"):
        command = command_here("python", "sweep.py", "sweep.search=12")
        return f"hydra/sweeper=optuna is not needed: {command} uses Optuna itself"
    extra = name.split("_")[0]
    if kind == "launcher" and extra in ("ray", "submitit", "joblib"):
        return f"hydra/{kind}={name} is not installed: {install_command(extra)}"
    return f"hydra/{kind}={name} is unknown; launchers: basic, joblib, ray, submitit_local, submitit_slurm"


OVERRIDE = r"Error merging override \+*(.+)\n.*"  # a line of Hydra, then the reason by OmegaConf
EXPLANATIONS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # pattern in the error's text, or in that of its cause -> the explanation
    (r"UserError raised while resolving interpolation: (.*)", r"\1"),
    (
        r"Key '.+' not in '(\w+)'\s+full_key: (\S+)",
        lambda match: unknown_key(match[2], names_in(match[1])),
    ),
    (r"Key '.+' is not in struct\s+full_key: trainer\.(\w+)", unset_flag),
    (OVERRIDE + "converted to Integer", r"\1: expected a whole number"),
    (OVERRIDE + "converted to Float", r"\1: expected a number"),
    (OVERRIDE + "is not a valid bool", r"\1: expected true or false"),
    (OVERRIDE + "is not a ListConfig", r"\1: expected a list, [VALUE,VALUE]"),
    (OVERRIDE + "is not Optional", r"\1: expected a value, not null"),
    (
        OVERRIDE + r"is not a subclass of (\w+Config)\.",
        lambda match: (
            f"{match[1]}: expected a section; set its keys instead ({', '.join(names_in(match[2]))})"
        ),
    ),
    (OVERRIDE + "Cannot assign .+ to Dict", r"\1: expected entries, each with a plus: +KEY.NAME=VALUE"),
    (r"Error merging override \+*(.+)\n(.*)", r"\1: \2"),
    (r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", missing_plugin),
    (
        r"Could not find '(\w+)/(.+)'\s+Available options in '\w+':\s+([\w\s.-]+?)\s+Config search path",
        unknown_option,
    ),
    (r"An item is already at '(.+)'\.", r"\1 has a value already: drop the plus"),
    (r"Multiple values for (\w+)\.", r"\1 is given more than once: give it once, \1=NAME without a plus"),
    (
        r"Ambiguous value for argument '(.+)'",
        r"\1 is ambiguous: write a list as KEY=[a,b]; a grid of runs needs -m",
    ),
    (
        r"(Interpolation key '.+' not found)\s+full_key: (\S+)",
        r"\2 depends on a key that is not set (\1): give \2=VALUE",
    ),
)
