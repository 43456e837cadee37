"""One odd run folder never hides the others; a lock tells who runs; two runs in one second; links."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from helpers.commands import run_python
from helpers.report_material import make_run, page_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ghibli.cli.runs import compare_command, list_command
from ghibli.config.files import read_settings
from ghibli.report.page import page_content
from ghibli.runs import lock
from ghibli.runs.find import all_runs
from ghibli.runs.folder import RunDir
from ghibli.runs.launch import claimed, hydra_entry, readable_help
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError
from ghibli.sweeps.trials import read_trials

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
ODD: dict[str, bytes] = {
    "text as gain": b'{"state": "finished", "gain": "0.5", "gain_se": "0.1"}',
    "list as state": b'{"state": ["finished"], "settings": {"a": 1}}',
    "huge number": b'{"state": "finished", "gain": 1' + b"0" * 400 + b', "gain_se": 1}',
    "findings": b'{"state": "finished", "findings": ["no object", {"name": 1}]}',
    "starts": b'{"state": "finished", "starts": [1, {"versions": [2]}]}',
    "truth": b'{"state": true, "epoch": true}',
    "no json": b"{'state': 'finished'}",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "empty": b"",
}


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two good runs, in a study; the terminal is wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 200)
    for name in ("one", "two"):
        make_run(tmp_path / "outputs" / "study" / name)
    return tmp_path / "outputs" / "study"


@pytest.mark.parametrize("name", ODD)
def test_an_odd_status_is_shown_as_damaged(name: str, outputs: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(outputs / name).status.path.write_bytes(ODD[name])
    list_command()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("outputs/")]
    assert len(lines) == 3 and sum("finished" in line for line in lines) == 2
    assert sum(" damaged " in line for line in lines) == 1
    assert len(read_trials(outputs)) == 3
    assert "status.json is missing or damaged" in page_of(outputs).text
    with pytest.raises(UserError, match="is damaged: this run cannot be compared"):
        compare_command(str(outputs / "one"), str(outputs / name))


@pytest.mark.parametrize(
    "file", ["config.yaml", "evaluation.json", "probe.csv", "metrics.csv", "distance.csv"]
)
def test_other_odd_files_leave_the_rest(file: str, outputs: Path, capsys: pytest.CaptureFixture) -> None:
    for at, content in enumerate([*ODD.values(), BOMB.encode(), b"a,b\n1", b"step\n\0", b"x: " * 5000]):
        make_run(outputs / f"odd {at}")
        (outputs / f"odd {at}" / file).write_bytes(content)
    list_command()
    page_of(outputs)
    assert len(page_content([outputs])["runs"]) == len(ODD) + 6
    capsys.readouterr()


def test_a_yaml_bomb_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "long.yaml").write_text("a: 1\n" * 2**18)
    (tmp_path / "deep.yaml").write_text("[" * 20_000)
    assert [read_settings(file) for file in sorted(tmp_path.iterdir())] == [None] * 3


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "state", "gain", "gain_se", "epoch", "findings", "starts", "versions", "reason", "started", "ended",
        "settings", "command", "best_epoch", "process", "grown", "config_version",
    ]
)  # fmt: skip


@pytest.mark.slow
@given(st.dictionaries(KEYS, JSON, max_size=6))
@settings(max_examples=14, deadline=None, derandomize=True)
def test_no_status_breaks_a_report(content: dict) -> None:
    """Random values under the names that we read, in the state `finished`, where most is shown."""
    folder = Path(os.environ["ODD_RUN"])
    status = json.loads(json.dumps({"state": "finished"} | content))
    (folder / "status.json").write_text(json.dumps(status))
    page_of(folder, out=folder / "page.html")
    list_command()


@pytest.fixture(autouse=True, scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The folder of the random status files, in the environment, since hypothesis takes no such fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODD_RUN", str(make_run(tmp_path_factory.mktemp("odd") / "run").path))
        yield


@pytest.mark.slow
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_names_of_any_characters_survive_the_report(text: str) -> None:
    """Captions reach it as names of files in findings, folders as commands."""
    folder = Path(os.environ["ODD_RUN"])
    finding = {"name": text, "text": f"{text}: of the image {text}.png, <b>[/INST] [red]"}
    RunDir(folder).status.path.unlink()
    RunDir(folder).status.update(state="finished", settings=text, findings=[finding], command=text)
    page = page_of(folder, out=folder / "page.html")
    assert ("b", {}) not in page.tags
    shown = " ".join(text.replace("\u200b", "").split()).strip("`")
    if shown.isalnum():
        assert shown in page.text
    list_command()


# Who runs


ASK = "import sys; from ghibli.runs import lock; from pathlib import Path\n"
ASK += "print(lock.is_held(Path(sys.argv[1])))"
HOLD = "import sys, time; from ghibli.runs.lock import take; from pathlib import Path\n"
HOLD += "take(Path(sys.argv[1]), 'hydra.run.dir'); print('held', flush=True); time.sleep(60)"


def test_the_lock_tells_whether_a_run_runs(tmp_path: Path) -> None:
    """Its process number may be another process's by now, or of another machine."""
    run = RunDir(tmp_path)
    run.lock().close()
    run.status.update(state="running", process=os.getpid())
    assert run.status.state == "killed"  # this process lives, but holds no lock
    run.status.update(process=2**22 + 1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert run.status.state == "running"
        with pytest.raises(UserError, match="another process is at work"):
            run.lock()
        other.kill()
    assert run.status.state == "killed"
    with run.lock():
        assert run.status.state == "running"
        asks = [sys.executable, "-c", ASK, str(tmp_path / ".lock")]
        done = subprocess.run(asks, capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"  # asking in this process has not released it
    assert run.status.state == "killed"


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match=r"no file locks: choose a folder elsewhere, hydra.sweep.dir=DIR"):
        RunDir(tmp_path / "study").lock(key="hydra.sweep.dir")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    names: list[Path] = []
    threads = [
        threading.Thread(target=lambda: names.append(claimed(tmp_path / "a" / "now"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in names) == ["now", *(f"now+{n}" for n in range(2, 9))]


def test_links_to_runs_are_followed_once(outputs: Path, tmp_path: Path) -> None:
    elsewhere = make_run(tmp_path / "disk" / "train" / "run")
    (outputs.parent / "train").symlink_to(tmp_path / "disk" / "train")
    (outputs.parent / "again").symlink_to(tmp_path / "disk" / "train")
    (tmp_path / "disk" / "train" / "loop").symlink_to(outputs.parent)
    runs = all_runs()
    assert len(runs) == 3 and len({run.path.resolve() for run in runs}) == 3
    assert elsewhere.path.resolve() in {run.path.resolve() for run in runs}


# Python 3.14


def test_hydras_parser_is_built_where_argparse_checks_every_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Python 3.14 does: a help is expanded as soon as it is added."""
    from hydra._internal.utils import get_args_parser

    original = argparse.ArgumentParser.add_argument

    def checked(parser: argparse.ArgumentParser, *words: object, **options: object) -> argparse.Action:
        action = original(parser, *words, **options)
        help_string = parser._get_formatter()._get_help_string(action)
        if action.help and "%" in help_string:  # TypeError for an object that is no text
            help_string % {"prog": "x", "default": None}
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", checked)
    with pytest.raises(TypeError):
        get_args_parser()
    with readable_help():
        get_args_parser()
    monkeypatch.setattr(sys, "argv", ["train.py", "nope=1"])
    with pytest.raises(SystemExit, match="2"):  # the entry point itself comes to the settings
        hydra_entry(Path(__file__).parents[2] / "conf", "train", pytest.fail)
    assert capsys.readouterr().err.startswith("error: unknown key nope")


def test_all_that_make_installs_has_its_hash() -> None:
    """What builds a package runs too: in a build of its own, pip would fetch that without a hash."""
    root = Path(__file__).parents[2]
    makefile = (root / "Makefile").read_text()
    locks = re.findall(r"locks/install.py \$\(BIN\)/python (locks/\S+)", makefile)
    assert locks == ["locks/build.txt", "locks/dev.txt", "locks/extras.txt"]
    (line,) = [line for line in makefile.splitlines() if "pip install" in line]
    assert line.endswith("--no-deps --no-build-isolation -e .")  # this project itself
    pinned = {}
    for name in locks:
        blocks = (root / name).read_text().replace("\\\n", " ").splitlines()
        found = {block.split()[0]: block for block in blocks if block and block[0] not in "# "}
        assert all("==" in pin and "--hash=sha256:" in block for pin, block in found.items())
        pinned[name] = {pin.split("==")[0]: pin for pin in found}
    for smaller, larger in itertools.pairwise(pinned[name] for name in locks):  # one after the other
        assert smaller.items() <= larger.items()
    named = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, words in named.items():
        wanted = {re.split(r"[\[<>=]", word)[0].lower() for word in words}
        assert extra in ("ray", "submitit") or wanted <= pinned["locks/extras.txt"].keys(), extra


def test_make_names_an_old_python_before_it_installs(tmp_path: Path) -> None:
    old = tmp_path / "python-of-before"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    folder = tmp_path / "project"
    (folder / "locks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "locks/build.txt", "locks/dev.txt"):
        (folder / name).write_bytes((Path(__file__).parents[2] / name).read_bytes())
    done = subprocess.run(["make", "train", f"PYTHON={old}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode and not (folder / ".venv").exists()
    assert done.stderr.splitlines()[0].startswith(f"error: {old} is missing or older than Python 3.11")


@pytest.mark.parametrize("words", [("train.py",), ("sweep.py", "sweep.search=2", "lora.rank=2,4")])
def test_another_working_directory_is_refused_at_once(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run_python(*words, "hydra.job.chdir=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2 and done.stderr.startswith("error: hydra.job.chdir=true: relative paths")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
