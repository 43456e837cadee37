"""Which gain goes along with better images? `python docs/gain_check.py STUDY`, on evaluated trials.

For every trial of a study (`python sweep.py sweep.evaluate=true`): the gain of its best epoch, the gain with
all ranges of timesteps counted alike, and of its images in the cell nearest to real ones the style distance
and the caption fit. Prints Spearman's rank correlation of both gains with both, with 95 % intervals over
trials (bootstrap), and of the first minus the second on the same resamples.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from ghibli.report.run_data import timestep_gains, try_read
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.files import read_rows

FEWEST = 5  # trials, below which a rank correlation means nothing
RESAMPLES = 2000
GAINS = ("gain", "balanced gain")
IMAGES = {"distance": -1, "caption fit": 1}  # -1: lower is better


def row_of(run: RunDir) -> dict[str, float]:
    """Return gains, distance and caption fit of an evaluated trial."""
    rows = [{key: float(value or "nan") for key, value in row.items()} for row in read_rows(run.probe)]
    best = max(rows[1:], key=lambda row: row["probe/val_gain"])
    cell: dict[str, Any] = min(run.read_evaluation()["models"]["run"], key=lambda one: one["kernel"][0])
    ranges = [gain.value for gain in timestep_gains(best).values()]  # older trials have no balanced gain
    return {
        "gain": best["probe/val_gain"], "balanced gain": float(np.mean(ranges)),
        "distance": cell["kernel"][0], "caption fit": (cell["caption_fit"] or [np.nan])[0],
    }  # fmt: skip


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rho of two rows of numbers, -1 .. 1; NaN where all of a row are equal."""
    ranks = np.stack([scipy.stats.rankdata(values) for values in (one, other)])
    if (ranks.std(1) == 0).any():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def compare(rows: list[dict[str, float]], groups: list[str] | None = None, seed: int = 0) -> list[str]:
    """Return a line for each measure of the images: the correlation of both gains with it, and which wins.

    Args:
        groups: of each trial, such as its settings; trials of one group are resampled together.

    Raises:
        UserError: too few trials.
    """
    if len(rows) < FEWEST:
        raise UserError(f"{len(rows)} evaluated trials: at least {FEWEST} are needed")
    table = {key: np.array([row[key] for row in rows]) for key in (*GAINS, *IMAGES)}
    drawn = resampled(groups or [str(row) for row in range(len(rows))], seed)
    lines = [f"{len(rows)} trials; rank correlation, 1 = the best gain has the best images"]
    for key, sign in IMAGES.items():
        if np.isnan(table[key]).any():
            lines.append(f"{key}: not measured (model.clip)")
            continue
        every = [
            sign * np.array([rank_correlation(table[gain][i], table[key][i]) for i in drawn])
            for gain in GAINS
        ]
        texts = [
            f"{gain} {sign * rank_correlation(table[gain], table[key]):+.2f} ({interval(values)})"
            for gain, values in zip(GAINS, every, strict=True)
        ]
        lines.append(f"{key}: {', '.join(texts)}, difference {interval(every[0] - every[1])}")
    return lines


def resampled(groups: list[str], seed: int) -> list[np.ndarray]:
    """Return the trials of RESAMPLES bootstrap samples of the groups."""
    members = [np.flatnonzero(np.array(groups) == name) for name in dict.fromkeys(groups)]
    chosen = np.random.default_rng(seed).integers(len(members), size=(RESAMPLES, len(members)))
    return [np.concatenate([members[group] for group in one]) for one in chosen]


def interval(values: np.ndarray) -> str:
    """Format the 95 % interval of bootstrap values."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return f"{low:+.2f} .. {high:+.2f}"


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give the folder of a study: python docs/gain_check.py outputs/sweeps/slides")
    runs = [RunDir(file.parent) for file in sorted(Path(sys.argv[1]).glob("*/evaluation.json"))]
    rows = {run.path.name: try_read(partial(row_of, run)) for run in runs}
    for name, row in rows.items():
        if row is None:
            print(f"left out, as its files cannot be read: {name}")
    print("\n".join(compare([row for row in rows.values() if row is not None])))


if __name__ == "__main__":
    one_line_errors(main)
