"""What a stopped run says: a trial of a sweep names the sweep's command, a run of its own its own."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import REPO

from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.training.callbacks.checkpoints import CleanStop, StopRequested
from ghibli.training.callbacks.race import Outrun
from ghibli.training.session import note_interruption, training_session

SWEEP = ["sweep.py", "lora.rank=4,8", "data.root=a b"]


@pytest.mark.parametrize("state", ["running", "finished"])
@pytest.mark.parametrize("is_trial", [True, False])
def test_ctrl_c_names_the_command_that_goes_on(
    state: str, is_trial: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", SWEEP)
    study, run = RunDir(Path("study")), RunDir(Path("study") / "lora.rank=4")
    run.status.update(state=state)
    run.checkpoints.mkdir()
    run.last_checkpoint.write_bytes(b"")
    lock = study.lock() if is_trial else None
    try:
        assert note_interruption(run, StopRequested(signal.SIGINT)) == 130
    finally:
        if lock is not None:
            lock.close()
    said = capsys.readouterr().out
    assert (f"python {REPO}/sweep.py lora.rank=4,8 'data.root=a b'" in said) == is_trial
    resumes = not is_trial and state == "running"
    assert (f"python {REPO}/train.py resume=study/lora.rank=4" in said) == resumes
    assert run.status.state == ("finished" if state == "finished" else "interrupted")


def interrupted_and_outrun(stop: CleanStop) -> None:
    """Ctrl-C in the last step of an epoch, and the race stops the trial when the next one begins."""
    stop.in_training = True
    signal.raise_signal(signal.SIGINT)
    raise Outrun("behind the best")


def test_ctrl_c_in_the_step_before_a_race_stops_the_trial_ends_the_study(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Without it the race alone stops the trial, and the study goes on with the next one."""
    run = RunDir(tmp_path / "run")
    with pytest.raises(Outrun), training_session(make_config(), run, resumes=False):
        raise Outrun("behind the best")
    assert (run.status.state, run.status.read()["reason"]) == ("interrupted", "behind the best")
    with pytest.raises(SystemExit, match="130"), training_session(make_config(), run, resumes=False) as now:
        interrupted_and_outrun(now.stop)
    assert run.status.state == "interrupted" and "behind" not in run.status.read()["reason"]
