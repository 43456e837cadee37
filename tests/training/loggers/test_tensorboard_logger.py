"""TensorBoard: what its own reader finds after a resume, in odd folders, and when the disk is full."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

from helpers.dashboards import tensorboard_events, use_all
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from ghibli.runs.folder import RunDir
from ghibli.training.loggers import choice, dashboard
from ghibli.training.loggers.tensorboard_logger import as_markdown, silence_writer_threads


def start(make_config: Callable, run: RunDir) -> dashboard.DashboardLogger:
    (logger,) = choice.start(make_config("logger=tensorboard", "lora.rank=4"), run, "name")
    return logger


def test_a_resumed_run_hides_the_steps_that_it_makes_again(make_config: Callable, tmp_path: Path) -> None:
    """Steps 1 to 5, of which a checkpoint has 3; then 4 and 5 once more. And a run that starts over."""
    run = RunDir(tmp_path)
    logger = start(make_config, run)
    for step in range(1, 6):
        logger.log_metrics({"train/loss": 1.0 * step}, step)
    choice.close_all()
    run.status.update(step=3)
    logger = start(make_config, run)
    for step in (4, 5):
        logger.log_metrics({"train/loss": 10.0 * step}, step)
    choice.close_all()
    found = tensorboard_events(tmp_path / "tensorboard")["scalars"]["train/loss"]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    run.status.path.unlink()
    start(make_config, run).log_metrics({"train/loss": 7.0}, 0)
    choice.close_all()
    assert tensorboard_events(tmp_path / "tensorboard")["scalars"]["train/loss"] == [(0, 7.0)]


def test_settings_and_result_are_on_the_tab_that_compares_runs(make_config: Callable, tmp_path: Path) -> None:
    """In a folder whose name Lightning's own logger would expand."""
    run = RunDir(tmp_path / "$HOME ~" / "run")
    use_all(start(make_config, run))
    choice.close_all()
    (folder,) = (tmp_path / "$HOME ~").glob("run/tensorboard")
    events = EventAccumulator(str(folder))
    events.Reload()
    stored = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(stored).session_start_info.hparams
    assert settings["lora.rank"].number_value == 4
    assert settings["trainer.precision"].string_value == "auto"
    assert events.Scalars("best/val_gain")[0].value == 0.5


def test_a_full_disk_is_one_warning_and_no_traceback(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writing thread gets the error; the next call of ours raises it again."""
    said: list[str] = []
    monkeypatch.setattr(dashboard.log, "warning", said.append)
    printed: list[threading.ExceptHookArgs] = []
    silence_writer_threads.cache_clear()  # the test runner has a hook of its own for each test
    monkeypatch.setattr(threading, "excepthook", printed.append)
    logger = start(make_config, RunDir(tmp_path))

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(30):
        logger.log_metrics({"train/loss": 1.0}, step)
    choice.close_all()
    assert len(said) == 1 and said[0].startswith("TensorBoard failed ([Errno 28] No space left")
    assert printed == []
    silence_writer_threads.cache_clear()


def test_a_table_in_markdown() -> None:
    table = dashboard.Table("a/b", "title", ("epoch", "gain"), [[0, 0.1], [1, 1 / 3]])
    assert as_markdown(table) == "| epoch | gain |\n| --- | --- |\n| 0 | 0.1 |\n| 1 | 0.3333333333333333 |"
