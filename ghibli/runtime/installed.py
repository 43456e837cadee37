"""End a script that was started by a Python without this project's packages, in one line: on import.

train.py and sweep.py import it first; it imports nothing but the standard library.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = "hydra"  # where it is, make has installed all
VENV = Path(__file__).resolve().parents[2] / ".venv"


def advice(venv: Path) -> str:
    """Say what to type, by whether make has installed the packages into this folder."""
    if (venv / "installed").exists():
        return f"type `source {venv / 'bin' / 'activate'}` once in this shell"
    return "type `make train` once, which installs them, then `source .venv/bin/activate`"


if find_spec(NEEDED) is None:
    sys.stderr.write(f"error: {sys.executable} has no package {NEEDED}: {advice(VENV)}\n")
    sys.exit(2)
