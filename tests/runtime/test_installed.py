"""A Python without the packages ends in one line that says what to type."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO

from ghibli.runtime.installed import advice


@pytest.mark.parametrize("script", ["train.py", "sweep.py"])
def test_a_python_without_the_packages(script: str, tmp_path: Path) -> None:
    words = [sys.executable, "-S", str(REPO / script)]  # -S: without the packages of .venv
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no package hydra: type `")
    assert done.stderr.count("\n") == 1


def test_what_to_type_depends_on_what_is_installed(tmp_path: Path) -> None:
    assert advice(tmp_path) == "type `make train` once, which installs them, then `source .venv/bin/activate`"
    (tmp_path / "installed").touch()
    assert advice(tmp_path) == f"type `source {tmp_path}/bin/activate` once in this shell"
