"""Compare the memory that `ghibli check` predicts on a CPU with train.py's: memory.py [KEY=VALUE ...]

Without settings, the demo at three sizes. One row a size, each measured in processes of its own.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder

REPO = Path(__file__).resolve().parents[1]
IMAGES = 80
DEMO = ("model=demo", "data=ghibli", "threads=1", "data.val_fraction=0.03", "trainer.max_epochs=1")
SIZES = (
    "model.resolution=64 data.batch_size=1 data.accumulate=1",
    "model.resolution=128 data.batch_size=18 data.accumulate=1",
    "model.resolution=128 data.batch_size=72 data.accumulate=1",
)


class Row(NamedTuple):
    """Bytes of a run's process at its peak."""

    predicted: float
    measured: float

    def __str__(self) -> str:
        ratio = self.predicted / self.measured
        return f"{self.predicted / 2**20:.0f} | {self.measured / 2**20:.0f} | {100 * (ratio - 1):+.0f} %"


def compare(words: list[str]) -> Row:
    """Predict and measure the peak of one run on a CPU."""
    return Row(predicted(words), measured(words))


def predicted(words: list[str]) -> float:
    """Return the bytes that `ghibli check WORDS` says the run's process takes at its peak."""
    done = subprocess.run(
        [sys.executable, "-m", "ghibli", "check", *words], cwd=REPO, capture_output=True, text=True
    )
    found = re.search(r"its process ([\d.]+) GiB at its peak", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"ghibli check {shlex.join(words)}:\n{done.stdout}{done.stderr}")
    return float(found[1]) * 2**30


def measured(words: list[str]) -> float:
    """Return the largest resident memory of `train.py WORDS` in bytes, as the kernel counts it.

    It counts what this process held as it started that one, too, so this one must be small.
    """
    with tempfile.TemporaryDirectory() as out, open(Path(out) / "log", "wb") as log:
        command = [sys.executable, "train.py", *words, f"hydra.run.dir={out}/run", "wandb.mode=disabled"]
        process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{shlex.join(command)}:\n{Path(log.name).read_text()[-2000:]}")
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of one run, as for train.py")
    words = parser.parse_args().words
    print("| settings | predicted, MiB | measured, MiB | |\n|---|---|---|---|")
    if words:
        print(f"| `{shlex.join(words)}` | {compare(words)} |")
        return
    with tempfile.TemporaryDirectory() as root:
        write_folder(Path(root), "drawn", IMAGES, FINETUNE_SEEDS.start)
        for size in SIZES:
            row = compare([*DEMO, f"data.root={root}", f"cache_dir={root}/cache", *size.split()])
            print(f"| `{size}` | {row} |", flush=True)


if __name__ == "__main__":
    main()
