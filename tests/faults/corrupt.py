"""Random bytes of a half-done or finished run's files damaged, one at a time, then the run is resumed.

Each damage has to be detected (one line, or put right) or harmless (the same end, bit for bit).
All in one process, each time through the whole of `train.py resume=RUN`.
"""

import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .compare import different_parts
from .runs import ENVIRONMENT, REPO, TINY

SETTINGS = (*TINY, "data.draw.count=16", "data.batch_size=2", "data.accumulate=2", "trainer.max_epochs=2",
            "sample.every_n_epochs=1", "checkpoint.every_n_steps=2")  # fmt: skip
KILLED_AT = 10  # forward passes; an epoch has 6 in 3 optimiser steps, so the second one is under way
FILES = (  # what a resumed run finds, as patterns below the scratch folder
    "run/checkpoints/last.ckpt", "run/checkpoints/previous.ckpt", "run/checkpoints/best.ckpt",
    "run/config.yaml", "run/status.json", "run/split.json", "run/metrics.csv", "run/probe.csv",
    "run/.hydra/hydra.yaml", "cache/base_scores/*.json", "cache/scenes-*/captions.txt",
    "cache/scenes-*/checksums.txt", "cache/scenes-*/images/*.png", "cache/latents/*.pt",
    "cache/base_grids/*.pt", "run/adapter/*.safetensors",
)  # fmt: skip
HARMLESS, RIGHTED, REFUSED, BROKEN = "harmless", "put right, and said so", "refused in one line", "BROKEN"


def flip(content: bytes, draws: random.Random) -> bytes:
    """One bit."""
    place = draws.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draws.randrange(8)]) + content[place + 1 :]


def change(content: bytes, draws: random.Random) -> bytes:
    """One byte, to any other."""
    place = draws.randrange(len(content))
    other = bytes([(content[place] + draws.randrange(1, 256)) % 256])
    return content[:place] + other + content[place + 1 :]


def zero(content: bytes, draws: random.Random) -> bytes:
    """A stretch of zeros, as a file system leaves it after a power cut."""
    place = draws.randrange(len(content))
    length = min(draws.choice((1, 16, 512, 4096)), len(content) - place)
    return content[:place] + bytes(length) + content[place + length :]


def cut(content: bytes, draws: random.Random) -> bytes:
    return content[: draws.randrange(len(content))]


def append(content: bytes, draws: random.Random) -> bytes:
    return content + draws.randbytes(draws.randrange(1, 100))


def delete(content: bytes, draws: random.Random) -> None:
    return None


DAMAGES = (flip, flip, change, zero, cut, append, delete)


class Corrupter:
    """A half-done and a finished run with its cache; each damage is done to a fresh copy in one place."""

    def __init__(self, scratch: Path):
        self.scratch, self.half, self.finished = scratch, scratch / "half", scratch / "finished"
        self.run, self.cache, self.done = scratch / "run", scratch / "cache", scratch / "finished" / "run"

    def prepare(self) -> None:
        """Kills a run in its second epoch, keeps that, and resumes it to the undisturbed end."""
        killed = [
            sys.executable,
            str(REPO / "tests" / "helpers" / "killed.py"),
            "training_step",
            str(KILLED_AT),
        ]
        words = [*SETTINGS, f"cache_dir={self.cache}", f"hydra.run.dir={self.run}"]
        environment = os.environ | ENVIRONMENT
        done = subprocess.run([*killed, *words], cwd=REPO, env=environment, capture_output=True, text=True)
        if done.returncode != -9:
            raise RuntimeError(done.stderr)
        self.keep(self.half)
        code, said, error = in_process(f"resume={self.run}", f"cache_dir={self.cache}")
        if code != 0:
            raise RuntimeError(said + error)
        self.keep(self.finished)

    def keep(self, state: Path) -> None:
        for part in (self.run, self.cache):
            shutil.copytree(part, state / part.name)

    def put_back(self, state: Path) -> None:
        for part in (self.run, self.cache):
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(state / part.name, part)

    def damage(self, pattern: str, draws: random.Random, state: Path) -> dict[str, str]:
        """One random damage to a file of this pattern, and what the resumed run made of it.

        Of a file that only a finished run has, that of the finished run is damaged.
        """
        self.put_back(state)
        if not any(self.scratch.glob(pattern)):
            self.put_back(self.finished)
        file = draws.choice(sorted(self.scratch.glob(pattern)))
        kind = draws.choice(DAMAGES)
        before = file.read_bytes()
        after = kind(before, draws)
        if after is None:
            file.unlink()
        else:
            file.write_bytes(after)
        outcome, detail = self.outcome()
        return {"file": pattern, "kind": kind.__name__, "outcome": outcome, "detail": detail}

    def outcome(self) -> tuple[str, str]:
        """Resumes the damaged run: what became of it, and the line or the differences."""
        from ghibli.runs import listing
        from ghibli.runs.folder import RunDir

        try:
            _ = [row.cells for row in listing.listed([RunDir(self.run)])]  # a line of `ghibli list`
            code, said, error = in_process(f"resume={self.run}", f"cache_dir={self.cache}")
        except Exception:
            return BROKEN, traceback.format_exc()[-1500:]
        if code == 2 and error.startswith("error: ") and error.count("\n") == 1:
            return REFUSED, self.short(error)
        if code != 0 or error:
            return BROKEN, f"exit code {code}: {error[-1500:]}"
        different = different_parts(self.done, self.run)
        if different:
            return BROKEN, f"another result: {', '.join(different)[:500]}"
        lines = [line for line in said.splitlines() if "damaged" in line]
        return (RIGHTED, self.short(lines[0])) if lines else (HARMLESS, "")

    def short(self, line: str) -> str:
        return line.strip().replace(f"{self.scratch}/", "")


def in_process(*words: str) -> tuple[int, str, str]:
    """`python train.py WORDS...` in this process: (exit code, stdout, stderr)."""
    import train
    from ghibli.runs import launch

    out, err, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = ["train.py", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            launch.hydra_entry(REPO / "conf", "train", train.main)
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def corrupt_files(
    count: int, seed: int, scratch: Path, say: Callable[[str], None] = print
) -> dict[str, object]:
    """`count` damages and what became of them, as the table wants it."""
    corrupter = Corrupter(scratch)
    corrupter.prepare()
    began, found = time.monotonic(), []
    for number in range(count):
        draws = random.Random(f"{seed} {number}")
        state = corrupter.half if number // len(FILES) % 3 < 2 else corrupter.finished
        one = corrupter.damage(FILES[number % len(FILES)], draws, state)
        found.append(one)
        left = (time.monotonic() - began) / len(found) * (count - len(found)) / 60
        what = f"{one['kind']} {one['file']}: {one['outcome']} {one['detail']}".strip()
        say(f"{len(found)} of {count}, {left:.0f} min left: {what}")
    broken = [one for one in found if one["outcome"] == BROKEN]
    say(f"{count - len(broken)} of {count} detected or harmless")
    by_file = {
        pattern: dict(Counter(one["outcome"] for one in found if one["file"] == pattern)) for pattern in FILES
    }
    return {"damages": count, "sound": count - len(broken), "seed": seed, "files": by_file, "broken": broken}
