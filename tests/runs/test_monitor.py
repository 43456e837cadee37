"""`ghibli watch`: the chart shows the numbers of probe.csv; a half-written or damaged folder is shown too."""

import math
import os
import random
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers.commands import run_python

from ghibli.runs import monitor
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_rows

START = datetime(2026, 1, 2, 3, 0, tzinfo=UTC)
COLUMNS = ("step", "epoch", "probe/val_gain", "probe/val_gain_low", "probe/val_gain_high")
CONFIG = "data:\n  epochs: 6\ntrainer:\n  precision: auto\n  max_epochs: 6\n  devices: 1\n"


def write_gains(run: RunDir, gains: list[tuple[float, float, float]]) -> None:
    rows = [dict(zip(COLUMNS, (10 * at, at, *gain), strict=True)) for at, gain in enumerate(gains)]
    write_rows(run.probe, COLUMNS, rows)


def make_run(folder: Path, **changes: object) -> RunDir:
    """Make a run that was at step 20, epoch 2 of 6, four minutes after its start."""
    run = RunDir(folder)
    content: dict[str, object] = {
        "state": "running", "settings": "LoRA rank 8", "step": 20, "epoch": 2, "gain": 0.2, "gain_se": 0.01,
        "updated": (START + timedelta(minutes=4)).isoformat(),
        "starts": [{"at": START.isoformat(), "step": None}],
    }  # fmt: skip
    run.status.update(**(content | changes))
    run.config.write_text(CONFIG)
    return run


def test_the_chart_is_true_to_half_a_row() -> None:
    numbers = random.Random(0)
    values = [0.0, *(numbers.uniform(-30, 60) for _ in range(11))]
    gains = [monitor.Gain(at, value, value - 4, value + 7) for at, value in enumerate(values)]
    head, *rows = monitor.chart(gains, 80)
    low, high = min(values) - 4, max(values) + 7
    half = (high - low) / (monitor.HEIGHT - 1) / 2
    for at, gain in enumerate(gains):
        column = [row[monitor.LABEL + 3 * at :][:1] for row in rows]
        marked = [row for row, mark in enumerate(column) if mark in ("o", "|")]
        places = ((column.index("o"), gain.value), (marked[0], gain.high), (marked[-1], gain.low))
        for row, value in places:
            assert abs(high - 2 * half * row - value) <= half + 1e-9
    assert f"best {max(values):.1f} %" in head


def test_the_price_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    """Runs without one, and before the first epoch, have no such line."""
    run = make_run(tmp_path)
    names = (*COLUMNS, "probe/price", "probe/price_low", "probe/price_high")
    rows = [
        (0, 0, *[0.0] * 6),
        (10, 1, 0.2, 0.1, 0.3, 1.2, 0.9, 1.5),
        (20, 2, 0.3, 0.2, 0.4, 1.354, 0.849, 1.859),
    ]
    for count, expected in ((1, []), (3, ["price    forgot 135.4 % (84.9 to 185.9) after epoch 2"])):
        write_rows(run.probe, names, [dict(zip(names, row, strict=True)) for row in rows[:count]])
        lines = monitor.view(run.path, 80, START)
        assert [line for line in lines if line.startswith("price")] == expected
    write_gains(run, [(0.0, 0.0, 0.0), (0.2, 0.1, 0.3)])
    assert not [line for line in monitor.view(run.path, 80, START) if line.startswith("price")]


def test_a_gain_of_one_image_is_shown_without_an_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_gains(run, [(0.0, math.nan, math.nan), (0.2, math.nan, math.nan), (math.nan,) * 3])
    assert "gain     20.0 % after epoch 1; best 20.0 %, epoch 1" in monitor.view(run.path, 80, START)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("epochs", [2, 12, 500])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int, epochs: int) -> None:
    run = make_run(tmp_path / ("long" * 30), findings=[{"name": "overfitting", "text": "word " * 40}])
    write_gains(run, [(0.0, 0.0, 0.0), *((0.01 * at, 0.0, 0.02 * at) for at in range(1, epochs))])
    write_rows(
        run.metrics, ("step", "train/loss"), [{"step": at, "train/loss": 1 / at} for at in range(1, 999)]
    )
    lines = monitor.view(run.path, width, START)
    assert max(map(len, lines)) <= width
    assert any(line.startswith("doctor   overfitting: word") for line in lines)


def test_the_time_left_is_the_pace_times_the_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    now = START + timedelta(minutes=5)  # 20 steps took 4 minutes; 40 more take 8, one of which is over
    with run.lock():
        lines = monitor.view(run.path, 80, now)
    assert "epoch    2 of at most 6, step 20, 7 min left at this pace" in lines
    run.status.update(starts=[{"at": START.isoformat(), "step": 10}])  # resumed: 10 steps took 4 minutes
    with run.lock():
        assert any("15 min left" in line for line in monitor.view(run.path, 80, now))
    assert not any("min left" in line for line in monitor.view(run.path, 80, now))  # it was killed


def test_a_study_is_ranked_and_counted(tmp_path: Path) -> None:
    for number, gain in enumerate((0.1, 0.3, None, 0.2)):
        state = "failed" if gain is None else "finished"
        make_run(tmp_path / f"trial{number}", state=state, gain=gain, gain_se=gain and 0.01)
    lines = monitor.view(tmp_path, 80, START)
    assert lines[1] == "1 failed, 3 finished"
    assert [line.split()[-1] for line in lines[4:]] == ["trial1", "trial3", "trial0"]


def test_a_trial_is_named_by_what_not_all_have(tmp_path: Path) -> None:
    """Or by its settings, where its long name was cut and ends in a hash."""
    names = ("data.draw.count=48,lora.rank=2,seed=1", "data.draw.count=48,lora.rank=4,seed=1")
    for number, name in enumerate((*names, "data.draw.count=48,seed=1,sample.num-0123456789ab")):
        make_run(tmp_path / name, state="finished", gain=number / 10, gain_se=0.01)
    shown = monitor.view(tmp_path, 80, START)[3:]
    assert shown[0].split() == ["gain", "epoch", "state", "trial"]
    assert [line.split("finished  ")[1] for line in shown[1:]] == [
        "LoRA rank 8",
        "rank=4",
        "rank=2",
    ]
    make_run(tmp_path / "alone" / "lora.rank=2", state="finished", gain=0.1, gain_se=0.01)
    assert monitor.view(tmp_path / "alone", 80, START)[4].endswith("lora.rank=2")


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = sorted(tmp_path.iterdir())
    run.probe.write_text("step,epoch,probe/val_gain\n0,0,\nx\n")
    run.metrics.write_bytes(b"step,train/loss\n1,nan\n\xff\x00")
    run.config.write_bytes(b"\xff")
    lines = monitor.view(run.path, 80, START)
    assert "gain     after the first epoch" in lines and not any("nan" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == sorted([*before, run.probe, run.metrics])  # it only reads
    run.status.path.write_text("{")
    assert monitor.view(run.path, 80, START)[1].startswith("unknown")
    run.status.path.unlink()
    with pytest.raises(UserError, match="holds no run yet"):
        monitor.view(run.path, 80, START)


def test_nothing_not_finite_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_gains(run, [(0.0, 0.0, 0.0), (math.nan, 0.0, math.inf), (0.1, 0.05, 0.15)])
    assert [gain.epoch for gain in monitor.read_gains(run)] == [0, 2]


@pytest.mark.parametrize(("height", "used", "words"), [(16, 20, 25), (23, 23, 30), (50, 50, 30)])
def test_all_that_changes_fits_into_the_terminal(tmp_path: Path, height: int, used: int, words: int) -> None:
    """Ranking, chart and long findings give way; the best trials and the numbers of the one at work stay."""
    for number in range(40):
        make_run(tmp_path / f"trial{number:02}", state="finished", gain=number / 100, gain_se=0.01)
    at_work = make_run(tmp_path / "work", gain=None, findings=[{"name": "overfitting", "text": "word " * 30}])
    write_gains(at_work, [(0.0, 0.0, 0.0), (0.1, 0.05, 0.15), (0.2, 0.15, 0.25)])
    with at_work.lock():
        lines = monitor.view(tmp_path, 80, START, height=height)
    assert lines[1] == "40 finished, 1 running"
    ranked = [line.split()[-1] for line in lines if "trial" in line and "finished  " in line]
    assert ranked == [f"trial{number:02}" for number in range(39, 39 - len(ranked), -1)]
    assert f"and {40 - len(ranked)} more below them (`{command_here('ghibli', 'list')}` shows all)" in lines
    assert " ".join(" ".join(lines).split()).count("word") == words
    assert len(lines) == used


def test_a_finding_is_shown_whole(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    run = make_run(tmp_path, findings=[{"name": "overfitting", "text": text}])
    lines = monitor.view(run.path, 80, START)
    at = next(number for number, line in enumerate(lines) if line.startswith("doctor"))
    assert " ".join(" ".join(lines[at:]).split()) == f"doctor overfitting: {text}"


def test_a_run_that_has_written_nothing_yet_is_waited_for(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        assert monitor.view(run.path, 80, START)[1].startswith("loading")
        assert not monitor.is_over(run.path)
        assert monitor.view(tmp_path, 80, START)[1].startswith("loading")  # a study's first trial
    with pytest.raises(UserError, match="holds no run yet"):
        monitor.view(run.path, 80, START)


def test_a_study_is_not_over_between_two_trials(tmp_path: Path) -> None:
    make_run(tmp_path / "trial0", state="finished")
    with RunDir(tmp_path).lock():
        assert not monitor.is_over(tmp_path)
    assert monitor.is_over(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_run_of_another_user_is_read_and_never_written(tmp_path: Path) -> None:
    """By a process of another user, who may read the folder, and then may not."""
    run = make_run(tmp_path / "run")
    write_gains(run, [(0.0, 0.0, 0.0), (0.1, 0.05, 0.15), (0.2, 0.15, 0.25)])
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}

    def watched() -> str:
        code = (
            "import os, sys; from pathlib import Path; from ghibli.runs import monitor; os.setuid(65534)\n"
            "try: print('\\n'.join(monitor.view(Path(sys.argv[1]), 80, monitor.utc_now())))\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        return run_python("-c", code, str(run.path)).stdout

    with run.lock():
        assert "20.0 % (15.0 to 25.0) after epoch 2" in (shown := watched()) and "running" in shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run.path.chmod(0o700)
    assert watched().startswith(f"UserError {run.path}: you may not read it")
    tmp_path.chmod(0o700)
    assert watched().startswith(f"UserError {run.path}: you may not read it")
