"""Delete from the cache what was not used for long, or makes it too large; runs make it again."""

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ghibli.runs.find import OUTPUTS, folders_with
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

FILES_OF = (
    "base_grids",
    "base_scores",
    "evaluation",
    "latents",
    "price",
    "step_costs",
)  # folders of the cache, with a file per entry
DRAWN = "scenes-*"  # folders of drawn images, each an entry
DAY = 86_400.0  # seconds
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class Entry:
    """What is cached, and deleted, as one: a file, or a folder of drawn images."""

    path: Path
    size: int  # bytes
    used: float  # when it was last read or written, seconds since 1970

    @property
    def kind(self) -> str:
        """Return the name of its kind, for a summary."""
        return self.path.parent.name if self.path.parent.name in FILES_OF else "drawn images"


def entries(cache: Path) -> list[Entry]:
    """List what runs have cached, the longest unused first; other files in the folder are nobody's here."""
    found = [path for name in FILES_OF for path in (cache / name).glob("*.pt")]
    found += [path for path in cache.glob(DRAWN) if path.is_dir()]
    return sorted((entry_of(path) for path in found if not path.is_symlink()), key=lambda one: one.used)


def entry_of(path: Path) -> Entry:
    """Return size and last use of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    known = [file.lstat() for file in files] or [path.lstat()]
    used = max(max(one.st_mtime, one.st_atime) for one in known)
    return Entry(path, sum(one.st_size for one in known), used)


def chosen(found: list[Entry], days: float | None, most: float | None, now: float) -> list[Entry]:
    """Return what is to be deleted: entries unused for so many days, then the longest unused ones.

    Args:
        found: the longest unused first.
        days, most: days without use, and bytes that may stay; None = no limit.
        now: seconds since 1970.
    """
    old = [one for one in found if days is not None and now - one.used > days * DAY]
    rest = [one for one in found if one not in old]
    total = sum(one.size for one in rest)
    for one in rest:
        if most is None or total <= most:
            break
        old.append(one)
        total -= one.size
    return old


def parse_size(text: str) -> float:
    """Read a size, such as 2GB or 500MB, in bytes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if match is None:
        raise UserError(f"--keep {text} is no size: give it as 2GB or 500MB")
    return float(match[1]) * UNITS[match[2]]


def require_idle() -> None:
    """Raise a UserError while a run below outputs/ is trained, which may be reading the cache."""
    runs = map(RunDir, folders_with("status.json", OUTPUTS))
    running = next((run.path for run in runs if run.status.state == "running"), None)
    if running is not None:
        raise UserError(f"{running} is running and may need the cache: wait for its end")


def delete(found: Iterable[Entry]) -> None:
    """Delete entries."""
    for one in found:
        if one.path.is_dir():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)


def summaries(found: list[Entry], now: float | None = None) -> list[str]:
    """Say in a line per kind how many entries there are, how large, and for how long the oldest is unused."""
    now = time.time() if now is None else now
    lines = []
    for kind in dict.fromkeys(one.kind for one in found):
        own = [one for one in found if one.kind == kind]
        days = (now - min(one.used for one in own)) / DAY
        size = sum(one.size for one in own) / 1e6
        lines.append(f"{kind:<13} {len(own):>5} {size:>9.1f} MB   longest unused: {days:.0f} days")
    return lines
