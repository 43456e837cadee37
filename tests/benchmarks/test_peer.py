"""Two trainers in turns: the ratio of their steps, each timed inside its own process."""

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import peer
from ratios import ratio

SCRIPT = """
import sys, time, torch
weight = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
time.sleep(0.3)  # loading is no step
for step in range(int(sys.argv[2])):
    time.sleep(float(sys.argv[1]))
    weight.grad = torch.ones(2)
    optimizer.step()
    {}
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "trainer.py").write_text(SCRIPT.format(""))
    return tmp_path / "trainer.py"


def test_a_process_runs_only_in_its_turns(script: Path, tmp_path: Path) -> None:
    trainer = peer.Trainer([str(script), "0.02", str(2 * peer.TURN + 1)], tmp_path / "one")
    assert trainer.is_alive and list(map(len, trainer.turns())) == [peer.TURN]
    trainer.take_turn()
    turns = trainer.turns()
    assert list(map(len, turns)) == [peer.TURN] * 2
    assert np.median(turns) >= 0.02
    assert turns[1][0] < 0.3  # what it waited for its turn does not count
    trainer.take_turn()
    assert not trainer.is_alive and len(trainer.turns()) == 2  # the incomplete turn is left out


def test_what_fails_is_shown(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('no such base')")
    trainer = peer.Trainer([str(tmp_path / "broken.py")], tmp_path / "one")
    with pytest.raises(SystemExit, match="no such base"):
        trainer.turns()


def test_the_ratio_of_times_that_are_known() -> None:
    """Twice as fast within noise of a tenth; the interval holds the truth and is narrow."""
    draw = np.random.default_rng(1)
    own, theirs = (list(scale * draw.lognormal(0, 0.1, 40)) for scale in (0.1, 0.2))
    found = ratio(theirs, own)
    assert found.low < 2 < found.high
    assert found.high - found.low < 0.3
    assert found.value == pytest.approx(np.median(theirs) / np.median(own))
