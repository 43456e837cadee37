"""Training on the page, in a browser: asked for, watched, stopped, resumed, and the server killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.browsers import click, fill, new_browser, one, open_tab, wait, words
from helpers.commands import REPO, SMALL

from ghibli.runs import lock
from ghibli.runs.folder import RunDir
from ghibli.runs.queue import Queue

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow

LONG = ("trainer.max_epochs=40", "early_stopping.patience=null", "sample.every_n_epochs=1", "threads=1")


class Server:
    """`ghibli app` in a process of its own, at a fixed address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.process = self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> subprocess.Popen[bytes]:
        words = ["-m", "ghibli", "app", "model=demo", "data=demo", "--port", str(self.port)]
        environment = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(self.folder)}
        with open(self.folder / "server.txt", "ab") as printed:
            started = subprocess.Popen(
                [sys.executable, *words], cwd=self.folder, env=environment, stdout=printed, stderr=printed
            )
        wait(self.answers)
        return started

    def answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(self.address):  # it is not up yet
            return True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """The page; at the end nothing that was started is left running."""
    served = Server(folder)
    yield served
    served.kill()
    for job in Queue(folder / "outputs/queue").jobs():
        if job.is_alive:
            os.kill(int(job.process or 0), signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = new_browser(width=1280, height=1400)
    yield driver
    driver.quit()


def opened(browser: Any, server: Server) -> Any:
    """Open the page at the training tab."""
    browser.get(server.address)
    wait(lambda: one(browser, "#draw"))
    open_tab(browser, "Train")
    wait(lambda: one(browser, "#train").is_displayed())
    return browser


def ask_for(browser: Any, name: str, images: Path, *words: str) -> None:
    """Fill the form in and press Train."""
    settings = [
        word for word in (*SMALL, *LONG) if not word.startswith(("model=", "data=", "trainer.max_epochs"))
    ]
    more = " ".join([*settings, f"data.root={images}", "data.draw=null", "model=demo", "data=demo", *words])
    fill(browser, "#run-name input, #run-name textarea", name)
    fill(browser, "#epochs input, #epochs textarea", 40)
    fill(browser, "#more input, #more textarea", more)
    wait(lambda: f"name={name}" in one(browser, "#train-command textarea").get_attribute("value"))
    click(browser, "#train")


def press(browser: Any, selector: str) -> None:
    """Click a button once it can be pressed."""
    wait(lambda: one(browser, selector).is_enabled())
    click(browser, selector)


def run_text(browser: Any) -> str:
    return wait(lambda: one(browser, "#run").text)


def epochs_done(browser: Any) -> int:
    found = re.search(r"epoch +(\d+) of at most 40", run_text(browser))
    return int(found[1]) if found else 0


def is_trained(run: RunDir) -> bool:
    return lock.is_held(run.path / ".lock") is True


def test_a_run_from_the_form_to_the_end(browser: Any, server: Server, folder: Path, images: Path) -> None:
    """Two runs, one at a time; the page is reloaded, opened twice, and its server is killed meanwhile."""
    tab, first = opened(browser, server), RunDir(folder / "outputs/train/first")
    ask_for(tab, "first", images)
    ask_for(tab, "second", images)
    wait(lambda: "waits" in one(tab, "#jobs").text and "name=second" in one(tab, "#jobs").text)
    wait(lambda: is_trained(first))
    second = RunDir(folder / "outputs/train/second")
    assert not second.path.exists()

    wait(lambda: epochs_done(tab) >= 2)  # without a reload
    assert "left at this pace" in run_text(tab)
    wait(lambda: one(tab, "#run polygon.band"))
    wait(lambda: one(tab, "#run-grids img"))

    opened(tab, server)  # reloaded in the middle
    before = epochs_done(tab)
    wait(lambda: epochs_done(tab) > before)

    handle = tab.current_window_handle
    tab.switch_to.new_window("tab")
    opened(tab, server)  # both tabs show the same run
    wait(lambda: epochs_done(tab) > before)
    tab.close()
    tab.switch_to.window(handle)

    process = lock.holder(first.path / ".lock")
    server.kill()
    assert is_trained(first) and lock.holder(first.path / ".lock") == process
    epoch = first.status.read()["epoch"]
    wait(lambda: first.status.read()["epoch"] > epoch)  # it is trained on without the page
    server.process = server.start()
    opened(tab, server)
    wait(lambda: epochs_done(tab) > epoch)
    assert "outputs/train/first" in run_text(tab) and "running" in run_text(tab)

    press(tab, "#stop")
    wait(lambda: "asked to stop" in words(tab, "answer"))
    wait(lambda: first.status.read()["state"] == "interrupted" and not is_trained(first))
    step = first.status.read()["step"]
    wait(lambda: is_trained(second))  # the next one begins by itself

    resume_and_see(tab, server, first, second, step)


def resume_and_see(tab: Any, server: Server, first: RunDir, second: RunDir, step: int) -> None:
    """Put the first run back behind the second, stop that one, and see the first go on where it stopped."""
    choose(opened(tab, server), "#watch", "first")
    wait(lambda: "interrupted" in run_text(tab) and "outputs/train/first" in run_text(tab))
    press(tab, "#resume")
    wait(lambda: "resume=outputs/train/first" in one(tab, "#jobs").text)
    assert not is_trained(first)
    choose(tab, "#watch", "whatever")
    wait(lambda: "outputs/train/second" in run_text(tab))
    wait(lambda: second.status.read().get("step"))
    press(tab, "#stop")
    wait(lambda: is_trained(first))
    wait(lambda: first.status.read()["step"] > step)
    starts = first.status.read()["starts"]
    assert len(starts) == 2 and starts[1]["step"] >= step - 1
    choose(opened(tab, server), "#watch", "first")
    press(tab, "#stop")
    wait(lambda: not is_trained(first))


def choose(browser: Any, selector: str, words: str) -> None:
    """Choose the entry of a dropdown that begins with some words."""
    field = wait(lambda: one(browser, f"{selector} input"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)

    def entry() -> Any:
        listed = browser.find_elements("css selector", "ul[role=listbox] li")
        if not listed:
            field.click()
        return next((one for one in listed if words in one.text), None)

    wait(entry).click()


@pytest.mark.parametrize(
    ("mistake", "reason"), [("lora.rnak=3", "unknown key lora.rnak"), ("-m", "is no setting of a run")]
)
def test_mistakes_are_told_and_nothing_is_started(
    browser: Any, server: Server, folder: Path, mistake: str, reason: str
) -> None:
    tab, queue = opened(browser, server), Queue(folder / "outputs/queue")
    before = [job.number for job in queue.jobs()]
    fill(tab, "#more input, #more textarea", mistake)
    wait(lambda: mistake in one(tab, "#train-command textarea").get_attribute("value"))
    click(tab, "#train")
    wait(lambda: reason in one(tab, "#asked").text)
    assert [job.number for job in queue.jobs()] == before  # how an earlier one ended may be noted meanwhile


def test_a_set_is_checked(browser: Any, server: Server, tmp_path: Path) -> None:
    tab = opened(browser, server)
    (tmp_path / "empty").mkdir()
    fill(tab, "#images-root input, #images-root textarea", tmp_path / "empty")
    fill(tab, "#more input, #more textarea", "model=demo data=ghibli data.draw=null")
    wait(lambda: "data=ghibli" in one(tab, "#train-command textarea").get_attribute("value"))
    click(tab, "#check")
    found = wait(lambda: one(tab, "#findings li.error"))
    assert "error: images:" in found.text
