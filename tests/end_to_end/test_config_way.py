"""How far a run hands its whole configuration on: a function that needs a part of it gets that part."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from helpers.commands import GRIDS, REPO

import train
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir

OURS = (str(REPO / "ghibli"), str(REPO / "train.py"))
MOST, DEEPEST = 30, 5  # functions, and functions on top of each other, in a run of commit 73ce106


def receives_config(frame: FrameType) -> bool:
    """Return whether a call of our code was given a Config, other than as `self`."""
    code = frame.f_code
    if not code.co_filename.startswith(OURS):
        return False
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(type(frame.f_locals.get(name)) is Config for name in names if name != "self")


@pytest.mark.slow
def test_a_run_passes_its_config_on_less_than_before_the_packages(
    make_config: Callable, tmp_path: Path
) -> None:
    """Counted as each function is called: all that get the whole config, and the longest chain of them."""
    functions: set[str] = set()
    chains: list[list[str]] = [[]]

    def note(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not receives_config(frame):
            return
        functions.add(f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}")
        chain, caller = [], frame
        while caller is not None:
            if receives_config(caller):
                chain.append(caller.f_code.co_qualname)
            caller = caller.f_back
        chains.append(chain)

    config = make_config(*GRIDS, "trainer.max_epochs=1", "data.batch_size=8", "sample.prompts=[A panda]")
    sys.setprofile(note)
    try:
        train.run(config, RunDir(tmp_path / "run"))
    finally:
        sys.setprofile(None)
    assert "GhibliModule.__init__" in str(functions), "a run was counted"
    assert len(functions) < MOST, "\n".join(sorted(functions))
    longest = max(chains, key=len)
    assert len(longest) < DEEPEST, longest
