"""What may change beside resume=RUN: places whose content is compared, and nothing that would not be."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ghibli.config.files import to_yaml
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.launch import check_places
from ghibli.runs.resume import PLACES, resumed_config
from ghibli.runtime.errors import UserError


@pytest.fixture
def started(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., RunDir]:
    """A function that makes a run with these settings and the hash of every place they name."""

    def make(*settings: str) -> RunDir:
        run, config = RunDir(tmp_path / "run"), make_config(*settings)
        run.path.mkdir(exist_ok=True)
        run.config.write_text(to_yaml(config))
        hashes = {"data_hash", "base_hash"}
        hashes |= {"regularization_hash"} if config.data.regularization is not None else set()
        hashes |= {"init_hash"} if config.lora.init is not None else set()
        run.status.update(**dict.fromkeys(hashes, "a" * 64))
        return run

    return make


def resumed(run: RunDir, setting: str) -> Config:
    return resumed_config(run, SimpleNamespace(hydra=[], task=[f"resume={run.path}", setting]))


@pytest.mark.parametrize("key", PLACES)
def test_a_place_whose_hash_is_known_may_move(started: Callable[..., RunDir], key: str) -> None:
    config = resumed(started(f"{key}=/before"), f"{key}=/after")
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == "/after"


@pytest.mark.parametrize("key", ["data.regularization", "lora.init", "data.exclude"])
@pytest.mark.parametrize(("before", "after"), [("/before", "null"), ("null", "/after")])
def test_a_run_neither_loses_nor_gains_what_no_hash_would_prove(
    started: Callable[..., RunDir], key: str, before: str, after: str
) -> None:
    """Its regularisation images would be gone, and with them a column of metrics.csv."""
    run = started(f"{key}={before}")
    with pytest.raises(UserError, match=rf": {key} is {before} in this run, {after} requested; only trainer"):
        resumed(run, f"{key}={after}")


def test_a_list_that_is_gone_does_not_keep_a_run_from_going_on(
    started: Callable[..., RunDir], make_config: Callable[..., Config], images: Path, tmp_path: Path
) -> None:
    """Its split.json names what it left out, so no other list is needed, nor taken."""
    words = f"data.exclude={tmp_path}/gone.txt", f"data.root={images}"
    check_places(make_config(*words))
    with pytest.raises(UserError, match="data.exclude is .*gone.txt in this run, /other requested"):
        resumed(started(*words), "data.exclude=/other")
    with pytest.raises(UserError, match="no such .*; if it only moved, say where it is now beside resume="):
        check_places(make_config(*words, "data.regularization=/nowhere"))
