"""The hashes that identify a run: of its settings and of the code on the training path."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import REPO
from helpers.imports import imports_of

from ghibli.config.schema import Config, DrawConfig
from ghibli.runs import identity


def test_training_packages_are_all_that_train_py_imports() -> None:
    """A package missing from TRAINING_PACKAGES could change without changing the code hash."""
    found: set[Path] = set()
    waiting = [REPO / "train.py"]
    while waiting:
        for name in imports_of(waiting.pop()):
            file = REPO.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("ghibli.") and file.exists() and file not in found:
                found.add(file)
                waiting.append(file)
    places = {file.parent.relative_to(REPO / "ghibli").as_posix() for file in found}
    packages = {
        next((code for code in identity.TRAINING_PACKAGES if f"{place}/".startswith(f"{code}/")), place)
        for place in places
    }
    assert packages == set(identity.TRAINING_PACKAGES)
    assert len(identity.TRAINING_PACKAGES) == len(packages)


def test_settings_hash_ignores_what_changes_no_result(make_config: Callable[..., Config]) -> None:
    own = identity.settings_hash(make_config())
    for words in ("wandb.project=other", "cache_dir=other", "checkpoint.every_n_steps=7", "data.workers=2"):
        assert identity.settings_hash(make_config(words)) == own
    for words in ("seed=1", "lora.rank=8", "data.root=other", "+trainer.max_steps=3", "sample.seed=1"):
        assert identity.settings_hash(make_config(words)) != own
    data = replace(make_config().data, draw=DrawConfig("drawn", 9))
    drawn = {identity.settings_hash(replace(make_config(), data=replace(data, root=root))) for root in "ab"}
    assert len(drawn) == 1 and own not in drawn


def test_the_code_hash_sees_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPO / "ghibli", tmp_path / "ghibli", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(REPO / "train.py", tmp_path)
    own = identity.code_hash()
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    assert identity.code_hash() == own
    with open(tmp_path / "ghibli" / "cli" / "main.py", "a") as file:
        file.write("# not on the training path\n")
    assert identity.code_hash() == own
    with open(tmp_path / "ghibli" / "diffusion" / "process.py", "a") as file:
        file.write("#\n")
    assert identity.code_hash() != own
