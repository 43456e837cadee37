"""What the training tab shows: the form as settings of train.py, and a run as its files tell it."""

import re
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import run_python
from helpers.imports import imports_of
from helpers.report_material import EVIL, Page, make_run

from ghibli.app import training
from ghibli.app.training import Runs, TrainingForm
from ghibli.evaluation.statistics import Estimate
from ghibli.report.run_data import read_run
from ghibli.runs import monitor
from ghibli.runs.compose import compose_config
from ghibli.runs.folder import RunDir
from ghibli.runs.jobs import Job, is_process
from ghibli.runs.queue import Queue
from ghibli.runtime.errors import UserError

EMPTY = TrainingForm("", "", "", "", "", "", "", "", "", "")
ROOT = Path(training.__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_decides_knows_no_gradio() -> None:
    for file in ("runs/queue.py", "app/training.py"):
        assert "gradio" not in {name.split(".")[0] for name in imports_of(ROOT / "ghibli" / file)}


def test_an_empty_form_trains_as_usual() -> None:
    assert EMPTY.words() == [] and EMPTY.command().endswith(" train.py")


def test_the_form_asks_for_what_its_fields_say(here: Path) -> None:
    (here / "my images").mkdir()
    form = TrainingForm(
        "demo",
        "",
        "ghibli",
        "my images",
        "it's",
        "3",
        " 8 ",
        "1e-4",
        "7.5",
        "seed=5 data.caption='a b' loss.snr_gamma=5",
    )
    assert shlex.split(form.command())[-len(form.words()) :] == form.words()
    config = compose_config([word for word in form.words() if word != "name=it's"])  # which is refused
    found = (
        config.data.root, config.trainer["max_epochs"], config.lora.rank, config.optimizer.lr,
        config.loss.guidance, config.seed, config.data.caption, config.loss.snr_gamma,
    )  # fmt: skip
    assert found == ("my images", 3, 8, 1e-4, 7.5, 5, "a b", 5)
    with pytest.raises(UserError, match="^further settings: No closing quotation$"):
        replace(EMPTY, more="name='x").words()


def test_a_check_runs_no_option_of_hydra() -> None:
    with pytest.raises(UserError, match="^--multirun is no setting of a run"):
        training.check(["seed=1", "--multirun"])


@pytest.fixture
def slow(here: Path) -> Path:
    """A program that notes its process and then takes a minute, in the place of Python."""
    file = here / "slow"
    lines = ("import os, pathlib, time", "pathlib.Path('pid').write_text(str(os.getpid()))", "time.sleep(60)")
    file.write_text("\n".join([f"#!{sys.executable}", *lines]))
    file.chmod(0o755)
    return file


def began() -> int:
    """Wait until that program has begun; return its process."""
    while not (Path("pid").exists() and Path("pid").read_text()):
        time.sleep(0.01)
    return int(Path("pid").read_text())


def test_one_check_runs_at_a_time_and_not_for_ever(slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(training, "CHECK_LIMIT", 3.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(training.check, ["seed=1"])
        process = began()
        with pytest.raises(UserError, match="^a check is running: wait for its end$"):
            training.check(["seed=1"])
        with pytest.raises(UserError, match=r"^the check took more than 0.05 minutes and was ended: try "):
            first.result()
    assert not is_process(process, None)
    slow.write_text(f"#!{python}\nprint('reading', 'error: no images', sep=chr(10))\n")
    assert Page(training.check(["seed=1"])).text == "error: no images"


def test_a_check_ends_with_the_page(slow: Path) -> None:
    script = slow.with_name("page.py")
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import threading, time; from pathlib import Path; from ghibli.app import training\n"
        f"sys.executable = {str(slow)!r}\n"
        "threading.Thread(target=training.check, args=(['seed=1'],), daemon=True).start()\n"
        "while not Path('pid').exists(): time.sleep(0.01)\n"
        "sys.exit(143)"  # as after SIGTERM
    )
    assert run_python(str(script), cwd=slow.parent).returncode == 143
    assert not is_process(began(), None)


def test_findings_are_escaped_and_have_their_level() -> None:
    page = Page(str(training.finding(f"error: images: {EVIL}")))
    assert page.tags == [("li", {"class": "error"})] and "alert(1)" in page.text
    assert Page(str(training.finding("reading"))).tags == [("li", {})]


def test_the_curve_is_that_of_probe_csv(here: Path) -> None:
    """Its band ends where Student's interval does, to a hundredth of a point."""
    run = make_run(here / "outputs/train/run", gains=(0, 0.3, 0.4, 0.35))
    page = Page(training.run_view(Queue(), run))
    rows = read_run(run, with_scores=False).probe
    (band,) = (attributes for name, attributes in page.tags if name == "polygon")
    corners = [tuple(map(float, pair.split(","))) for pair in str(band["points"]).split()]
    upper, lower = corners[: len(rows)], corners[len(rows) :][::-1]
    values = [100 * row["probe/val_gain"] for row in rows]
    reaches = [
        100 * Estimate(row["probe/val_gain"], row["probe/val_gain_se"], freedom=7).reach for row in rows
    ]
    line = next(attributes for name, attributes in page.tags if name == "polyline")
    middle = [float(pair.split(",")[1]) for pair in str(line["points"]).split()]
    scale = (middle[2] - middle[0]) / (values[2] - values[0])  # px per percent
    for at, reach in enumerate(reaches):
        assert middle[at] - middle[0] == pytest.approx(scale * (values[at] - values[0]), abs=0.11)
        assert upper[at][1] == pytest.approx(middle[at] + scale * reach, abs=0.11)
        assert lower[at][1] == pytest.approx(middle[at] - scale * reach, abs=0.11)


def test_all_that_watch_tells_is_there_and_nothing_is_markup(here: Path) -> None:
    findings = [{"name": "overfitting", "text": f"since epoch 2 {EVIL}"}]
    run = make_run(
        here / "outputs/train/run", state="failed", reason=EVIL, settings=EVIL, findings=findings,
        updated="2026-01-01T10:05:00+00:00", starts=[{"at": "2026-01-01T10:00:00+00:00", "step": None}],
    )  # fmt: skip
    page = Page(training.run_view(Queue(), run))
    assert not {"script", "img"} & {name for name, _ in page.tags}
    told = re.sub(r"\s+", " ", page.text)
    for line in monitor.view(run.path, 10_000, monitor.utc_now()):
        if line.startswith(("epoch", "doctor", "reason", "grid", "failed")):
            assert " ".join(line.split()) in told, line
    assert page.text.count("alert(1)") >= 3


def test_a_run_that_loads_shows_what_it_prints(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, run = Queue(), RunDir(here / "outputs/train/run")
    job = Job(1, ["seed=1"], str(run.path), 1, None)
    runs.folder.mkdir(parents=True)
    runs._store([job])
    monkeypatch.setattr(Job, "is_alive", True)
    runs.printed(job).write_text(f"loading torch ...\n{EVIL}\n")
    page = Page(training.run_view(runs, run))
    assert "loading: a run writes its first file after some seconds" in page.text
    assert "loading torch ..." in page.text and "script" not in {name for name, _ in page.tags}
    assert Page(training.queue_list(runs)).text == "1. seed=1: is being trained"


def test_a_queue_that_cannot_be_read_is_told(here: Path) -> None:
    runs = Queue()
    assert training.queue_list(runs) == "Nothing was asked for yet."
    runs.folder.mkdir(parents=True)
    runs.file.write_text("{")
    assert "outputs/queue/queue.json cannot be read" in Page(training.queue_list(runs)).text
    runs._store([Job(1, ["seed=1"])])
    runs.file.write_text(runs.file.read_text().replace("]\n", ', {"machine": "<b>"}]'))
    told = Page(training.queue_list(runs)).text
    assert "1 of its entries are damaged" in told and "1. seed=1: waits" in told


def test_which_run_is_watched(here: Path) -> None:
    queue = Queue()
    assert Runs().watched(queue, training.AT_WORK) is None
    assert training.run_view(queue, None).startswith("Nothing has been trained")
    old = make_run(
        here / "outputs/train/old", started="2026-01-01T10:00:00+00:00", gain=-0.2, state="interrupted"
    )
    new = make_run(here / "outputs/train/new", started="2026-01-02T10:00:00+00:00", gain=0.1)
    runs, own = Runs(), RunDir(Path("outputs/train/new"))
    assert runs.choices()[1:] == [
        ("new, finished, 10.0 % better than the base", "outputs/train/new"),
        ("old, interrupted, 20.0 % worse than the base", "outputs/train/old"),
    ]
    assert runs.watched(queue, training.AT_WORK) == own
    assert runs.watched(queue, "outputs/train/old") == RunDir(Path("outputs/train/old"))
    queue.folder.mkdir(parents=True)
    queue._store([Job(1, [], "outputs/train/old", 2**22 + 1, 0.0, 0)])
    assert runs.watched(queue, training.AT_WORK) == RunDir(Path("outputs/train/old"))  # it was the last
    new.status.update(state="running")
    with new.lock():  # from a terminal
        assert runs.watched(queue, training.AT_WORK) == own
        with old.lock():
            queue._store([Job(1, [], "outputs/train/old", 2**22 + 1, 0.0)])
            assert runs.watched(queue, training.AT_WORK) == RunDir(Path("outputs/train/old"))
    for strange in ("/etc", "outputs", "outputs/train/../train/old"):
        with pytest.raises(UserError, match="is no run below outputs/: reload the page$"):
            runs.watched(queue, strange)


def test_grids_are_told_apart_by_name_and_time(here: Path) -> None:
    run = make_run(here / "run")
    before = training.grids_of(run)
    assert training.grids_of(run) == before and len(before) == 3
    (run.samples / "epoch_002.png").write_bytes((run.samples / "adapter.png").read_bytes())
    assert training.grids_of(run) != before
    assert training.grids_of(None) == []
