"""What a trial's folder says about it."""

from dataclasses import replace
from pathlib import Path

from ghibli.runs.folder import RunDir
from ghibli.sweeps.trials import Trial


def test_a_resumed_trial_has_no_minutes(tmp_path: Path) -> None:
    times = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:00:00+00:00"}
    once = Trial(RunDir(tmp_path), {}, times | {"starts": [{}]}, None)
    assert once.minutes == 60
    assert replace(once, status=times | {"starts": [{}, {}]}).minutes is None
