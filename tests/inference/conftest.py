"""A run of a few steps and its export, for all tests that only read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import QUICK

import train
from ghibli.inference import export
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config


@pytest.fixture(scope="session")
def run(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of a few steps."""
    found = RunDir(tmp_path_factory.mktemp("exported") / "run")
    train.run(make_config(*QUICK), found)
    return found


@pytest.fixture(scope="session")
def exported(run: RunDir) -> tuple[Path, list[export.Check]]:
    folder = run.path / "export"
    return folder, export.export(run, finished_config(run), folder, merge=True)
