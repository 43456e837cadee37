"""The shrunk settings, and train.py, sweep.py as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
CACHE = tempfile.mkdtemp(prefix="ghibli-tests-")  # scores of the base, shared by the runs of this process
SMALL = (
    "model=demo", "data=demo", "model.resolution=64", "data.batch_size=2", "data.accumulate=2",
    "trainer.max_epochs=2", "sample.num_inference_steps=2", "sample.every_n_epochs=0",
    "trainer.log_every_n_steps=1", "validation.items_per_image=2", "validation.price_images=0",
    "wandb.mode=disabled", f"cache_dir={CACHE}",
)  # fmt: skip
GRIDS = ("sample.every_n_epochs=1",)  # which SMALL leaves out
CHECKPOINTS = ("checkpoint.every_n_steps=2",)  # SMALL has those of the epochs only
QUICK = ("trainer.max_epochs=1", "optimizer.lr=5e-3", "lora.rank=4", "lora.alpha=6")  # large steps


def run_python(*words: str, warm: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the words from the repository's root and returns what it printed.

    A script of ours in the usual environment starts as a fork of a Python that has imported torch.

    Args:
        warm: so do other words, such as -c CODE; not where a test is about what is imported.
        options: of subprocess.run; with `warm` only cwd, timeout and env.
    """
    if warm or (words[0].endswith(".py") and options.keys() <= {"cwd", "timeout"}):
        return run_warm(words, **options)
    defaults = {"cwd": REPO, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *words], **(defaults | options))


def run_warm(
    words: tuple[str, ...], cwd: Path = REPO, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python's words in a fork of `warm_python`, as subprocess.run would.

    Args:
        env: of the child; what the imported libraries have read of it before stays.
    """
    python = warm_python()
    overdue = threading.Event()

    def stop(pid: int) -> None:
        overdue.set()
        os.kill(pid, signal.SIGKILL)

    with tempfile.TemporaryDirectory() as folder:
        streams = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        python.stdin.write(json.dumps({"words": words, "cwd": str(cwd), "env": env} | streams) + "\n")
        python.stdin.flush()
        timer = threading.Timer(timeout, stop, [int(python.stdout.readline())])
        timer.start()
        code = int(python.stdout.readline())
        timer.cancel()
        printed = {name: Path(place).read_text() for name, place in streams.items()}
    if overdue.is_set():
        raise subprocess.TimeoutExpired(words, timeout, printed["stdout"], printed["stderr"])
    return subprocess.CompletedProcess([sys.executable, *words], code, **printed)


@cache
def warm_python() -> subprocess.Popen[str]:
    """Starts tests/helpers/warm_python.py once; it ends with this process, whose pipe it reads."""
    pipe = subprocess.PIPE
    script = str(REPO / "tests" / "helpers" / "warm_python.py")
    return subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True)


def python_sweep(*words: str) -> None:
    """`python sweep.py WORDS`, in this process; the best are repeated only where the words ask for it."""
    if not any(word.startswith("sweep.repeats=") for word in words):
        words = (*words, "sweep.repeats=0")
    import sweep  # loads torch, which must not be loaded before conftest has set OMP_NUM_THREADS
    from ghibli.sweeps import grid

    for done in grid.studies:
        done.lock.close()
    grid.studies.clear()
    sweep.failures.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sweep.py", *words])
        patch.chdir(REPO)
        sweep.main()
