"""Runs that go wrong: what train.py says, what it leaves behind, and that nothing is lost."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from faults.compare import different_parts
from helpers.commands import CHECKPOINTS, REPO, SMALL, run_python

import train
from ghibli.cli.runs import list_command
from ghibli.config.schema import Config
from ghibli.runs import launch
from ghibli.runs.find import run_to_resume
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole, write_atomically
from ghibli.training.callbacks.checkpoints import WholeCheckpoints
from ghibli.training.module import GhibliModule
from ghibli.training.session import training_session

QUICK = ("data.draw=null", "sample.every_n_epochs=0")
Said = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture
def command(
    images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., Said]:
    """train.py with these words in this process, shrunk unless it resumes."""

    def run(*words: str) -> Said:
        resumes = any(word.startswith("resume=") for word in words)
        small = [] if resumes else [*SMALL, f"data.root={images}", *QUICK]
        monkeypatch.setattr(sys, "argv", ["train.py", *small, *words])
        code = 0
        try:
            launch.hydra_entry(REPO / "conf", "train", train.main)
        except SystemExit as leave:
            code = leave.code
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def undisturbed(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train.run(make_config(*QUICK), RunDir(folder))
    return folder


def status(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


def one_line(said: Said) -> str:
    """The line on stderr; the exit code is 2 and there is nothing else."""
    code, _, err = said
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# Mistakes that only loading finds


def test_a_folder_of_unusable_images(command: Callable[..., Said], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_text("no image")
    (images / "b.png").write_bytes(b"")
    run = tmp_path / "run"
    line = one_line(command(f"data.root={images}", "data.caption=x", f"hydra.run.dir={run}"))
    assert "no usable images, at least 2 are needed" in line
    assert "a.jpg (it is not an image, despite its name), b.png (the file is empty)" in line
    assert status(run)["state"] == "failed"
    assert str(status(run)["reason"]) in line


def test_a_batch_larger_than_the_training_set(command: Callable[..., Said], tmp_path: Path) -> None:
    line = one_line(command("data.batch_size=20", f"hydra.run.dir={tmp_path}"))
    assert "data.batch_size=20 x accumulation 2 x devices 1 is more than the " in line
    assert "lower data.batch_size or data.accumulate" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lora.targets=[to_w]", "lora.targets: no UNet layer is called to_w; there are "),
        ("trainer.devices=0", "Lightning refuses these settings: `Trainer(devices=0)`"),
        ("trainer.strategy=teleport", "Lightning refuses these flags: You selected an invalid strategy"),
        ("+trainer.gradient_clip_algorithm=x", "Lightning refuses these settings: `gradient_clip_algorithm`"),
        ("+trainer.max_steps=1", "training ended before its first epoch did"),
        ("early_stopping.patience=null +trainer.max_time=00:00:00:00", "training ended before its first"),
        ("model.adapter=nowhere", "model.adapter=nowhere: no pytorch_lora_weights.safetensors there"),
        ("model.path=nowhere", "model.path=nowhere: no such folder or file, and not a hub id (OWNER/NAME)"),
    ],
)
def test_settings_that_something_refuses(
    command: Callable[..., Said], tmp_path: Path, words: str, message: str
) -> None:
    assert message in one_line(command(*words.split(), f"hydra.run.dir={tmp_path}"))


def test_a_gpu_that_is_not_there(command: Callable[..., Said], tmp_path: Path) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    line = one_line(command("trainer.accelerator=gpu", f"hydra.run.dir={tmp_path}"))
    assert "Lightning refuses these settings: No supported gpu backend found" in line
    line = one_line(command("trainer.precision=16-mixed", f"hydra.run.dir={tmp_path}"))
    assert "trainer.precision=16-mixed needs a GPU: use 32-true" in line


def test_memory_of_the_gpu(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GhibliModule, "training_step", step)
    line = one_line(command(f"hydra.run.dir={tmp_path}"))
    assert "the GPU has too little memory: lower data.batch_size" in line


# Disks


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small memory disk with these options; skips where that is not allowed."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(words, capture_output=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode != 0:
            pytest.skip("mounting is not allowed here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_in_training(
    command: Callable[..., Said], mounted: Callable[[str], Path], tmp_path: Path
) -> None:
    """The message names the file and the disk; what was written before stays whole."""
    run = mounted("size=1m") / "run"
    line = one_line(command(*CHECKPOINTS, "data.accumulate=1", f"hydra.run.dir={run}"))
    assert f"cannot write {run}/checkpoints/last.ckpt: the disk is full: free some space" in line
    assert status(run)["state"] == "failed"
    assert "No space left" in str(status(run)["reason"])
    assert not list(run.rglob("*.tmp"))
    assert (run / "split.json").exists()


def test_a_disk_that_is_read_only(command: Callable[..., Said], mounted: Callable[[str], Path]) -> None:
    run = mounted("ro") / "run"
    line = one_line(command(f"hydra.run.dir={run}"))
    assert f"cannot make the run folder {run} (Read-only file system): choose another, hydra.run.dir=" in line


class FullDisk:
    """A file that takes some bytes and no more."""

    def __init__(self, file: BinaryIO, space: int):
        self.file, self.space = file, space

    def write(self, content: bytes) -> int:
        self.space -= len(content)
        if self.space < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@pytest.mark.parametrize("space", [0, 1000, 50_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path, space: int) -> None:
    """torch.save reports a full disk as `unexpected pos`; here it is what it is."""
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"weights": torch.ones(3)}, path)
    larger = {"weights": torch.ones(90_000)}
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, lambda file: torch.save(larger, FullDisk(file, space)))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert torch.equal(torch.load(path)["weights"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


# Damaged checkpoints


def test_one_changed_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"weights": torch.arange(50.0)}, path)
    whole = path.read_bytes()
    assert is_whole(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert not is_whole(path), place
    for length in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not is_whole(path)


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    command: Callable[..., Said], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run resumes from previous.ckpt, reports it, and ends with the same bits."""
    stopped = tmp_path / "stopped"
    signal_at_step(monkeypatch, signal.SIGINT, 15)
    assert command(*CHECKPOINTS, f"hydra.run.dir={stopped}")[0] == 130
    monkeypatch.undo()
    run = RunDir(stopped)
    last, previous = (
        torch.load(file)["global_step"] for file in (run.last_checkpoint, run.previous_checkpoint)
    )
    assert (last, previous) == (8, 6)
    damaged = bytearray(run.last_checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    run.last_checkpoint.write_bytes(damaged)
    signal_at_step(monkeypatch, signal.SIGINT, 1)  # stopped again before the next epoch: nothing is lost
    code, out, err = command(f"resume={stopped}", "model=demo")
    assert (code, err) == (130, "")
    monkeypatch.undo()
    assert is_whole(run.last_checkpoint) and is_whole(run.previous_checkpoint)
    assert "last.ckpt is damaged: going on from the checkpoint before it" in out
    assert command(f"resume={stopped}")[:1] == (0,)
    assert weights(stopped) == weights(undisturbed)
    for file in (run.last_checkpoint, run.previous_checkpoint):
        file.write_bytes(b"damaged")
    assert "last.ckpt is damaged or cut off; start the run anew" in one_line(command(f"resume={stopped}"))


@pytest.mark.parametrize("name", ["latest", "RUN"])
def test_nothing_is_resumed_from_an_untrained_adapter(tmp_path: Path, name: str) -> None:
    """With no whole checkpoint both ways of naming a run are refused, and so is what comes after them."""
    run = RunDir(tmp_path / "run")
    run.status.update(started="2026-01-01")
    run.checkpoints.mkdir()
    run.last_checkpoint.write_bytes(b"damaged")
    name = name.replace("RUN", str(run.path))
    with pytest.raises(UserError, match="its config.yaml is missing"):
        run_to_resume(name, tmp_path)
    run.config.write_text("seed: 0")
    with pytest.raises(UserError, match="last.ckpt is damaged or cut off; start the run anew"):
        run_to_resume(name, tmp_path)


def test_a_resume_that_finds_no_checkpoint_stops(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="last.ckpt is damaged or cut off; start the run anew"),
        training_session(make_config(), RunDir(tmp_path), resumes=True),
    ):
        pass
    assert not list(tmp_path.iterdir())


# Loader processes


def test_a_loader_process_that_is_killed(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does it when memory runs out: one line, and the way on."""
    original = GhibliModule.training_step

    def step(module: GhibliModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if module.trainer.global_step == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return original(module, batch, batch_idx)

    monkeypatch.setattr(GhibliModule, "training_step", step)
    said = command(*CHECKPOINTS, "data.accumulate=1", "data.workers=1", f"hydra.run.dir={tmp_path}")
    assert "a loader process was killed, most likely because memory ran out" in one_line(said)
    assert f"go on with: python train.py resume={os.path.relpath(tmp_path)}" in said[1]
    assert status(tmp_path)["state"] == "failed"
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


# Ctrl-C and SIGTERM


def signal_at_step(monkeypatch: pytest.MonkeyPatch, number: int, call: int) -> None:
    """Sends this process a signal when the n-th training step begins, once."""
    original, seen = GhibliModule.training_step, 0

    def step(module: GhibliModule, batch: dict, batch_idx: int) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == call:
            os.kill(os.getpid(), number)
        return original(module, batch, batch_idx)

    monkeypatch.setattr(GhibliModule, "training_step", step)


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.slow
def test_stopped_twice_and_resumed_equals_undisturbed(
    command: Callable[..., Said], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C within an accumulation, then SIGTERM in the next epoch: saved, reported, resumed."""
    stopped = tmp_path / "stopped"
    resume = f"go on with: python train.py resume={os.path.relpath(stopped)}"

    signal_at_step(monkeypatch, signal.SIGINT, 3)  # 2 batches are one optimiser step, 5 of those an epoch
    code, out, err = command(f"hydra.run.dir={stopped}")
    assert (code, err) == (130, "")
    assert "stopping after this step; once more to stop at once" in out
    assert resume in out
    assert (status(stopped)["state"], status(stopped)["reason"]) == ("interrupted", "SIGINT")
    saved = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    monkeypatch.undo()

    signal_at_step(monkeypatch, signal.SIGTERM, 8)
    code, out, err = command(f"resume={stopped}")
    assert (code, err) == (143, "")
    assert resume in out
    assert status(stopped)["reason"] == "SIGTERM"
    assert torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    monkeypatch.undo()

    code, out, err = command(f"resume={stopped}", "model=demo", "data=demo")
    assert (code, err) == (0, "")
    assert status(stopped)["state"] == "finished"
    assert status(stopped)["step"] == 10
    assert weights(stopped) == weights(undisturbed)


@pytest.mark.slow
def test_stopped_in_the_last_step_a_run_is_finished_and_no_trial_follows(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at_step(monkeypatch, signal.SIGTERM, 10)
    words = ("trainer.max_epochs=1", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    code, out, err = command(*words, "hydra.sweep.subdir=${hydra.job.num}", "-m")
    assert (code, err) == (143, "")
    assert "stopped; this run is finished" in out
    assert status(tmp_path / "0")["state"] == "finished"
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
def test_slurm_starts_a_job_again_that_goes_on_to_the_same_end(
    command: Callable[..., Said], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 before the time is up, within an accumulation, under Lightning's own Slurm environment."""
    run, scontrol = tmp_path / "run", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    slurm = {"JOB_ID": "71", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGUSR1, 3)
        code, out, err = command(f"hydra.run.dir={run}")
    assert (code, err) == (138, "")
    assert "Slurm was asked to start this job again: the same command goes on" in out
    assert (tmp_path / "asked").read_text() == "requeue 71\n"
    assert (status(run)["state"], status(run)["reason"]) == ("interrupted", "SIGUSR1")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    code, out, err = command(f"hydra.run.dir={run}")
    assert (code, err) == (0, "")
    assert "is unfinished: resuming from step 2" in out
    assert different_parts(undisturbed, run) == []
    assert not list(run.rglob("hpc_*"))


def test_an_error_in_training_says_that_the_checkpoint_is_kept(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours keeps its traceback, and a run that had got somewhere can be resumed."""
    original = GhibliModule.training_step

    def step(module: GhibliModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if module.trainer.global_step == 3:
            raise ZeroDivisionError("a fault of ours")
        return original(module, batch, batch_idx)

    monkeypatch.setattr(GhibliModule, "training_step", step)
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        command(*CHECKPOINTS, "data.accumulate=1", f"hydra.run.dir={tmp_path}")
    assert status(tmp_path)["state"] == "failed"
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def long_run(images: Path, run: Path) -> list[str]:
    """The words of a train.py that goes on until it is stopped."""
    words = [str(REPO / "train.py"), *SMALL, f"data.root={images}", *QUICK, f"hydra.run.dir={run}"]
    return [*words, "trainer.max_epochs=1000", "early_stopping.patience=null"]


def wait_for(path: Path, is_alive: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert is_alive() and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_as_a_user_presses_it(images: Path, tmp_path: Path) -> None:
    run, done = tmp_path / "run", list[subprocess.CompletedProcess[str]]()
    words = [*long_run(images, run), "checkpoint.every_n_steps=1"]
    process = threading.Thread(target=lambda: done.append(run_python(*words, cwd=tmp_path)))
    process.start()
    wait_for(run / "checkpoints" / "last.ckpt", process.is_alive)
    os.kill(int(str(status(run)["process"])), signal.SIGINT)
    process.join(timeout=60)
    assert (done[0].returncode, done[0].stderr) == (130, "")
    assert done[0].stdout.endswith(f"stopped; go on with: python {REPO}/train.py resume=run\n")


def test_ctrl_c_before_training_begins(images: Path, tmp_path: Path) -> None:
    """While torch is imported: one word more, no traceback."""
    words = [sys.executable, *long_run(images, tmp_path / "run")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    wait_for(tmp_path / "run" / ".hydra" / "overrides.yaml", lambda: process.poll() is None)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *before, last = (out + err).strip().splitlines()
    assert last == "stopped" and before in ([], ["loading torch, diffusers and Lightning ..."])


# Other commands


def test_list_survives_damaged_status_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs" / "train"
    RunDir(runs / "good").status.update(state="finished", started="2", settings="LoRA rank 8")
    for name, content in {
        "cut": b'{"state": "fin',
        "empty": b"",
        "list": b"[1, 2]",
        "bytes": b"\xff\xfe",
    }.items():
        (runs / name).mkdir()
        (runs / name / "status.json").write_bytes(content)
    (runs / "folder" / "status.json").mkdir(parents=True)
    list_command()
    group, _, *lines = capsys.readouterr().out.splitlines()
    assert group == "base and images unknown"
    assert [line.split()[0].rsplit("/", 1)[-1] for line in lines] == [
        "bytes", "cut", "empty", "folder", "list", "good",
    ]  # fmt: skip
    assert all("unknown" in line for line in lines[:-1])
    assert "finished" in lines[-1]
