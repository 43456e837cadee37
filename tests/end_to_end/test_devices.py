"""Two devices give what one gives with the same global batch; one process writes, speaks and ends it all.

Two CPU processes stand for two devices, each with one thread, over gloo.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.compare import different_parts
from helpers.commands import GRIDS, REPO, SMALL, run_python
from PIL import Image

import train
from ghibli.data.dataset import share_of_probe
from ghibli.runs import distributed, identity
from ghibli.runs.folder import RunDir
from ghibli.runtime import rank
from ghibli.runtime.errors import UserError

TWO = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "lora.dropout=0")
DRAWN = (*GRIDS, "sample.samplers=[ddpm]", "sample.prompts=[A panda]")
ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def on_two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an undisturbed run on two devices, and all that it printed."""
    folder = tmp_path_factory.mktemp("two")
    words = [*SMALL, f"data.root={images}", "data.draw=null", *DRAWN, *TWO, f"hydra.run.dir={folder}"]
    done = run_python(str(REPO / "train.py"), *words)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def files_of(folder: Path) -> set[str]:
    """Every file of a run, without Hydra's own."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(".hydra/")}


def assert_equal_to_rounding(left: Path, right: Path) -> None:
    for file in ("metrics.csv", "probe.csv"):
        for ours, theirs in zip(rows(left / file), rows(right / file), strict=True):
            for column in ours.keys() - {"time/images_per_second"}:
                if ours[column] != theirs[column]:
                    assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-4), column
    assert rows(left / "probe.csv")[0] == rows(right / "probe.csv")[0]  # of the base: to the bit
    stored = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (left, right)]
    assert stored[0]["global_step"] == stored[1]["global_step"]
    for name, weight in stored[0]["state_dict"].items():
        torch.testing.assert_close(weight, stored[1]["state_dict"][name], atol=2e-4, rtol=0)
    for name in ("adapter.png", "epoch_001.png"):
        a, b = (np.asarray(Image.open(run / "samples" / name)).astype(int) for run in (left, right))
        assert np.abs(a - b).max() <= 2
        assert (a != b).mean() < 1e-3


@pytest.mark.slow
def test_two_devices_equal_one_with_the_same_global_batch(
    on_two: tuple[Path, str], make_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Batch 2 on two devices and batch 4 on one: losses, scores, weights, images, files and words."""
    folder, printed = on_two
    train.run(make_config(*DRAWN, "data.batch_size=4", "lora.dropout=0"), RunDir(tmp_path))
    assert_equal_to_rounding(folder, tmp_path)
    assert files_of(folder) == files_of(tmp_path)
    said = [printed, capsys.readouterr().out]
    places = [os.path.relpath(place, REPO) for place in (folder, tmp_path)]
    assert said[0].replace(places[0], "RUN") == said[1].replace(places[1], "RUN")


@pytest.mark.slow
def test_a_broken_image_of_the_second_device(on_two: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    """Named once, although only the second process saw it; resumed without it: equal to the bit."""
    words = [*SMALL, f"data.root={images}", "data.draw=null", *DRAWN, *TWO, f"hydra.run.dir={tmp_path}"]
    done = faulty("nan:1:5", *words)  # the first step of the second epoch
    assert done.returncode == 2
    (name,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("broken: ")]
    assert done.stderr.startswith(f"error: step 2: the loss is not finite for {name} at timestep ")
    assert done.stderr.count("\n") == 1
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert name in status["reason"]
    resumed = run_python(str(REPO / "train.py"), f"resume={tmp_path}")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert different_parts(on_two[0], tmp_path) == []


def faulty(fault: str, *words: str) -> subprocess.CompletedProcess[str]:
    script, given = str(REPO / "tests" / "helpers" / "faulty.py"), os.environ | {"FAULT": fault}
    return run_python(script, *words, warm=True, env=given)


def processes_of(folder: Path) -> list[int]:
    """The processes that were started to train along in a run folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if (
                f"{distributed.JOINS}=".encode() in (content := entry.read_bytes())
                and bytes(folder) in content
            ):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_killed_in_the_second_epoch_and_resumed(on_two: tuple, images: Path, tmp_path: Path) -> None:
    """The first process is gone at once; the second one follows by itself."""
    words = [*SMALL, f"data.root={images}", "data.draw=null", *DRAWN, *TWO, f"hydra.run.dir={tmp_path}"]
    assert faulty("kill:0:6", *words).returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while processes_of(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.1)
    resumed = run_python(str(REPO / "train.py"), f"resume={tmp_path}")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert different_parts(on_two[0], tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("kill:1:2", 2, "process 2 of 2 was killed by SIGKILL without a message"),
        ("raise:1:2", 2, "ZeroDivisionError: a fault of ours"),
        ("stuck:0:2", 2, "ZeroDivisionError: a fault of ours"),
        ("sigint:0:1", 130, "stopping after this step; once more to stop at once"),
        ("sigterm:1:1", 0, "gain     better than the base"),
    ],
)
def test_faults(images: Path, tmp_path: Path, fault: str, code: int, words: str) -> None:
    """No end without its reason, and no process or file left behind."""
    small = [*SMALL, f"data.root={images}", "data.draw=null"]
    done = faulty(fault, *small, *TWO, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}")
    assert done.returncode == code
    assert words in (done.stderr.splitlines()[-1] if code == 2 else done.stdout)
    assert not processes_of(tmp_path)
    assert not [name for name in files_of(tmp_path) if ".process" in name]


@pytest.mark.slow
def test_torchrun_needs_one_folder(images: Path, tmp_path: Path) -> None:
    """Processes started from outside work too, if they are told where."""
    small = [*SMALL, f"data.root={images}", "data.draw=null"]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPO / "train.py")]
    words += [*small, *TWO, "trainer.max_epochs=1"]
    done = run_python(*words, cwd=tmp_path)
    assert "several processes of this command were started at once" in done.stderr
    assert "hydra.run.dir=DIR" in done.stderr
    done = run_python(*words, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gain     ") == 1
    assert (tmp_path / "run" / ADAPTER).exists()


@pytest.mark.parametrize(("count", "world_size"), [(1, 3), (4, 2), (5, 2), (7, 3)])
def test_the_shares_side_by_side_are_the_probe_in_order(count: int, world_size: int) -> None:
    shares = [share_of_probe(count, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    woven = [index for together in zip(*shares, strict=True) for index in together]
    assert woven[:count] == list(range(count))


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "ddp_spawn", "ddp_notebook"])
def test_strategies_that_are_refused(make_config: Callable, strategy: str) -> None:
    with pytest.raises(UserError, match=rf"trainer.strategy={strategy} is not supported .*: use ddp"):
        make_config(f"trainer.strategy={strategy}")


def test_a_further_process_leaves_a_finished_run_as_the_first_does(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by torchrun for a folder that is done, it would wait for the first one for ever."""
    run = RunDir(tmp_path)
    run.status.update(state="finished", objective=0.5)
    run.status.update(seal=identity.result_checksum(run.status.read()))
    config, followed = make_config(), []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train, "current_run", lambda: run)
    monkeypatch.setattr(train, "job_config", lambda cfg: config)
    monkeypatch.setattr(train, "follow", lambda *_: followed.append(1))
    train.main(config)
    assert followed == []
    train.main(replace(config, resume=str(tmp_path)))  # may ask for more epochs
    run.status.update(state="running")
    train.main(config)
    assert followed == [1, 1]


def test_who_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank.is_first() and not distributed.started_outside()
    monkeypatch.setenv("SLURM_NTASKS", "2")  # an allocation, but this shell is no step of it
    assert rank.is_first() and not distributed.started_outside()
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert not rank.is_first() and distributed.started_outside()


def test_why_a_process_ended(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    run = RunDir(tmp_path)
    assert "process 2 of 2 ended with code 3 without a message" in distributed.why_ended([process], run)
    distributed.last_words(run, 1).write_text("no memory")
    assert distributed.why_ended([process], run) == "no memory"
    distributed.end_others([process], run)
    assert not list(tmp_path.iterdir())
