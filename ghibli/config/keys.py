"""The schema's keys: all of them, the sentence for an unknown one, and those that change no result."""

import dataclasses
from collections.abc import Iterator

from ghibli.config.schema import NO_EFFECT, RENAMED_KEYS, Command, Config
from ghibli.runtime.errors import did_you_mean


def all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Yield every full key of a section of the schema, such as lora.rank."""
    for field in dataclasses.fields(section):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from all_keys(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def unknown_key(key: str, known: list[str]) -> str:
    """Describe an unknown key: its new name, the same name in another section, or a similar one here.

    Args:
        known: the names in the section that the key was looked up in.
    """
    prefix, _, name = key.rpartition(".")
    if (prefix, name) in RENAMED_KEYS:
        return f"unknown key {key}: it is now called {prefix}.{RENAMED_KEYS[prefix, name]}"
    elsewhere = [full for full in all_keys(Config) if full.endswith(f".{name}") and full != key]
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, known)
    level = f"in {prefix}" if prefix else "at the top level"
    names = f" (known {level}: {', '.join(known)})" if known else ""
    return f"unknown key {key}{hint}{names}"


def keys_without_effect(section: type = Command, prefix: str = "") -> Iterator[str]:
    """Yield the keys and whole sections that the schema marks as unable to change a run's result."""
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        if field.metadata == NO_EFFECT:
            yield key
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from keys_without_effect(field.type, f"{key}.")


def affects_result(key: str) -> bool:
    """Return whether another value of this full key can change a run's result."""
    return not any(key == other or key.startswith(f"{other}.") for other in keys_without_effect())
