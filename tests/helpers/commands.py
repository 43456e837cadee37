"""The shrunk settings, and train.py, sweep.py as a user starts them."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
CACHE = tempfile.mkdtemp(prefix="ghibli-tests-")  # scores of the base, shared by the runs of this process
SMALL = (
    "model=demo", "data=demo", "data.batch_size=2", "data.accumulate=2", "trainer.max_epochs=2",
    "sample.num_inference_steps=2", "sample.every_n_epochs=1", "checkpoint.every_n_steps=2",
    "trainer.log_every_n_steps=1", "validation.items_per_image=2", "wandb.mode=disabled",
    f"cache_dir={CACHE}",
)  # fmt: skip


def run_python(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the words from the repository's root and returns what it printed."""
    defaults = {"cwd": REPO, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *words], **(defaults | options))


def python_sweep(*words: str) -> None:
    """`python sweep.py WORDS`, in this process."""
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
