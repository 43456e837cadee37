"""`docs/gain_check.py`: rank correlations of both gains with the images of evaluated trials."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from helpers.commands import REPO

from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_rows

SCRIPT = runpy.run_path(str(REPO / "docs" / "gain_check.py"))
CELL = {"sampler": "ddim", "guidance": 7.5, "frechet": 1.0, "recall": 1.0}


def evaluated(folder: Path, texture: float, layout: float, distance: float) -> RunDir:
    """A trial whose two ranges of timesteps have these gains and which draws at this distance."""
    folder.mkdir()
    row = {"epoch": 1, "probe/val_gain": 0.99 * texture + 0.01 * layout, "probe/val_gain_se": 0.01}
    row |= {"probe/val_gain_t0-499": texture, "probe/val_gain_t500-999": layout, "train/epoch_loss": ""}
    write_rows(folder / "probe.csv", tuple(row), [dict.fromkeys(row, 0.0), row])
    cells = [CELL | {"kernel": [d, 0.1], "caption_fit": [80 - d, 1.0]} for d in (distance + 5, distance)]
    (folder / "evaluation.json").write_text(json.dumps({"models": {"run": cells}}))
    return RunDir(folder)


@pytest.mark.slow
def test_the_gain_that_goes_with_the_images_is_seen(tmp_path: Path) -> None:
    """Images follow the layout, whose gain is invisible in the mean over losses."""
    rng = np.random.default_rng(0)
    texture, layout = rng.random(12), rng.random(12)
    runs = [evaluated(tmp_path / str(i), texture[i], layout[i], 9 - 8 * layout[i]) for i in range(12)]
    rows = [SCRIPT["row_of"](run) for run in runs]
    assert rows[3]["balanced gain"] == pytest.approx((texture[3] + layout[3]) / 2)
    assert rows[3]["distance"] == pytest.approx(9 - 8 * layout[3])  # of the nearer cell
    head, distance, captions = SCRIPT["compare"](rows)
    assert head.startswith("12 trials")
    for gain in SCRIPT["GAINS"]:
        rho = scipy.stats.spearmanr([row[gain] for row in rows], [-row["distance"] for row in rows]).statistic
        assert f"{gain} {rho:+.2f} (" in distance
        assert f"{gain} {rho:+.2f} (" in captions
    with pytest.raises(UserError, match="^4 evaluated trials: at least 5 are needed$"):
        SCRIPT["compare"](rows[:4])


def test_equal_ranks_count_as_scipy_counts_them() -> None:
    one, other = np.array([1.0, 1, 2, 3, 3, 5]), np.array([2.0, 1, 1, 4, 3, 3])
    wanted = scipy.stats.spearmanr(one, other).statistic
    assert SCRIPT["rank_correlation"](one, other) == pytest.approx(wanted)
