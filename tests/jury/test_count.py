"""Votes that come back as files: read as a stranger's, matched with the key, and counted in words."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.special

from ghibli.cli.jury import count_votes, counting_command
from ghibli.jury import ballot, count
from ghibli.runtime.errors import UserError

NAMES = ["runs/good", "runs/poor"]


@pytest.fixture
def key(tmp_path: Path) -> count.Key:
    pairs = ballot.plan(2, 2, 60, 60)
    content = {
        "ballot": "abc", "models": NAMES,
        "pairs": [{"models": [p.a.model, p.b.model], "items": [p.a.item, p.b.item]} for p in pairs],
    }  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(content))
    return count.read_key(tmp_path / "key.json")


@pytest.fixture
def vote(tmp_path: Path, key: count.Key) -> Callable[..., Path]:
    """Writes a file of votes by somebody who prefers the first run by so many log-odds."""

    def write(name: str, strength: float, seed: int, side: float = 0.0, **content: object) -> Path:
        draws, votes = np.random.default_rng(seed), []
        for pair, (models, _) in enumerate(key.pairs):
            left = "ab"[draws.integers(2)]
            shown = models if left == "a" else models[::-1]
            line = strength * ((shown[0] == 0) - (shown[1] == 0)) + side
            choice = "left" if draws.random() < scipy.special.expit(line) else "right"
            votes.append({"pair": pair, "left": left, "choice": choice})
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"ballot": "abc", "voter": name, "votes": votes} | content))
        return file

    return write


def test_a_preferred_run_is_named_and_the_side_taken_out(key: count.Key, vote: Callable) -> None:
    files = [vote(f"voter{seed}", 1.5, seed, side=1.0) for seed in range(3)]
    lines = count.count(files, key)
    assert lines[0] == "180 votes of 3 voters on 60 pairs"
    assert lines[2].endswith("  runs/good") and lines[3].endswith("  runs/poor")
    decided = next(line for line in lines if line.startswith("runs/good over runs/poor"))
    assert decided.endswith("enough votes, it is preferred")
    share = float(decided.split("preferred in")[1].split("%")[0])
    assert abs(share - 100 * scipy.special.expit(1.5)) < 10  # 82 %
    assert any(line.startswith("the left side is favoured") for line in lines)


def test_equal_runs_are_not_told_apart(key: count.Key, vote: Callable) -> None:
    lines = count.count([vote("one", 0.0, 1), vote("two", 0.0, 2)], key)
    (line,) = (line for line in lines if " over " in line)
    assert "not enough votes yet" in line or "no difference is seen" in line
    assert any(line.startswith("no side is favoured") for line in lines)


def test_the_distance_is_compared_with_the_eye(
    key: count.Key, vote: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [vote(f"voter{seed}", 1.5, seed) for seed in range(3)]
    for good, poor, agree in ((0.5, 2.0, 1), (2.0, 0.5, 0)):
        distances = {"runs/good": good, "runs/poor": poor}
        monkeypatch.setattr(count, "measured_distance", lambda run, d=distances: d[str(run)])
        line = count.count(files, key)[-1]
        assert f"agree on {agree} of 1 pairs of models" in line and f"runs/good {good:.2f}" in line


def test_a_voter_counts_once(key: count.Key, vote: Callable) -> None:
    whole = vote("whole", 1.0, 1)
    part = vote("part", 1.0, 1, voter="whole", votes=json.loads(whole.read_text())["votes"][:9])
    for files in ([whole, part], [part, whole]):
        found = count.read_votes(files, key)
        assert len(found.votes) == 60 and found.voters == 1
        assert found.notes == ["part.json is not counted: the same voter sent another file"]


def test_of_a_voters_equal_files_the_newest_counts(key: count.Key, vote: Callable) -> None:
    """Who went back and changed some choices sends the same pairs again."""
    old, new = (vote(name, 2.0 * sign, 1, voter="jane") for name, sign in (("old", 1), ("new", -1)))
    for file, at in ((old, 1000), (new, 2000)):
        os.utime(file, (at, at))
    alone = count.read_votes([new], key)
    for files in ([old, new], [new, old]):
        found = count.read_votes(files, key)
        assert found.notes == ["old.json is not counted: the same voter sent another file"]
        assert found.voters == 1 and np.array_equal(found.votes.outcome, alone.votes.outcome)
    assert not np.array_equal(count.read_votes([old], key).votes.outcome, alone.votes.outcome)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ballot": "other"}, "holds votes on ballot other, not on abc"),
        ({"votes": [{"pair": 999, "left": "a", "choice": "left"}]}, "a vote in it cannot be read"),
        ({"votes": [{"pair": True, "left": "a", "choice": "left"}]}, "a vote in it cannot be read"),
        ({"votes": [{"pair": 0, "left": "a", "choice": ["left"]}]}, "a vote in it cannot be read"),
        ({"votes": [{"pair": 0, "left": "a"}]}, "a vote in it cannot be read"),
        ({"votes": 3}, "a vote in it cannot be read"),
        ({"votes": []}, "there is no vote in these files yet"),
    ],
)
def test_odd_files_of_votes_are_one_line(key: count.Key, vote: Callable, content: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        count.count([vote("odd", 0.0, 0, **content)], key)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"votes": []}', "\udc80", '"x"', "null"])
def test_what_is_no_file_of_votes_or_no_key_is_one_line(tmp_path: Path, key: count.Key, text: str) -> None:
    file = tmp_path / "odd.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"odd.json (is not|holds votes)"):
        count.read_votes([file], key)
    with pytest.raises(UserError, match="odd.json is not the key of a ballot"):
        count.read_key(file)


def test_the_name_of_a_file_adds_no_line(
    tmp_path: Path, key: count.Key, vote: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """A voter may call the file as he likes."""
    files = [vote(name, 1.0, 3, voter="jane") for name in ("b\nrun poor is preferred in 99 %", "a")]
    count_votes(files, tmp_path / "key.json", tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert any("\\nrun poor" in line for line in said)
    assert not any(line.startswith("run poor") for line in said)


def test_the_printed_command_is_for_a_shell(tmp_path: Path) -> None:
    """Its pattern is left to the shell, and a folder of any name is one word."""
    folder = tmp_path / "it's (1) here"
    command = counting_command(folder)
    assert shlex.split(command)[-5:] == ["jury", "--count", "--to", str(folder), "votes-*.json"]
    assert command.endswith(" votes-*.json")
