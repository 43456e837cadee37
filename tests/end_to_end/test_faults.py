"""The fault harness in short: two random kills, a damage to each kind of file, two commands at once."""

import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from faults import fuzz, table
from faults.compare import different_parts
from faults.corrupt import BROKEN, HARMLESS, REFUSED, RIGHTED, SETTINGS, Corrupter, in_process
from faults.kill import Killed, Killer
from helpers.commands import REPO

from ghibli.config.files import from_yaml
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import temporary_beside
from ghibli.training.callbacks.checkpoints import FolderCheckpoint


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Corrupter:
    """A run killed in its second epoch, and its undisturbed end."""
    corrupter = Corrupter(tmp_path_factory.mktemp("faults"))
    began = time.monotonic()
    corrupter.prepare()
    corrupter.seconds = time.monotonic() - began
    return corrupter


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_a_random_moment(half_done: Corrupter, tmp_path: Path, seed: int) -> None:
    killer, run, report = Killer(tmp_path, SETTINGS), tmp_path / "run" / "run", Killed(seed)
    moment = random.Random(seed).uniform(0.3, 0.9) * half_done.seconds
    while not killer.kill_once(run, moment, report):  # it was done before its moment came: that is no kill
        shutil.rmtree(run.parent)
        moment /= 2
    code, _, error = in_process(*killer.command(run)[2:])
    assert (code, error) == (0, "")
    assert not different_parts(half_done.done, run), report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("run/checkpoints/last.ckpt", {RIGHTED}),
        ("run/config.yaml", {REFUSED, HARMLESS}),  # harmless: the checksum's own line
        ("run/status.json", {RIGHTED, HARMLESS}),  # harmless: a letter of no meaning
        ("run/split.json", {HARMLESS}),
        ("run/metrics.csv", {HARMLESS}),
        ("run/probe.csv", {HARMLESS}),
        ("run/.hydra/hydra.yaml", {HARMLESS}),
        ("cache/base_scores/*.json", {HARMLESS}),
        ("cache/scenes-*/captions.txt", {RIGHTED}),
        ("cache/scenes-*/images/*.png", {RIGHTED}),
        ("cache/latents/*.pt", {HARMLESS}),
        ("cache/base_grids/*.pt", {HARMLESS}),
        ("run/adapter/*.safetensors", {HARMLESS}),
    ],
)
def test_damaged_files_are_noticed_or_harmless(
    half_done: Corrupter, pattern: str, expected: set[str]
) -> None:
    found = half_done.damage(pattern, random.Random(pattern), half_done.half)
    assert found["outcome"] in expected, found
    assert found["outcome"] != BROKEN


@pytest.mark.slow
def test_a_damaged_best_checkpoint_of_a_finished_run_is_named(half_done: Corrupter) -> None:
    found = half_done.damage("run/checkpoints/best.ckpt", random.Random(0), half_done.finished)
    assert found["outcome"] == REFUSED
    assert found["detail"].startswith("error: run/checkpoints/best.ckpt is missing or damaged")


# What the promises rest on


@pytest.mark.slow
def test_a_run_folder_that_was_moved_goes_on(half_done: Corrupter, tmp_path: Path) -> None:
    """And knows which epoch was the best; Lightning's ModelCheckpoint forgets it with the path."""
    half_done.put_back(half_done.half)
    moved = tmp_path / "moved"
    half_done.run.rename(moved)
    assert in_process(f"resume={moved}")[::2] == (0, "")
    assert not different_parts(half_done.done, moved)
    checkpoints = [FolderCheckpoint(tmp_path / name, monitor="gain") for name in ("old", "new")]
    checkpoints[0].best_model_score = torch.tensor(0.3)
    checkpoints[0].best_k_models = {str(tmp_path / "old" / "best.ckpt"): torch.tensor(0.3)}
    checkpoints[1].load_state_dict(checkpoints[0].state_dict())
    assert checkpoints[1].best_model_score == 0.3
    assert list(checkpoints[1].best_k_models) == [str(tmp_path / "new" / "best.ckpt")]


@pytest.mark.slow
def test_every_changed_byte_of_config_yaml_is_noticed(half_done: Corrupter, tmp_path: Path) -> None:
    """Or it changes no setting, as in the checksum's own line."""
    path = tmp_path / "config.yaml"
    whole = (half_done.done / "config.yaml").read_bytes()
    path.write_bytes(whole)
    right = from_yaml(path)
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with suppress(UserError):
            assert from_yaml(path) == right, place


def test_a_damaged_status_is_an_empty_one(tmp_path: Path) -> None:
    """No flipped digit of a hash may refuse a resume, none of a gain may be shown."""
    run = RunDir(tmp_path)
    run.status.update(state="finished", gain=0.25, base_hash="abc")
    assert run.status.read() == {"state": "finished", "gain": 0.25, "base_hash": "abc"}
    whole = run.status.path.read_bytes()
    for place in range(len(whole)):
        run.status.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        content = run.status.read()
        assert {key: content[key] for key in content if key in ("state", "gain", "base_hash")} in (
            {}, {"state": "finished", "gain": 0.25, "base_hash": "abc"},
        )  # fmt: skip


HOLD = "import sys; from pathlib import Path; from ghibli.runs.folder import RunDir; "
HOLD += "lock = RunDir(Path(sys.argv[1])).lock(); print('held', flush=True); input()"


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    """Until it dies, however it dies; what it left half written is removed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPO, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        left = tmp_path / "checkpoints" / ".last.ckpt.123.tmp"
        left.parent.mkdir()
        left.write_bytes(b"half")
        with pytest.raises(UserError, match="another process is at work in .*: wait for its end"):
            RunDir(tmp_path).lock()
        assert left.exists()
        other.kill()
    RunDir(tmp_path).lock().close()
    assert not left.exists()


def test_a_study_removes_no_half_written_file_of_its_trials(tmp_path: Path) -> None:
    """They may be at work in other processes, each with the lock of its own folder."""
    left = temporary_beside(tmp_path / "study.csv"), temporary_beside(tmp_path / "samples" / "plot.png")
    theirs = tmp_path / "trial" / "checkpoints" / ".last.ckpt.1.tmp"
    for file in (*left, theirs):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "trial" / ".lock").touch()
    RunDir(tmp_path).lock().close()
    assert not any(file.exists() for file in left)
    assert theirs.exists()
    RunDir(tmp_path / "trial").lock().close()
    assert not theirs.exists()


def test_the_table_has_a_row_for_each_fault() -> None:
    made = {"commit": "abc1234", "date": "2026-01-01"}
    kill = {"twice": 1, "where": {"in epoch 1": 3}, "kills": 3, "runs": 2, "equal": 2} | made
    corrupt = {"files": {"a": {HARMLESS: 2}, "b": {}}, "sound": 2, "damages": 2} | made
    machine = {"faults": [{"fault": "A full disk.", "outcome": "survived", "detail": "error: x|y"}]} | made
    tests = [
        fuzz.outcome("a/b.py::test_damaged_runs[x.json-10000]", "12.61s call a\n1 passed in 14.0s"),
        fuzz.outcome("a/b.py::test_tables", "1.0s call a\n1 failed in 14.0s")
        | {"made": {"commit": "later12", "date": "2026-01-02"}},  # repeated alone
    ]
    found = {
        "kill": kill,
        "corrupt": corrupt,
        "machine": machine,
        "fuzz": {"tests": tests, "inputs": 9} | made,
    }
    assert table.table(found).splitlines()[2:] == [
        "| SIGKILL at a random moment between a run's command and its end, 1 of the runs once more after "
        "they had been resumed (3 in epoch 1) | 3 times in 2 runs | **2 of 2 bit-equal** "
        "| abc1234, 2026-01-01 |",
        "| random damage to `a` | 2 | 2 harmless | abc1234, 2026-01-01 |",
        "| random damage to any file, in all | 2 | **2 of 2 detected or harmless** | abc1234, 2026-01-01 |",
        "| A full disk. | 1 | survived: error: x/y | abc1234, 2026-01-01 |",
        "| random input: damaged runs, x.json | 9 | read, or refused in one line; no file outside (13 s) "
        "| abc1234, 2026-01-01 |",
        "| random input: tables | 9 | **failed** | later12, 2026-01-02 |",
    ]
