"""Range and choice checks that name the key."""

import math
from typing import Any

from ghibli.runtime.errors import UserError, did_you_mean


def require(ok: bool, key: str, value: Any, accepted: str) -> None:
    """Raise a UserError naming key, value and what is accepted, unless `ok` and the value is finite."""
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        text = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{key}={text} is out of range: {accepted}")


def require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless the value is one of the choices."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise UserError(f"{key}={value} is unknown: choose one of {', '.join(choices)}{hint}")
