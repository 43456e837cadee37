"""Range and choice checks that name the key."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ghibli.runtime.errors import UserError, did_you_mean


def require(ok: bool, key: str, value: Any, accepted: str) -> None:
    """Raise a UserError naming key, value and what is accepted, unless `ok` and every number is finite."""
    if not ok or next(not_finite(value), None) is not None:
        text = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{typed(key, text)} is out of range: {accepted}")


def require_finite(key: str, value: Any) -> None:
    """Raise a UserError for a value with NaN or inf in it, however deep, naming the key.

    Args:
        key: a key such as loss.guidance, or an option such as --scale.
        value: anything; dictionaries, lists and dataclasses are searched.
    """
    for place, number in not_finite(value):
        raise UserError(f"{typed(key + place, number)} is not a finite number")


def not_finite(value: Any) -> Iterator[tuple[str, float]]:
    """Yield (place, number) of every float that is not finite; the place is such as `.lr` or `[2]`."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield "", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from ((f".{key}{place}", number) for place, number in not_finite(inner))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from ((f"[{index}]{place}", number) for place, number in not_finite(inner))
    elif dataclasses.is_dataclass(value):
        yield from not_finite({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})


def typed(key: str, value: Any) -> str:
    """Return a setting as the user typed it: `lora.rank=0`, `--scale nan`."""
    return f"{key} {value}" if key.startswith("--") else f"{key}={value}"


def require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless the value is one of the choices."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise UserError(f"{key}={value} is unknown: choose one of {', '.join(choices)}{hint}")


def share(option: str, text: str) -> float:
    """Read a share that was typed as a percentage or a fraction, `1%` or `0.01`; above 0 and below 1.

    Raises:
        UserError: it is neither, or out of range.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        if "_" in number:  # a number to Python, and a slip of the finger to everyone else
            raise ValueError
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"{option} {text} is not a share: give it as 1% or 0.01") from None
    if not 0 < value < 1:
        raise UserError(f"{option} {text} is out of range: above 0 and below 100% (1% is 0.01)")
    return value
