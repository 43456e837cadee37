"""What a trial's folder says about it."""

from dataclasses import replace
from pathlib import Path

from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_with_checksum
from ghibli.sweeps.ranking import ranking_csv
from ghibli.sweeps.trials import Trial, read_trials, varied


def test_a_resumed_trial_has_no_minutes(tmp_path: Path) -> None:
    times = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:00:00+00:00"}
    once = Trial(RunDir(tmp_path), {}, times | {"starts": [{}]}, None)
    assert once.minutes == 60
    assert replace(once, status=times | {"starts": [{}, {}]}).minutes is None


def test_times_that_are_none_give_no_minutes(tmp_path: Path) -> None:
    good = "2026-01-01T00:00:00+00:00"
    for started, ended in (("x", good), (good, "2026-01-01T01:00:00"), ("", ""), (good, "9" * 99)):
        assert Trial(RunDir(tmp_path), {}, {"started": started, "ended": ended}, None).minutes is None


def test_a_repeat_is_told_by_the_trial_that_it_repeats(tmp_path: Path) -> None:
    """Not by a name alone: `sweep.py ++seed=0,1` puts +seed= into every one, so no trial was left to rank."""
    names = ["lora.rank=4", "++seed=0", "++seed=0,lora.rank=4", "lora.rank=4,++seed=0", "lora.rank=8+seed=1"]
    repeats = ["lora.rank=4+seed=1", "lora.rank=4,++seed=0+seed=1", "++seed=0,lora.rank=4+seed=2"]
    for name in (*names, *repeats):
        run = RunDir(tmp_path / name)
        run.status.update(state="finished")
        run.config.write_text("seed: 0")
    assert {trial.run.path.name for trial in read_trials(tmp_path) if trial.repeats} == set(repeats)


def test_an_odd_trial_does_not_hide_the_others(tmp_path: Path) -> None:
    """Values of other types in its config.yaml, a note that is no text, a checkpoint of another program."""
    odd = {
        "lora: {alpha: x, rank: 4}": "text",
        "lora: {alpha: 8, rank: 0}": None,
        "lora: {alpha: [1]}": b"\xff",
    }
    for number, (config, note) in enumerate(odd.items()):
        run = RunDir(tmp_path / str(number))
        run.status.update(state="finished", started="x", ended="y")
        run.config.write_text(config)
        write_with_checksum(run.best_checkpoint, lambda file: file.write(b"mine"))
        if note is not None:
            run.no_result.write_bytes(note if isinstance(note, bytes) else note.encode())
    (tmp_path / "1" / "no_result.txt").mkdir()
    trials = read_trials(tmp_path)
    assert len(trials) == 3 and [trial.gain for trial in trials] == [None] * 3
    assert varied(trials) == ["lora.alpha", "lora.rank"]
    assert sorted(trial.verdict for trial in trials) == [
        "failed: \\xff", "failed: no_result.txt cannot be read: not a plain file", "failed: text",
    ]  # fmt: skip
    assert len(ranking_csv(trials).splitlines()) == 4
