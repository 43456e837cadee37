"""A study of four trials: killed five times, and on Ray, submitit and joblib, it gives the same table.

Each takes minutes and most need an extra of pyproject.toml, so they run with `-m slow`.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from helpers.commands import CHECKPOINTS, REPO, SMALL, run_python, warm_python
from helpers.wandb_files import environment

from ghibli.runs.folder import RunDir

pytestmark = pytest.mark.slow
GRID = ("lora.rank=2,4", "optimizer.lr=1e-3", "loss.guidance=1,7.5", "threads=1")
RAY = (
    "hydra/launcher=ray",
    "+hydra.launcher.ray.init.num_cpus=2",
    "+hydra.launcher.ray.init.include_dashboard=false",
)


def words(folder: Path, images: Path) -> list[str]:
    """`python sweep.py ...` of four small trials into a folder."""
    settings = [*SMALL, *CHECKPOINTS, f"data.root={images}", "data.draw=null", "sweep.repeats=0", *GRID]
    return [str(REPO / "sweep.py"), *settings, f"hydra.sweep.dir={folder}"]


def table(folder: Path) -> list[dict[str, str]]:
    """study.csv but for the minutes, and the bytes of each adapter."""
    with open(folder / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("minutes")
        adapter = folder / row["trial"] / "adapter" / "pytorch_lora_weights.safetensors"
        row["adapter"] = adapter.read_bytes().hex()
    return rows


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test without this launcher, before the minutes of its fixtures."""
    try:
        missing = find_spec(f"hydra_plugins.hydra_{package}_launcher") is None
    except ModuleNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"the launcher {package} is not installed")


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_python(*words(folder, images), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(table(folder)) == 4
    return folder


@contextmanager
def killed(*command: str) -> Iterator[Callable[[], bool]]:
    """Starts a study, and kills it at the end of the block; gives what tells whether it is alive."""
    done: list[subprocess.CompletedProcess[str]] = []
    study = threading.Thread(target=lambda: done.append(run_python(*command)))
    study.start()
    while not (children := psutil.Process(warm_python().pid).children()):
        time.sleep(0.01)
    try:
        yield study.is_alive
    finally:
        children[0].kill()
        study.join()
    assert done[0].returncode == -signal.SIGKILL, "the study had ended before it could be killed"


def running(folder: Path) -> Iterator[RunDir]:
    """The trials that are being trained and have a checkpoint."""
    for status in folder.glob("*/status.json"):
        run = RunDir(status.parent)
        if run.status.state == "running" and run.last_checkpoint.exists():
            yield run


def half_done(is_alive: Callable[[], bool], folder: Path) -> RunDir:
    """Waits for a trial that is being trained and has a checkpoint."""
    end = time.monotonic() + 300
    while not (found := list(running(folder))):
        assert is_alive() and time.monotonic() < end
        time.sleep(0.05)
    return found[0]


def resumed(folder: Path) -> list[RunDir]:
    """The trials that went on from a checkpoint."""
    runs = [RunDir(status.parent) for status in folder.glob("*/status.json")]
    return [run for run in runs if len(run.status.read()["starts"]) > 1]


def test_killed_five_times_the_table_is_the_same(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    folder, moments = tmp_path / "killed", random.Random(0)
    for place in range(5):
        with killed(*words(folder, images)) as is_alive:
            if place == 0:
                half_done(is_alive, folder)
            time.sleep(4 * moments.random())
    done = run_python(*words(folder, images), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert resumed(folder)
    assert table(folder) == table(undisturbed)


def test_a_search_killed_three_times_is_the_same_search(images: Path, tmp_path: Path) -> None:
    """Twelve real trials, chosen by Optuna; the table and what was asked are those of an undisturbed one."""
    optuna = pytest.importorskip("optuna")
    chosen = ("lora.rank=2,4", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "sweep.search=12")
    more = (*chosen, "trainer.max_epochs=1", "loss.guidance=1", "lora.text_encoder=false")
    moments, asked = random.Random(1), []
    for name, kills in (("undisturbed", 0), ("killed", 3)):
        folder = tmp_path / name
        for place in range(kills):
            with killed(*words(folder, images), *more) as is_alive:
                if place == 0:
                    half_done(is_alive, folder)
                time.sleep(4 * moments.random())
        done = run_python(*words(folder, images), *more, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        search = optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'optuna.db'}")
        asked.append([(trial.number, trial.params, trial.value) for trial in search.trials])
    assert len(asked[0]) == 12 and asked[0] == asked[1]
    assert resumed(tmp_path / "killed")
    assert table(tmp_path / "killed") == table(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("package", "launcher"),
    [
        pytest.param("ray", RAY, marks=needs("ray")),
        pytest.param(
            "submitit",
            ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=15"),
            marks=needs("submitit"),
        ),
        pytest.param("joblib", ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), marks=needs("joblib")),
    ],
)
def test_other_launchers_give_the_same_table(
    package: str, launcher: tuple[str, ...], undisturbed: Path, images: Path, tmp_path: Path
) -> None:
    done = run_python(*words(tmp_path / package, images), *launcher, timeout=900, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(tmp_path / package) == table(undisturbed)


@needs("ray")
def test_ray_survives_a_worker_that_is_killed(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    log = open(folder.with_suffix(".log"), "ab")  # noqa: SIM115
    command = [sys.executable, *words(folder, images), *RAY]
    study = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, env=environment())
    trial = half_done(lambda: study.poll() is None, folder)
    os.kill(trial.status.read()["process"], signal.SIGKILL)
    assert study.wait(timeout=900) == 0, folder.with_suffix(".log").read_text()
    assert resumed(folder)
    assert table(folder) == table(undisturbed)
