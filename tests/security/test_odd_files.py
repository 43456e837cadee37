"""Files of strangers that are no files: pipes, devices, links to them, and gigabytes of nothing.

An archive or a clone can hold links and pipes. Whoever opens a pipe waits for ever, and /dev/zero has no end.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.commands import REPO
from PIL import Image

from ghibli.config.files import from_yaml, read_settings
from ghibli.images.read import Unusable, read_image
from ghibli.models.configs import check_config
from ghibli.models.convert import to_safetensors
from ghibli.models.safetensors import check_whole
from ghibli.report.images import embed_grids
from ghibli.report.page import page_content
from ghibli.report.run_data import read_run
from ghibli.runs import compare, listing
from ghibli.runs.find import all_runs
from ghibli.runs.folder import RunDir, read_checkpoint, step_of
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_with_checksum

KEPT = REPO / "tests" / "end_to_end" / "runs_of_73ce106" / "finished"
HUGE = 2**28  # bytes
TEXTS = (
    "config.yaml", "status.json", "split.json", "metrics.csv", "probe.csv", "distance.csv", "evaluation.json",
    "slim.json", "influence.json", "no_result.txt", ".lock",
)  # fmt: skip
BINARY = ("checkpoints/best.ckpt", "samples/epoch_009.png")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Whoever waits for a pipe is woken, and fails."""

    def wake(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, wake)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return kept(tmp_path / "theirs")


def kept(folder: Path) -> RunDir:
    """Return a copy of a finished run with one small grid."""
    shutil.copytree(KEPT, folder)
    run = RunDir(folder)
    for grid in run.samples.iterdir():
        grid.unlink()
    Image.new("RGB", (8, 8)).save(run.samples / "epoch_001.png")
    return run


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pipe(file: Path) -> None:
    os.mkfifo(file)


def huge(file: Path) -> None:
    """Make a large file that takes no disk."""
    with open(file, "wb") as sparse:
        sparse.truncate(HUGE)


def read_everywhere(run: RunDir, other: RunDir) -> None:
    """Read a run as list, report, compare and resume do."""
    _ = [row.cells for row in listing.listed([run])]
    read_settings(run.config)
    data = read_run(run, with_scores=True)
    _ = data.probe, data.metrics, data.distances, data.evaluation, data.layer_map, data.gain, data.findings
    _ = data.trial.verdict, embed_grids(data)
    with suppress(UserError):
        from_yaml(run.config)
    with suppress(UserError):
        compare.compare(*(compare.read_side(str(side.path)) for side in (run, other)))


@pytest.mark.parametrize("make", [pipe, huge])
def test_files_of_a_run_that_are_none(run: RunDir, tmp_path: Path, make: Callable[[Path], None]) -> None:
    other = kept(tmp_path / "other")
    read_everywhere(run, other)  # what is imported on the way
    before = peak()
    for name in (*TEXTS, *BINARY):
        file, aside = run.path / name, tmp_path / "aside"
        if file.exists():
            file.rename(aside)
        make(file)
        read_everywhere(run, other)
        file.unlink()
        if aside.exists():
            aside.rename(file)
    assert peak() - before < HUGE


def test_a_device_is_not_read(tmp_path: Path) -> None:
    """In a process of its own, with little memory."""
    run = tmp_path / "outputs" / "theirs"
    run.mkdir(parents=True)
    for name in ("status.json", "config.yaml", "metrics.csv"):
        (run / name).symlink_to("/dev/zero")
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30,) * 2); "
    code = f"{limited}sys.argv = ['ghibli', 'list']; runpy.run_module('ghibli', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert "damaged" in done.stdout


@pytest.mark.parametrize("make", [pipe, huge])
def test_files_of_a_base_that_are_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json"):
        check_config(tmp_path / "config.json", "model.path=x")
    make(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors (cannot be read: not a plain file|is cut off)"):
        check_whole(tmp_path / "a.safetensors", "model.path=x")


def test_an_image_that_is_a_pipe(tmp_path: Path) -> None:
    pipe(tmp_path / "a.png")
    with pytest.raises(Unusable, match="not a plain file"):
        read_image(tmp_path / "a.png")


def test_a_report_embeds_no_image_from_outside(run: RunDir, tmp_path: Path) -> None:
    """Who shares the page would share the image."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "private.png")
    (run.samples / "epoch_009.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(UserError, match="epoch_009.png is a link to .*private.png"):
        page_content([run.path])


def test_links_in_a_run_folder_are_not_searched_for_runs(tmp_path: Path) -> None:
    """A link to / would be a walk through all of this disk."""
    for name in ("outputs/theirs", "outputs/study/trial", "mine/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "status.json").write_text("{}")
    (tmp_path / "outputs" / "theirs" / "root").symlink_to(tmp_path)
    found = [run.path for run in all_runs(tmp_path / "outputs")]
    assert found == [tmp_path / "outputs" / name for name in ("study/trial", "theirs")]


def test_weights_to_convert_are_not_larger_than_their_file(tmp_path: Path) -> None:
    """One number can be told to be a terabyte of them, and a gigabyte of zeros compressed."""
    torch.save({"a": torch.zeros(1).expand(10**5), "b": torch.ones(2)}, tmp_path / "a.bin")
    with pytest.raises(UserError, match="a.bin holds tensors far larger than itself"):
        to_safetensors(tmp_path / "a.bin")
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "b.bin")
    with zipfile.ZipFile(tmp_path / "b.bin") as stored, zipfile.ZipFile(tmp_path / "c.bin", "w", 8) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    with pytest.raises(UserError, match="c.bin is damaged.*it is compressed"):
        to_safetensors(tmp_path / "c.bin")
    assert to_safetensors(tmp_path / "b.bin").is_file()


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    """torch reads one: 1 MB on the disk, a gigabyte in memory."""
    plain, bomb = tmp_path / "plain.ckpt", tmp_path / "bomb.ckpt"
    torch.save({"global_step": 1, "state_dict": {"a": torch.zeros(2**22)}}, plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    assert bomb.stat().st_size < plain.stat().st_size / 100
    assert torch.load(bomb, weights_only=True)["state_dict"]["a"].numel() == 2**22, "the attack is a real one"
    for read in (read_checkpoint, step_of):
        with pytest.raises(UserError, match="bomb.ckpt is not a checkpoint .*: it is compressed"):
            read(bomb)
    assert step_of(plain) == 1
    content = bomb.read_bytes()
    write_with_checksum(bomb, lambda file: file.write(content))
    with pytest.raises(UserError, match="it is compressed"):
        read_checkpoint(bomb)
