"""Lines on a terminal: broken between words, commands in one piece; in a pipe as they are."""

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghibli.runtime.console import PlainConsole
from ghibli.runtime.wrapping import fold

GAIN = "epoch 2  better than the base by 14.4 % +- 1.2 % on held-out images (train 13.4 %)"
NEXT = "next     ghibli generate outputs/train/2026-11-29_08-38-47 --prompt 'a red train on a hill'"
COMMAND = ".venv/bin/python train.py resume=outputs/train/it"
LOST = f"stopped after this step; go on with: {COMMAND}; no step of it is lost"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (GAIN, [GAIN.removesuffix(" 13.4 %)"), "13.4 %)"]),
        (NEXT, [NEXT]),
        (LOST, ["stopped after this step; go on with:", f"{COMMAND}; no step of it is lost"]),
        ("gain     " + "word " * 20, ["gain    " + " word" * 14, "        " + " word" * 6]),
        ("W&B      wandb sync " + "x" * 70, ["W&B      wandb sync " + "x" * 70]),
        (f"`ghibli list` shows {'x' * 60} them", [f"`ghibli list` shows {'x' * 60}", "them"]),
    ],
)  # fmt: skip
def test_lines_in_eighty_columns(line: str, expected: list[str]) -> None:
    assert fold(line, 80).split("\n") == expected


@given(st.text("ab %'`;.", max_size=200), st.integers(10, 100))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_nothing_but_white_space_changes(line: str, width: int) -> None:
    folded = fold(line, width)
    assert "".join(folded.split()) == "".join(line.split())
    assert all(
        len(part) <= width or " " not in re.sub(r"\d %", "", part).strip() for part in folded.split("\n")
    )


@pytest.mark.parametrize(("terminal", "lines"), [(True, 2), (False, 1)])
def test_only_a_terminal_breaks_lines(terminal: bool, lines: int) -> None:
    console = PlainConsole(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    console.print(GAIN)
    assert len(console.file.getvalue().splitlines()) == lines
