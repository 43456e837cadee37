"""A run of a few steps and its export, for all tests that only read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import GRIDS, QUICK

import train
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.inference import export
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config


@pytest.fixture(scope="session")
def run(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of a few steps."""
    found = RunDir(tmp_path_factory.mktemp("exported") / "run")
    grid = (*GRIDS, "sample.prompts=[a lake]", "sample.samplers=[ddim]", "sample.guidance=[1]")
    train.run(make_config(*QUICK, *grid), found)
    return found


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The settings of a run on 8 images, 2 of them held out."""
    root = tmp_path_factory.mktemp("few")
    write_folder(root, "drawn", 8, FINETUNE_SEEDS.start)
    return (f"data.root={root}", "data.val_fraction=0.25")


@pytest.fixture(scope="session")
def exported(run: RunDir) -> tuple[Path, list[export.Check]]:
    folder = run.path / "export"
    return folder, export.export(run, finished_config(run), folder, merge=True)
