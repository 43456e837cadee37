"""Paths on the command line: taken as they are typed, `~` expanded, before Hydra's grammar reads the rest.

Hydra would refuse `data.root=/home/me/Ghibli (1)` and read `data.root=1e3` as a number. What is no plain path
stays Hydra's: null, a value in quotes, an interpolation, and in a sweep several values.
"""

import re

from ghibli.runtime.errors import UserError
from ghibli.runtime.home import exists, expanded

PATH_KEYS = (
    "resume", "cache_dir", "data.root", "data.exclude", "data.reference", "data.regularization",
    "model.path", "model.config", "model.adapter", "model.clip", "lora.init", "local.sd15",
    "local.sd15_config", "local.ghibli", "evaluate.inception", "hydra.run.dir", "hydra.sweep.dir",
)  # fmt: skip
OVERRIDE = re.compile(rf"(\+{{0,2}}({'|'.join(map(re.escape, PATH_KEYS))})=)(.*)", re.DOTALL)
PLAIN = re.compile(r"[\w./@%+-]*/[\w./@%+-]*|(?!null|true|false|inf|nan)[a-z_][a-z_-]*", re.ASCII | re.I)
SEVERAL = re.compile(r",|\[.*\]|(choice|range|interval|glob|sort|shuffle|tag)\(.*\)")


def path_key(override: str) -> tuple[str, str, str] | None:
    """Split `KEY=PATH` of a path key: (KEY= with its pluses, the key, the path as typed); None for others."""
    match = OVERRIDE.fullmatch(override)
    return None if match is None else (match[1], match[2], match[3])


def with_typed_paths(overrides: list[str], sweeps: bool = False) -> list[str]:
    """Return overrides for Hydra, in which every plain path is quoted as its grammar wants.

    Args:
        sweeps: `a,b` and `choice(a,b)` are several values, unless a file or folder has that very name.

    Raises:
        UserError: a path that Hydra cannot take.
    """
    return [for_hydra(override, sweeps) for override in overrides]


def for_hydra(override: str, sweeps: bool) -> str:
    """Quote the path of one override, if it has one."""
    found = path_key(override)
    if found is not None and not found[2]:
        raise UserError(f"{override}: expected a path; leave it out for the default")
    if found is None or (path := plain_path(found[2], sweeps)) is None:
        return override
    if "${" in path:
        raise UserError(f"{override}: Hydra reads ${{ in a name as a reference: rename that folder")
    return found[0] + (path if PLAIN.fullmatch(path) else quoted(path))


def plain_path(typed: str, sweeps: bool = False) -> str | None:
    """Return a typed value as the path that it names, `~` expanded; None if it is not a plain path."""
    if typed.lower() in ("", "null"):
        return None
    path = at_its_home(typed)
    if not exists(path):
        is_quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\""
        if is_quoted or "${" in typed or (sweeps and SEVERAL.search(typed)):
            return None
    return path


def at_its_home(path: str) -> str:
    """Expand ~ or ~user at the beginning of a path, and leave all else as it is typed."""
    return str(expanded(path)) if path.startswith("~") else path


def at_home(word: str) -> str:
    """Expand `~/` in a word of a command where bash leaves it alone: `--to=~/x`, and in quotes."""
    option, path = re.fullmatch(r"(--[a-z-]+=)?(.*)", word, re.DOTALL).groups("")  # type: ignore[union-attr]
    return option + at_its_home(path) if path.startswith("~/") else word


def quoted(path: str) -> str:
    """Quote a path for Hydra's grammar, where only quotes, and backslashes before them, are escaped."""
    return "'" + re.sub(r"(\\*)('|\Z)", escaped, path) + "'"


def escaped(match: re.Match[str]) -> str:
    slashes, quote = match.groups()
    return 2 * slashes + (f"\\{quote}" if quote else "")
