"""`python train.py seeds=2`: each training is that of its seed alone, and a killed one goes on."""

import re
import shutil
from pathlib import Path

import pytest
from faults.compare import different_parts
from helpers.commands import CHECKPOINTS, REPO, SMALL, run_python
from helpers.report_material import page_of

from ghibli.evaluation.gain import gain_over_seeds
from ghibli.evaluation.scores import best_probe
from ghibli.runs.folder import RunDir

pytestmark = pytest.mark.slow

STEPS = 20  # batches of one training: 2 epochs of 5 optimiser steps of 2


def overrides(images: Path, folder: Path, *more: str) -> list[str]:
    return [*SMALL, *CHECKPOINTS, f"data.root={images}", "data.draw=null", f"hydra.run.dir={folder}", *more]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two separate runs, with seeds 0 and 1."""
    folders = [tmp_path_factory.mktemp("alone") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        done = run_python(str(REPO / "train.py"), *overrides(images, folder, f"seed={seed}"))
        assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture(scope="module")
def killed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both trainings of `seeds=2`, killed in the second one."""
    place = tmp_path_factory.mktemp("killed")
    folder, member = place / "run", place / "run+seed=1"
    words = overrides(images, folder, "seeds=2")
    done = run_python(str(REPO / "tests" / "helpers" / "killed.py"), "training_step", str(STEPS + 7), *words)
    assert done.returncode == -9, done.stderr
    assert (folder / "adapter").exists() and member.exists() and not (member / "adapter").exists()
    return place


@pytest.mark.parametrize("again", ["command", "first", "member"])
def test_killed_in_the_second_training_it_goes_on_to_the_same_result(
    alone: list[Path], killed: Path, images: Path, tmp_path: Path, again: str
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    folder, member = tmp_path / "run", tmp_path / "run+seed=1"
    words = overrides(images, folder, "seeds=2")
    words = {"command": words, "first": [f"resume={folder}"], "member": [f"resume={member}"]}[again]
    done = run_python(str(REPO / "train.py"), *words)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip((folder, member), alone, strict=True):
        assert not different_parts(theirs, ours)
    probes = [best_probe(RunDir(one)) for one in alone]
    stacked = [probe.val for probe in probes]
    mean = gain_over_seeds(pytest.importorskip("torch").stack(stacked), probes[0].base_val)
    assert f"mean {mean.signed_size}" in done.stdout
    command = re.search(r"^next .* report (.+)$", done.stdout.splitlines()[-1])
    assert command is not None and str(member.name) in command[1]
    assert (
        f"Over 2 seeds (0, 1) the mean gain is {mean.signed_size}".replace("+-", "\u00b1")
        in page_of(folder, member, out=tmp_path / "report.html").text
    )


def test_more_seeds_train_only_those(alone: list[Path], images: Path, tmp_path: Path) -> None:
    words = overrides(images, tmp_path / "run", "trainer.max_epochs=1")
    assert run_python(str(REPO / "train.py"), *words, "seeds=2").returncode == 0
    done = run_python(str(REPO / "train.py"), *words, "seeds=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished: its objective was") == 2 and "seeds    0: " in done.stdout
    assert re.search(r"^seeds    0: .+, 1: .+, 2: .+$", done.stdout, re.MULTILINE)
