"""Runs that repeat another one with other seeds: their folders, and which trainings belong together."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from ghibli.config.files import to_yaml
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.identity import settings_hash
from ghibli.runs.launch import reject_seeds_of_trial, reject_seeds_outside
from ghibli.runs.repeats import (
    first_of,
    planned_seeds,
    refuse_change_of_one,
    repeated_config,
    repetition,
    shares_settings_with,
)
from ghibli.runtime.errors import UserError
from ghibli.sweeps.grid import check_trials, hydra_on_conf


@pytest.fixture
def first(make_config: Callable[..., Config], tmp_path: Path) -> tuple[RunDir, Config]:
    run, config = RunDir(tmp_path / "panda"), make_config("seed=5", "seeds=3")
    run.path.mkdir()
    run.config.write_text(to_yaml(config))
    return run, config


def test_all_trainings_of_a_set_know_it(first: tuple[RunDir, Config]) -> None:
    run, config = first
    assert planned_seeds(run, config) == (run, [5, 6, 7])
    second = repetition(run, 6)
    assert second.path.name == "panda+seed=6"
    own = repeated_config(run, 6, config.cache_dir)
    second.path.mkdir()
    second.config.write_text(to_yaml(own))
    assert first_of(second).path == run.path and first_of(run) is run
    found, seeds = planned_seeds(second, own)
    assert found.path == run.path and seeds == [5, 6, 7]
    assert (own.seed, own.seeds, own.wandb.name) == (6, 1, "panda+seed=6")


def test_a_repetition_is_the_run_with_that_seed(
    make_config: Callable[..., Config], first: tuple[RunDir, Config]
) -> None:
    run, config = first
    assert settings_hash(repeated_config(run, 6, config.cache_dir)) == settings_hash(make_config("seed=6"))
    assert settings_hash(config) == settings_hash(make_config("seed=5"))


def test_one_of_several_is_resumed_as_it_is(
    make_config: Callable[..., Config], first: tuple[RunDir, Config]
) -> None:
    """More epochs for one alone would make the mean one of unequal trainings; the first one takes them."""
    run, config = first
    second, other = repetition(run, 6), repetition(run, 9)  # a study's sweep.repeats might make the other
    own = repeated_config(run, 6, config.cache_dir)
    longer, elsewhere = deepcopy(own), deepcopy(own)
    longer.trainer["max_epochs"] += 1
    elsewhere.cache_dir = "elsewhere"
    with pytest.raises(UserError) as raised:
        refuse_change_of_one(second, own, longer)
    assert "one of 3 trainings that share all settings but the seed" in str(raised.value)
    assert f"give trainer.max_epochs beside resume={run.path}, for all" in str(raised.value)
    for same in (own, elsewhere):
        refuse_change_of_one(second, own, same)
    refuse_change_of_one(run, config, longer)
    alone = make_config("seed=9")
    refuse_change_of_one(other, alone, replace(alone, threads=1))
    assert [shares_settings_with(*one) for one in ((second, own), (run, config), (other, alone))] == [
        run,
        run,
        other,
    ]


def test_a_run_alone_has_its_own_seed(make_config: Callable[..., Config], tmp_path: Path) -> None:
    for name in ("panda", "panda+seed=3", "lr=1+seed=3"):  # without the run that it would repeat
        run, config = RunDir(tmp_path / name), make_config("seed=3")
        assert planned_seeds(run, config) == (run, [3])
    (tmp_path / "panda").mkdir()
    (tmp_path / "panda" / "config.yaml").write_text("damaged")
    assert planned_seeds(RunDir(tmp_path / "panda+seed=3"), config)[1] == [3]


def test_a_sweep_and_several_processes_refuse_seeds(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("seeds=3")
    with pytest.raises(UserError, match=r"in a sweep use sweep\.repeats=2"):
        reject_seeds_of_trial(config)
    with hydra_on_conf(), pytest.raises(UserError, match=r"trial lora.rank=4: seeds=3 repeats a single run"):
        check_trials("sweep", [["seeds=3", "lora.rank=4"], ["seeds=3", "lora.rank=8"]])
    reject_seeds_outside(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("GHIBLI_JOINS", raising=False)
    with pytest.raises(UserError, match="start one command for each seed"):
        reject_seeds_outside(config)
    for plain in (reject_seeds_of_trial, reject_seeds_outside):
        plain(make_config())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("seeds=0",), "seeds=0 is out of range: a whole number from 1 to 100"),
        (("seeds=101",), "seeds=101 is out of range"),
        (("seeds=2", "seed=4294967295"), "with seed=4294967295 the last is"),
        (("seeds=2", "finetune=none"), "seeds=2 with finetune=none: nothing is trained"),
    ],
)
def test_what_seeds_cannot_be(make_config: Callable[..., Config], words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as raised:
        make_config(*words)
    assert said in str(raised.value)
