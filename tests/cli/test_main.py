"""The `ghibli` command line."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers.commands import REPO, run_python

from ghibli.config.schema import age_of
from ghibli.config.typed_paths import at_home
from ghibli.data.folder import read_folder
from ghibli.runs.folder import RunDir
from ghibli.runs.listing import listed
from ghibli.runs.reuse import warn_of_changes


def ghibli(*words: str, cwd: Path) -> tuple[int, str, str]:
    done = run_python("-m", "ghibli", *words, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_list_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    """With the path of train.py, which is not in the current folder."""
    code, said, trouble = ghibli("list", cwd=tmp_path)
    assert (code, said, trouble) == (0, f"no runs below outputs/ yet: python {REPO}/train.py makes one\n", "")


def test_list_shows_state_settings_and_gain(tmp_path: Path) -> None:
    runs = tmp_path / "outputs" / "train"
    finished = {
        "settings": "LoRA rank 8 lora.targets=[to_q,to_k]",
        "epoch": 3,
        "gain": 0.1234,
        "gain_se": 0.005,
    }
    RunDir(runs / "a").status.update(state="finished", started="1", **finished)
    RunDir(runs / "b").status.update(state="running", started="2", process=2**22 + 1)
    RunDir(runs / "c").status.update(state="running", started="3", process=os.getpid())
    code, out, _ = ghibli("list", cwd=tmp_path)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "base and images unknown"
    assert all(word in lines[2] for word in ("outputs/train/a", "finished", "LoRA rank 8", "12.3 % +- 0.5 %"))
    assert "lora.targets=[to_q,to_k]" in "".join(out.split())  # brackets are no markup; a cell folds
    assert [state for line in lines for state in ("killed", "running") if state in line] == [
        "killed",
        "running",
    ]


@pytest.mark.parametrize(("version", "age"), [(0, "an older"), (1, "an older"), (99, "a newer")])
def test_runs_of_other_versions_say_so_and_the_way_out(
    version: int, age: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = RunDir(tmp_path / "before")
    run.status.update(state="finished", settings="x", config_version=version, git_commit="0123456789")
    assert listed([run])[0].settings == f"x (made by {age} version)"
    warn_of_changes(run)
    said = " ".join(capsys.readouterr().out.split())
    assert f"it was made by {age} version" in said and "check out its commit, 0123456" in said


@pytest.mark.parametrize("version", [None, "2", [2], {}, 1.5])
def test_a_version_that_is_no_number_is_another_one(version: object) -> None:
    assert age_of(version) == "another"


@pytest.mark.parametrize("look", ["drawn", "photo"])
def test_demo_draw_writes_a_folder_that_is_read(tmp_path: Path, look: str) -> None:
    code, _, _ = ghibli("demo", "draw", "set", "--look", look, "--count", "3", "--size", "64", cwd=tmp_path)
    assert code == 0
    folder = read_folder(tmp_path / "set", style="", default_caption=None, min_side=32)
    assert [p.path.name for p in folder.images] == [f"scene_200000{i}.png" for i in range(3)]
    code, _, error = ghibli("demo", "draw", "set", cwd=tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert "choose another folder" in error


def test_demo_draw_prints_a_command_that_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes `~/` where bash leaves it alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["demo", "draw", "~/a (1) $x", "--count", "2", "--size", "64"]
    code, out, _ = ghibli(*words, cwd=tmp_path)
    assert code == 0
    stub = "python() { printf '%s\\0' \"$@\"; }\n" + out.rpartition(": ")[2]
    pasted = subprocess.run(["bash", "-c", stub], capture_output=True, check=True).stdout.split(b"\0")
    assert pasted[0] == bytes(REPO / "train.py")
    assert pasted[1:3] == [b"data=ghibli", b"data.root=" + bytes(tmp_path / "a (1) $x")]
    assert len(list((tmp_path / "a (1) $x" / "images").iterdir())) == 2


@pytest.mark.parametrize("name", ["checksums.txt", "images/scene_2000000.png", "notes.txt"])
def test_demo_draw_replaces_nothing(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    code, _, error = ghibli("demo", "draw", "mine", "--count", "1", "--size", "64", cwd=tmp_path)
    assert (code, error) == (2, "error: mine is not an empty folder: choose another folder\n")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_demo_draw_says_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, error = ghibli("demo", "draw", "file/x", "--count", "1", cwd=tmp_path)
    assert code == 2 and error == "error: FOLDER file/x: nothing can be written there: Not a directory\n"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("~/x y", "/h/x y"), ("--to=~/x", "/h/x"), ("--out=~/a=b", "/h/a=b"), ("~", "~"), ("-p", "-p"),
        ("~ a cat", "~ a cat"), ("--negative=~", "--negative=~"), ("data.root=~/x", "data.root=~/x"),
        ("~/x:0.7", "/h/x:0.7"), ("a\n~/b", "a\n~/b"), ("", ""),
    ],
)  # fmt: skip
def test_home_in_paths(word: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    option = word[: word.index("=") + 1] if word.startswith("--to=") or word.startswith("--out=") else ""
    assert at_home(word) == option + expected
