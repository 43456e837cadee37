"""The time that a sweep takes: from trials of the same kind, said before the first one and with each."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from ghibli.config.files import to_yaml
from ghibli.config.schema import Config, base_name, images_name
from ghibli.runs.folder import RunDir
from ghibli.sweeps import grid, jobs
from ghibli.sweeps.grid import PlannedTrial
from ghibli.sweeps.jobs import Stopwatch, Work, past_runs, progress, seconds_left

ONE, FIVE, GUIDED = Work(1, False), Work(5, False), Work(5, True)


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[jobs.Timed]:
    """The trials that this process has timed, none at first."""
    empty: list[jobs.Timed] = []
    monkeypatch.setattr(jobs, "timed", empty)
    return empty


def test_trials_of_one_and_of_five_epochs_are_not_mixed() -> None:
    """A grid over both: their mean, 30 s, would promise 120 s where 100 are left, and 30 s where 50 are."""
    past = [(ONE, 10.0), (FIVE, 50.0)]
    assert seconds_left([ONE, FIVE] * 2, past) == 120
    assert seconds_left([FIVE, FIVE], past) == 100
    assert seconds_left([FIVE], past) == 50


def test_a_kind_that_was_not_seen_is_scaled_by_its_epochs() -> None:
    assert seconds_left([FIVE, ONE], [(ONE, 12.0)]) == 5 * 12 + 12
    assert seconds_left([GUIDED], [(ONE, 10.0), (FIVE, 80.0)]) == pytest.approx(5 * 90 / 6)
    assert seconds_left([ONE], []) is None


def test_progress(timed: list[jobs.Timed]) -> None:
    plan = [ONE, FIVE, ONE, FIVE]
    assert progress(0, plan) == "trial 1 of 4"
    timed += [(ONE, 60.0), (FIVE, 300.0)]
    assert progress(2, plan) == "trial 3 of 4, about 6 min left"
    assert progress(3, plan) == "trial 4 of 4, about 5 min left"
    assert progress(3, None) == "trial 4"


def test_a_finished_trial_takes_no_time(timed: list[jobs.Timed], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.3, 10.0, 70.0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    for _ in range(2):
        Stopwatch(ONE).stop()
    assert timed == [(ONE, 60.0)]


def test_earlier_runs_of_this_base_and_images_tell_the_pace(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config()
    began = datetime.fromisoformat("2026-01-02T03:04:05+00:00")
    others = {"a": {}, "b": {"guidance": 7.5}, "c": {"images": "others"}, "d": {"state": "failed"}}
    for at, (name, what) in enumerate(others.items()):
        run = RunDir(Path("outputs/train") / name)
        run.status.update(**{
            "state": "finished", "base": base_name(config.model), "images": images_name(config.data),
            "epoch": 2,
            "started": (began + timedelta(days=at)).isoformat(), "starts": [{}],
            "ended": (began + timedelta(days=at, seconds=60 + at)).isoformat(),
        } | {key: value for key, value in what.items() if key != "guidance"})  # fmt: skip
        run.config.write_text(to_yaml(make_config(f"loss.guidance={what.get('guidance', 1)}")))
    assert past_runs(config) == [(Work(2, True), 61.0), (Work(2, False), 60.0)]


def test_the_first_line_says_how_many_about_how_long_and_how_to_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = SimpleNamespace(
        hydra=SimpleNamespace(runtime=SimpleNamespace(choices=SimpleNamespace(grid="slides")))
    )
    plan = [PlannedTrial("", ONE), PlannedTrial("", FIVE)]
    monkeypatch.setattr(grid, "default_grid", lambda *_: {"lora.rank": "1,2"})
    unknown, how = grid.announcement(cfg, [], plan, [])
    assert unknown == (
        "2 trials of grid=slides, over lora.rank: 6 epochs in all; the first one will tell how long they take"
    )
    assert "lora.rank=4,8" in how and "Ctrl-C stops" in how
    known, _ = grid.announcement(cfg, [], plan, [(ONE, 60.0), (FIVE, 300.0)])
    assert "6 epochs in all; about 6 min at the pace of your last runs" in known


@pytest.mark.parametrize("mode", ["MULTIRUN", "RUN"])
def test_train_m_says_which_trial_begins(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback of any sweep, and not of a single run."""
    study = SimpleNamespace(plan=[PlannedTrial("seed=1", ONE), PlannedTrial("seed=2", ONE)])
    said: list[str] = []
    monkeypatch.setattr(grid, "studies", [study])
    monkeypatch.setattr(grid, "logger", SimpleNamespace(info=said.append))
    hydra = SimpleNamespace(
        mode=grid.RunMode[mode], job=SimpleNamespace(num=1), runtime=SimpleNamespace(output_dir="x")
    )
    cfg = {"hydra": hydra, "trainer": SimpleNamespace(max_epochs=1), "loss": SimpleNamespace(guidance=1)}
    callback = grid.CheckSweep()
    callback.on_job_start(SimpleNamespace(**cfg, get=lambda key, default: default))
    callback.on_job_end(None)
    assert said == (["trial 2 of 2: seed=2"] if mode == "MULTIRUN" else [])
