"""The queue of runs: one at a time, each outliving who started it, found again from files alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from threading import Barrier, BrokenBarrierError
from typing import Any

import psutil
import pytest
from helpers.commands import REPO
from hypothesis import given
from hypothesis import strategies as st

from ghibli.runs import lock, queue
from ghibli.runs.folder import RunDir
from ghibli.runs.jobs import Job, as_job
from ghibli.runs.queue import Queue
from ghibli.runtime.errors import UserError

STAND_IN = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPO)!r})
from ghibli.runs.folder import RunDir

words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = words.get("hydra.run.dir") or words.get("resume") or "outputs/train/" + words["name"]
print("began", *sys.argv[1:], flush=True)
if "seed=13" in sys.argv:
    print("error: seed=13 brings bad luck")
    sys.exit(2)
if "seed=7" in sys.argv:
    time.sleep(60)  # loading, before anything is locked
run, stopped = RunDir(Path(folder)), []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
with run.lock():
    run.status.update(state="running", step=1, process=os.getpid())
    (run.path / "checkpoints").mkdir(exist_ok=True)
    while not (stopped or Path("end").exists()):
        time.sleep(0.01)
    Path("end").unlink(missing_ok=True)
    run.status.update(state="interrupted" if stopped else "finished")
sys.exit(130 if stopped else 0)
"""  # in the place of train.py: takes the run's lock and waits for SIGINT, or for a file `end`


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to train in, with a stand-in for train.py; no process is left behind."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(queue, "ROOT", code)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for job in Queue().jobs():
        if job.is_alive:
            os.kill(int(job.process or 0), signal.SIGKILL)


def wait(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come")


def started(runs: Queue, *words: str) -> Job:
    """Add a run to an idle queue and wait until it trains."""
    number = runs.add(list(words)).number
    runs.advance()
    return wait(lambda: next((job for job in runs.jobs() if job.number == number and is_locked(job)), None))


def is_locked(job: Job) -> bool:
    return job.folder is not None and lock.is_held(Path(job.folder) / ".lock") is True


def test_one_after_another(here: Path) -> None:
    runs = Queue()
    first = started(runs, "seed=1")
    second = runs.add(["seed=2", "name=other"])
    for _ in range(3):
        runs.advance()
    assert [job.waits for job in runs.jobs()] == [False, True]
    assert [runs.outcome(job) for job in runs.jobs()] == ["is being trained", "waits"]
    (here / "end").touch()
    wait(lambda: runs.advance() or not runs.jobs()[1].waits)
    assert runs.jobs()[0].code == 0 and runs.outcome(runs.jobs()[0]) == "finished"
    assert runs.jobs()[1].folder == second.folder == "outputs/train/other"
    assert first.folder != "outputs/train/other" and str(first.folder).startswith("outputs/train/20")
    printed = runs.tail(first, 5)
    assert printed == [f"began seed=1 hydra.run.dir={first.folder}"]


def test_the_end_of_a_run_is_noted_once(here: Path) -> None:
    """However many threads see it at the same time."""
    runs = Queue()
    started(runs)
    child, together = runs._children[1], Barrier(4, timeout=30)

    def poll() -> int | None:  # each thread comes to know before any of them notes it
        code = Popen.poll(child)
        with suppress(BrokenBarrierError):
            together.wait()
        return code

    (here / "end").touch()
    child.wait()
    child.poll = poll
    with ThreadPoolExecutor(4) as pool:
        told = [pool.submit(runs.advance) for _ in range(4)]
        time.sleep(1)
        together.abort()
        assert [one.exception() for one in told] == [None] * 4
    assert runs.jobs()[0].code == 0 and runs._children == {}


def test_it_outlives_who_started_it_and_is_found_again(here: Path) -> None:
    """Whoever starts it is killed; another process finds it by its files, and stops it as Ctrl-C would."""
    script = (
        "import os, sys; from pathlib import Path; from ghibli.runs import queue; "
        f"queue.ROOT = Path({str(here / 'code')!r}); runs = queue.Queue(); runs.add(['seed=1']); "
        "runs.advance(); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    runs = Queue()
    job = wait(runs.at_work)
    wait(lambda: is_locked(job))
    assert os.getsid(job.process) == job.process != os.getsid(0)  # no Ctrl-C nor SIGHUP reaches it
    assert lock.holder(Path(job.folder) / ".lock") == job.process
    runs.add(["seed=2"])
    runs.advance()
    assert runs.at_work() == job
    runs.stop(Path(job.folder))
    wait(lambda: not job.is_alive)
    assert RunDir(Path(job.folder)).status.state == "interrupted"
    runs.advance()
    wait(lambda: runs.at_work() and is_locked(runs.at_work()))
    assert runs.at_work().words[0] == "seed=2"


def killed_at_start(here: Path, body: str) -> None:
    """Start a run in a process that is killed at its Popen, in which `body` says what becomes of the run."""
    script = (
        "import os, sys, time; from pathlib import Path; from ghibli.runs import queue\n"
        f"queue.ROOT = Path({str(here / 'code')!r}); runs = queue.Queue(); start = queue.subprocess.Popen\n"
        "def wait_for_status():\n"
        "    while not any(Path('outputs/train').glob('*/status.json')):\n        time.sleep(0.01)\n"
        f"def killed(*words, **options):\n    {body}\n    os.kill(os.getpid(), 9)\n"
        "queue.subprocess.Popen = killed; runs.add(['seed=1']); runs.add(['seed=2']); runs.advance()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "body",
    [
        "pass",
        "start(*words, **options)",  # it still loads
        "start(*words, **options); wait_for_status()",  # it has its lock
        "Path('end').touch(); start(*words, **options).wait()",  # it is over
    ],
)
def test_a_kill_within_a_start_trains_no_run_twice(here: Path, body: str) -> None:
    """Nor does it lose one, whether the process of the run came to be or not."""
    killed_at_start(here, body)
    runs, is_over = Queue(), "wait()" in body
    assert [runs.outcome(job) for job in runs.jobs()] in (["waits"] * 2, ["is being trained", "waits"])
    for _ in range(3):
        runs.advance()
    (folder, *more) = sorted(here.glob("outputs/train/*"))
    first, second = runs.jobs()
    assert first.folder == str(folder.relative_to(here))
    assert (len(more), second.waits) == (is_over, not is_over)
    if not is_over:
        wait(lambda: is_locked(first))
        assert runs.at_work() == first and first.process == lock.holder(folder / ".lock")
        (here / "end").touch()
        wait(lambda: runs.advance() or not runs.jobs()[1].waits)
    assert runs.outcome(runs.jobs()[0]) == "finished"
    assert runs.tail(first, 5) == [f"began seed=1 hydra.run.dir={first.folder}"]


def test_a_run_that_is_stopped_is_resumed(here: Path) -> None:
    runs = Queue()
    job = started(runs)
    folder = Path(job.folder)
    with pytest.raises(UserError, match="no checkpoints/last.ckpt to resume from"):
        runs.add_resume(folder)
    runs.stop(folder)
    wait(lambda: not runs.jobs()[0].is_alive)
    runs.advance()
    assert runs.jobs()[0].code == 130 and runs.outcome(runs.jobs()[0]) == "interrupted"
    with pytest.raises(UserError, match=f"^nothing is trained in {folder}$"):
        runs.stop(folder)


def test_what_can_be_resumed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(here / "outputs/train/run")
    monkeypatch.setattr(queue, "run_to_resume", lambda name: run)
    runs = Queue()
    runs.add_resume(run.path)
    assert runs.jobs()[0].words == [f"resume={run.path}"]
    with pytest.raises(UserError, match="waits already"):
        runs.add_resume(run.path)
    with run.lock(), pytest.raises(UserError, match="is being trained"):
        runs.add_resume(run.path)


def test_a_run_is_resumed_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses twice: at the same time, or while it loads. Its later stop would be undone."""
    run = RunDir(here / "outputs/train/run")
    monkeypatch.setattr(queue, "run_to_resume", lambda name: run)
    runs = Queue()
    with ThreadPoolExecutor(8) as pool:
        told = [one.exception() for one in [pool.submit(runs.add_resume, run.path) for _ in range(8)]]
    assert sorted(map(str, told)) == [*[f"{run.path} waits already"] * 7, "None"]
    runs.remove(1)
    runs._append(["seed=7", f"resume={run.path}"], str(run.path))
    runs.advance()
    wait(lambda: runs.tail(runs.jobs()[0], 1))
    with pytest.raises(UserError, match=f"^{run.path} is being trained$"):
        runs.add_resume(run.path)


def test_a_run_that_still_loads_is_stopped_at_once(here: Path) -> None:
    """It holds no lock yet, and a shell in the background may have given it a deaf ear for SIGINT."""
    runs = Queue()
    runs.add(["seed=7"])
    runs.advance()
    job = runs.jobs()[0]
    wait(lambda: runs.tail(job, 1))
    runs.stop(Path(job.folder))
    wait(lambda: runs.advance() or runs.jobs()[0].code is not None)
    assert runs.jobs()[0].code == -signal.SIGTERM
    assert runs.outcome(runs.jobs()[0]) == f"began seed=7 hydra.run.dir={job.folder}"


def test_a_run_that_ends_in_an_error_says_which(here: Path) -> None:
    runs = Queue()
    runs.add(["seed=13"])
    wait(lambda: runs.advance() or runs.jobs()[0].code is not None)
    assert runs.outcome(runs.jobs()[0]) == "error: seed=13 brings bad luck"


@pytest.mark.parametrize(
    ("name", "raised"),
    [("claimed", UserError("no folder")), ("Popen", OSError(12, "Cannot allocate memory")),
     ("Popen", ValueError("embedded null byte"))],
)  # fmt: skip
def test_a_run_that_cannot_be_started_is_over(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, raised: Exception
) -> None:
    """It is not tried again, leaves no folder behind, and the next one gets its turn."""
    runs = Queue()
    runs.add(["seed=1"])
    runs.add(["seed=2"])

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(queue.subprocess if name == "Popen" else queue, name, fail)
        runs.advance()
    assert [job.waits for job in runs.jobs()] == [False, True] and runs.at_work() is None
    assert runs.outcome(runs.jobs()[0]) == f"error: it could not be started: {raised}"
    assert not list(here.glob("outputs/train/*"))
    runs.printed(runs.jobs()[0]).unlink()  # a disk that takes no more
    assert runs.outcome(runs.jobs()[0]) == "could not be started"
    runs.advance()
    assert wait(runs.at_work).words[0] == "seed=2"


def test_a_queue_that_cannot_be_changed_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of a run's folder would name a setting that there is not."""
    (here / "file").touch()
    with pytest.raises(UserError, match=r"^the queue of runs in .*/file/queue cannot be changed \(Not a dir"):
        Queue(here / "file/queue").add([])
    monkeypatch.setattr(queue, "PATIENCE", 0.1)
    runs = Queue()
    script = (
        "import sys; from pathlib import Path; from ghibli.runs import lock; "
        f"taken = lock.take(Path({str(runs.folder / '.lock')!r}), ''); print(flush=True); input()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    with Popen([sys.executable, "-c", script], env=environment, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="^another process keeps the queue of runs in .* locked: end it$"):
            runs.add([])
        other.communicate(b"\n")
    assert runs.add([]).number == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-m"], "-m is no setting of a run"),
        (["--config-dir=/tmp"], "--config-dir=/tmp is no setting of a run"),
        (["hydra.run.dir=/tmp/x"], "hydra.run.dir=/tmp/x is no setting of a run"),
        (["+hydra.sweeper=x"], "'?.*hydra.sweeper=x'? is no setting of a run"),
        (["a panda"], "'a panda' is no setting of a run"),
        (["data.caption=a\0b"], r"data.caption=a\\x00b holds a character that no command takes"),
        (["data.caption=\ud800"], r"data.caption=\\ud800 holds a character that no command takes"),
        (["lora.rnak=3"], "unknown key lora.rnak"),
        (["lora.rank=0", "optimizer.lr=-1"], "lora.rank=0.*; and: optimizer.lr=-1"),
        (["data=ghibli", "data.root=no/such"], "data.root=no/such: no such folder"),
    ],
)
def test_settings_are_checked_before_they_wait(here: Path, words: list[str], reason: str) -> None:
    runs = Queue()
    with pytest.raises(UserError, match=f"^{reason}") as told:
        runs.add(words)
    assert "\n" not in str(told.value) and runs.jobs() == []


def test_a_folder_from_elsewhere_stops_no_process_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock to ask, its status may name any process of this machine as the one at work."""
    run = RunDir(here / "outputs/train/copied")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run.status.update(state="running", process=other.pid)
        with pytest.raises(UserError, match="^nothing is trained in"):
            Queue().stop(run.path)
        assert other.poll() is None
        other.communicate(b"\n")
    monkeypatch.setattr(lock, "other_holder", lambda path: None)  # as on macOS
    job = started_unseen(Queue())
    Queue().stop(Path(job.folder))
    wait(lambda: not job.is_alive)
    assert RunDir(Path(job.folder)).status.read()["state"] == "interrupted"


def started_unseen(runs: Queue) -> Job:
    """Start a run, and wait until it trains, where locks cannot be asked."""
    runs.add([])
    runs.advance()
    job = runs.jobs()[0]
    status = RunDir(Path(job.folder)).status
    wait(lambda: status.read().get("step"))
    return job


def test_only_what_waits_is_taken_out(here: Path) -> None:
    runs = Queue()
    started(runs, "seed=1")
    runs.add(["seed=2"])
    runs.remove(2)
    assert [job.number for job in runs.jobs()] == [1]
    for number in (1, 2):
        with pytest.raises(UserError, match=f"^run {number} of the queue waits no longer$"):
            runs.remove(number)


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    own = psutil.Process()
    job = Job(1, [], str(tmp_path), own.pid, own.create_time())
    assert job.is_alive and job.is_at_work
    assert not replace(job, began=own.create_time() - 60).is_at_work
    assert not replace(job, process=2**22 + 1).is_at_work
    assert not replace(job, code=0).is_at_work


def test_nothing_is_lost_when_many_add_at_once(here: Path) -> None:
    """Threads of one process, and another process beside them."""
    script = "from ghibli.runs.queue import Queue; [Queue()._append([f'seed={i}'], None) for i in range(20)]"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as other:
        runs = Queue()
        wait(runs.jobs)  # the other one has begun
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: runs._append([f"seed={i}"], None), range(100, 140)))
        assert other.wait() == 0
    jobs = runs.jobs()
    assert [job.number for job in jobs] == list(range(1, 61))
    assert {job.words[0] for job in jobs} == {f"seed={i}" for i in [*range(20), *range(100, 140)]}


def test_old_jobs_are_forgotten(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "KEPT", 2)
    runs = Queue()
    over = [Job(number, [], "x", 2**22 + number, 0.0, 0) for number in range(1, 5)]
    runs._store([*over, Job(5, ["seed=1"])])
    runs.printed(over[0]).write_text("x")
    runs._append([], None)
    assert [job.number for job in runs.jobs()] == [3, 4, 5, 6] and not runs.printed(over[0]).exists()


ENTRIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["number", "words", "folder", "process", "began", "code"]), inner), max_leaves=12,
)  # fmt: skip


@given(entry=ENTRIES)
def test_a_damaged_file_is_no_job(entry: Any) -> None:
    job = as_job(entry)
    assert job is None or isinstance(job.words, list)


def test_a_queue_that_cannot_be_read_is_left_as_it_is(here: Path) -> None:
    """What it holds may be many runs, or those of another version of this program."""
    runs = Queue()
    assert runs.trouble() is None
    runs.folder.mkdir(parents=True)
    for content in ("", "{", "{}", "[3]", '[{"number": 1}]', "[" * 10_000, "\xff"):
        runs.file.write_bytes(content.encode("latin-1"))
        assert runs.jobs() == [] and runs.at_work() is None
        with pytest.raises(UserError, match="^outputs/queue/queue.json cannot be read, and no") as told:
            runs.add([])
        assert str(told.value) == runs.trouble() and "\n" not in str(told.value)
        assert runs.file.read_bytes() == content.encode("latin-1")


def test_entries_of_another_version_are_not_lost(here: Path) -> None:
    runs = Queue()
    runs._store([Job(1, ["seed=1"])])
    (own,) = json.loads(runs.file.read_text())
    text = json.dumps([own, own | {"number": 2, "machine": "b"}])
    runs.file.write_text(text)
    assert [job.number for job in runs.jobs()] == [1]
    for change in (lambda: runs.add([]), lambda: runs.remove(1), runs.advance):
        with pytest.raises(UserError, match="1 of its entries are damaged or of another version: repair"):
            change()
    assert runs.file.read_text() == text
