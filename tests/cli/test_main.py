"""The `ghibli` command line."""

import os
from pathlib import Path

import pytest
from helpers.commands import run_python

from ghibli.data.folder import read_folder
from ghibli.runs.folder import RunDir


def ghibli(*words: str, cwd: Path) -> tuple[int, str, str]:
    done = run_python("-m", "ghibli", *words, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_list_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    assert ghibli("list", cwd=tmp_path) == (0, "no runs below outputs/ yet: python train.py makes one\n", "")


def test_list_shows_state_settings_and_gain(tmp_path: Path) -> None:
    runs = tmp_path / "outputs" / "train"
    finished = {"settings": "LoRA rank 8", "epoch": 3, "gain": 0.1234, "gain_se": 0.005}
    RunDir(runs / "a").status.update(state="finished", started="1", **finished)
    RunDir(runs / "b").status.update(state="running", started="2", process=2**22 + 1)
    RunDir(runs / "c").status.update(state="running", started="3", process=os.getpid())
    code, out, _ = ghibli("list", cwd=tmp_path)
    lines = out.splitlines()
    assert code == 0
    assert all(word in lines[1] for word in ("outputs/train/a", "finished", "LoRA rank 8", "12.3 % +- 0.5 %"))
    assert "killed" in lines[2]
    assert "running" in lines[3]


@pytest.mark.parametrize("look", ["drawn", "photo"])
def test_demo_draw_writes_a_folder_that_is_read(tmp_path: Path, look: str) -> None:
    code, _, _ = ghibli("demo", "draw", "set", "--look", look, "--count", "3", "--size", "64", cwd=tmp_path)
    assert code == 0
    folder = read_folder(tmp_path / "set", style="", default_caption=None, min_side=32)
    assert [p.path.name for p in folder.images] == [f"scene_200000{i}.png" for i in range(3)]
    code, _, error = ghibli("demo", "draw", "set", cwd=tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert "choose another folder" in error
