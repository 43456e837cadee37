"""The lock of a run folder where there are no POSIX locks, as on Windows: that of the package filelock."""

import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from ghibli.runs import lock
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

TAKE = "import sys, filelock; filelock.FileLock(sys.argv[1], timeout=0).acquire()"


@pytest.fixture
def no_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "filelock", filelock, raising=False)


def taken_elsewhere(path: Path) -> bool:
    """Whether another process is refused the lock."""
    done = subprocess.run([sys.executable, "-c", TAKE, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 or "Timeout" in done.stderr, done.stderr
    return done.returncode != 0


def test_it_is_held_until_it_is_closed(no_posix: None, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        assert taken_elsewhere(run.path / ".lock")
        assert lock.is_held(run.path / ".lock") is True
    assert not taken_elsewhere(run.path / ".lock")


def test_a_second_owner_is_refused_in_one_line(no_posix: None, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    refused = pytest.raises(UserError, match="another process is at work in .*hydra.run.dir=DIR")
    with filelock.FileLock(tmp_path / ".lock"), refused:
        run.lock()
    run.lock().close()


def test_whether_a_process_of_another_machine_runs_cannot_be_told(no_posix: None, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    assert lock.is_held(tmp_path / ".lock") is None
