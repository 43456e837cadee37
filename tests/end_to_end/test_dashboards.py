"""One run on three dashboards: each shows the same, and none that fails changes the run's results."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from faults.compare import different_parts, image
from helpers.commands import GRIDS, QUICK, SMALL, run_python
from helpers.dashboards import curves_of, tensorboard_events, trackio_runs
from helpers.wandb_files import environment, offline_records, wandb_curves
from PIL import Image

from ghibli.runtime.files import read_rows

pytestmark = pytest.mark.slow
ALL = "logger=[wandb,tensorboard,trackio]"
LABELS = ("W&B", "TensorBoard", "trackio")
LOST = " failed ("
PULL = """
import os, sys
from pathlib import Path

import psutil
from ghibli.training.callbacks.metrics import Records

def kill():
    for child in psutil.Process().children():
        child.kill()
    psutil.Process(int(os.environ["TRACKIO_SERVER"])).kill()

def fill():
    for folder in os.environ["FULL"].split(":"):
        try:
            with open(Path(folder) / "filler", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass

write, rows = Records.write_train_row, []
def write_and_pull(self, trainer):
    write(self, trainer)
    rows.append(1)
    if len(rows) == 3:
        {pull}()
Records.write_train_row = write_and_pull
import train
train.start()
"""
SERVER = """
import trackio
app, url, share, full = trackio.show(open_browser=False, block_thread=False)
print(full, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")


@pytest.fixture(scope="module")
def words(images: Path) -> list[str]:
    """A short run with a finding of the doctor, a row every step, and two grids."""
    own = [word for word in SMALL if not word.startswith("wandb.")]
    return [
        *own, *QUICK, *GRIDS, "trainer.max_epochs=2", "sample.samplers=[ddim]", f"data.root={images}",
        "data.draw=null", "wandb.mode=offline", "loss.noise_schedule=linear",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a dashboard."""
    run = tmp_path_factory.mktemp("plain") / "run"
    done = run_python("train.py", *words, "logger=none", f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert LOST not in done.stdout
    return run


def pulled(pull: str, words: list[str], run: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Trains with all dashboards; after the third row of metrics.csv the plug is pulled."""
    given = environment(**extra)
    for name, value in extra.items():
        if value == "":
            del given[name]
    code, warm = PULL.replace("{pull}", pull), "HF_HOME" not in extra  # which is read when it is imported
    return run_python("-c", code, *words, ALL, f"hydra.run.dir={run}", warm=warm, env=given)


def lost(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The dashboards that the run said it had lost, each in one line."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if LOST in line]
    assert all(line.endswith("going on without it; metrics.csv has all numbers") for line in lines)
    return [line.partition(LOST)[0] for line in lines]


def test_each_shows_the_same(words: list[str], plain: Path, tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    given = environment(TRACKIO_DIR=str(store))
    done = run_python("train.py", *words, ALL, f"hydra.run.dir={run}", warm=True, env=given)
    assert lost(done) == []
    assert different_parts(plain, run) == []
    events = tensorboard_events(run / "tensorboard")
    (stored,) = trackio_runs(store)
    records = offline_records(run)

    shown = {
        "W&B": wandb_curves(records), "TensorBoard": events["scalars"], "trackio": curves_of(stored["logs"])
    }  # fmt: skip
    for name, curve in curves_in_files(run).items():
        for label in LABELS:
            found = [point for point in shown[label][name] if not math.isnan(point[1])]
            assert [step for step, _ in found] == [step for step, _ in curve], (label, name)
            np.testing.assert_allclose(
                [value for _, value in found],
                [value for _, value in curve],
                rtol=1e-6 if label == "TensorBoard" else 0,  # float32
            )

    drawn = [image(run / "samples" / f"{name}.png") for name in ("epoch_001", "adapter")]
    media = sorted((run / "wandb").glob("offline-run-*/files/media/images/*.png"), key=os.path.getmtime)
    places = [log["samples"]["file_path"] for log in stored["logs"] if "samples" in log]
    for shown_images in (
        [image(file) for file in media],
        [np.asarray(Image.open(BytesIO(png)).convert("RGB")) for _, png in events["images"]["samples"]],
        [image(store / "media" / place) for place in places],
    ):
        assert len(shown_images) == 2
        assert all(np.array_equal(*pair) for pair in zip(shown_images, drawn, strict=True))

    ends = ("", "_low", "_high")
    rows = [[float(row[f"probe/val_gain{end}"]) for end in ends] for row in read_rows(run / "probe.csv")]
    files = (run / "wandb").glob("offline-run-*/files/media/table/probe/gain_curve*")
    points = json.loads(max(files, key=os.path.getmtime).read_text())["data"]  # of the line chart
    tables = [log["probe/gain_curve"]["_value"] for log in stored["logs"] if "probe/gain_curve" in log]
    assert [[row[key] for key in ("gain", "95 % low", "95 % high")] for row in tables[-1]] == rows
    text = events["texts"]["probe/gain_curve"][-1][1].splitlines()[2:]
    assert [[float(cell) for cell in line.split("|")[2:5]] for line in text] == rows
    assert points == [
        [epoch, line, row[at]]
        for at, line in enumerate(("gain", "95 % low", "95 % high"))
        for epoch, row in enumerate(rows)
    ]
    assert b"probe/val_gain_low" in events["charts"][0]  # drawn as a band

    finding = json.loads((run / "status.json").read_text())["findings"][0]
    assert [(alert["title"], alert["text"]) for alert in stored["alerts"]] == [
        (finding["name"], finding["text"])
    ]
    assert events["texts"][f"doctor/{finding['name']}"] == [(0, finding["text"])]
    assert finding["text"][:40] in json.dumps(records)
    assert stored["config"]["lora"]["rank"] == 4 and '"rank"' in json.dumps(records)
    assert "\n    lora.rank: 4\n" in events["texts"]["settings"][0][1]


def curves_in_files(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.csv and probe.csv have, as (step, value)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in ("metrics.csv", "probe.csv"):
        for row in read_rows(run / name):
            for key, value in row.items():
                if key not in ("step", "epoch") and value != "":
                    curves.setdefault(key, []).append((int(row["step"]), float(value)))
    return curves


def test_services_killed_in_mid_run(words: list[str], plain: Path, tmp_path: Path) -> None:
    """W&B's own service and a server of trackio; TensorBoard has none."""
    with trackio_server(tmp_path / "store") as (process, url):
        done = pulled(
            "kill", words, tmp_path / "run",
            TRACKIO_SERVER_URL=url, TRACKIO_SERVER=str(process), TRACKIO_DIR=str(tmp_path / "mine"),
        )  # fmt: skip
    assert sorted(lost(done)) == ["W&B", "trackio"]
    assert different_parts(plain, tmp_path / "run") == []


@contextmanager
def trackio_server(store: Path) -> Iterator[tuple[int, str]]:
    """Trackio's dashboard as a server: its process and the address to log to."""
    given = environment(TRACKIO_DIR=str(store))
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=given,
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = next(line for line in server.stdout if line.startswith("http"))
        yield server.pid, url.strip()
    finally:
        server.kill()
        server.wait()


def test_a_disk_that_is_full_in_mid_run(words: list[str], plain: Path, tmp_path: Path) -> None:
    """Under the folder of each dashboard, and nowhere else."""
    run = tmp_path / "run"
    folders = [run / "wandb", run / "tensorboard", tmp_path / "store"]
    with mounted(folders, "size=4m"):
        done = pulled("fill", words, run, FULL=":".join(map(str, folders)), TRACKIO_DIR=str(folders[-1]))
    assert sorted(lost(done)) == sorted(LABELS)
    assert different_parts(plain, run) == []


@pytest.mark.parametrize("home", ["", "read-only"])
def test_no_home_and_one_that_cannot_be_written(
    home: str, words: list[str], plain: Path, tmp_path: Path
) -> None:
    """Trackio keeps its store there, the others write into the run's folder."""
    place = tmp_path / "home"
    with mounted([place], "size=4k,ro"):
        plots = str(tmp_path / "plots")
        done = pulled(
            "bool", words, tmp_path / "run",
            HOME=str(place) if home else "", HF_HOME=str(place / "hf"), MPLCONFIGDIR=plots, TRACKIO_DIR="",
        )  # fmt: skip
    assert lost(done) == ["trackio"]
    assert different_parts(plain, tmp_path / "run") == []


@contextmanager
def mounted(folders: list[Path], options: str) -> Iterator[None]:
    """Disks in memory at these folders, which are made."""
    done: list[Path] = []
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip("needs the right to mount")
            done.append(folder)
        yield
    finally:
        for folder in done:
            subprocess.run(["umount", "-l", str(folder)], check=True)
