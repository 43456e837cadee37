"""The tests marked `fuzz`, each in a process of its own: 10,000 random inputs to what reads a file."""

import os
import re
import subprocess
import sys
from typing import Any

from . import table
from .runs import REPO

INPUTS = 10_000
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "fuzz"]


def fuzz_all(only: str = "") -> dict[str, Any]:
    """Runs those whose names hold `only`; returns what each read, whether it passed, and how long it took."""
    return {"inputs": INPUTS, "tests": [run_one(name) for name in names() if only in name]}


def names() -> list[str]:
    """Their names, as pytest takes them."""
    words = [*PYTEST, "--collect-only", "tests/security"]
    listed = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "::" in line]


def run_one(name: str) -> dict[str, Any]:
    """Runs one test; what is `damaged files of a run, status.json`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [*PYTEST, "--durations=0", name]
    said = subprocess.run(words, cwd=REPO, capture_output=True, text=True, env=environment).stdout
    print(f"{name}: {said.splitlines()[-1]}", flush=True)
    return outcome(name, said) | {"made": table.made()}


def outcome(name: str, said: str) -> dict[str, Any]:
    """What came of a test, from what pytest printed."""
    words, _, which = name.rpartition("::test_")[2].partition("[")
    which = which.removesuffix("]").removesuffix(f"-{INPUTS}").removesuffix(str(INPUTS))
    seconds = re.search(r"([\d.]+)s call", said)
    return {
        "what": words.replace("_", " ") + (f", {which}" if which else ""),
        "passed": re.search(r"^1 passed", said, re.MULTILINE) is not None,
        "seconds": round(float(seconds[1])) if seconds else None,
    }
