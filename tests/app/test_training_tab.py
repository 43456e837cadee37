"""The handlers of the training tab, and the loop that has the queue's runs trained."""

import logging
from pathlib import Path

import pytest

from ghibli.runs.queue import Queue
from ghibli.runtime.errors import UserError

pytest.importorskip("gradio")
from ghibli.app import training_tab
from ghibli.app.training import Runs


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Queue()


def test_what_is_in_the_queue_is_not_told_as_a_failure(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever read an error would press Train again."""

    def advance() -> None:
        raise UserError("no folder can be made")

    monkeypatch.setattr(queue, "advance", advance)
    handlers = training_tab.Training(queue, Runs())
    assert handlers.start(*[""] * 9, "seed=1") == "run 1 is in the queue"
    assert [job.words for job in queue.jobs()] == [["seed=1"]]


def test_the_loop_outlives_every_trouble(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is logged once, however often it comes; without the loop nothing would be trained."""
    troubles = [UserError("a"), UserError("a"), OSError("b"), KeyError(3), ValueError("embedded null byte")]
    came = iter(troubles)

    def advance() -> None:
        raise next(came)

    monkeypatch.setattr(queue, "advance", advance)
    monkeypatch.setattr(training_tab, "PAUSE", 0.0)
    served = iter([True] * len(troubles))
    with caplog.at_level(logging.WARNING):
        training_tab.keep_advancing(queue, lambda: next(served, False))
    assert caplog.messages == [f"the queue of runs: {one}" for one in ("a", "b", 3, "embedded null byte")]
    assert [record.exc_info is not None for record in caplog.records] == [False, False, True, True]
