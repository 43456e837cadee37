"""Runs as the page lists them: short names, with the gain in words."""

import math
import re
from collections import Counter
from typing import Any

from ghibli.runs.folder import RunDir

LABEL = 44  # letters of a run's name in the list


def run_label(run: RunDir, gain: Any) -> str:
    """Name a run in one short line, with its gain in words: `2026-11-28 21:40, 28.1 % better than ...`."""
    short = run_name(run)
    if isinstance(gain, bool) or not isinstance(gain, int | float) or not math.isfinite(gain):
        return short
    return f"{short}, {abs(100 * gain):.1f} % {'better' if gain >= 0 else 'worse'} than the base"


def run_name(run: RunDir) -> str:
    """Return a run's name, cut in its middle to LABEL letters; a date and time without the seconds."""
    name = re.sub(r"^(\d{4}-\d\d-\d\d)_(\d\d)-(\d\d)-\d\d", r"\1 \2:\3", run.path.name)
    return name if len(name) <= LABEL else f"{name[: LABEL // 2 - 2]} ... {name[-LABEL // 2 + 2 :]}"


def with_numbers(labels: list[str]) -> list[str]:
    """Make labels unique: the second of two equal ones ends in (2)."""
    seen: Counter[str] = Counter()
    found = []
    for label in labels:
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found
