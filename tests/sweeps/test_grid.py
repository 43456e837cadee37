"""The plan of a sweep: its callback beside that of a single run, and the order of a full grid."""

import inspect
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.commands import REPO
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import read_write

from ghibli.config.files import from_yaml, to_yaml
from ghibli.runs import launch, resume
from ghibli.runs.compose import register
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.sweeps import grid

NO_PARAMS = SimpleNamespace(hydra=SimpleNamespace(sweeper={}))


def test_single_runs_and_sweeps_have_callbacks_of_their_own() -> None:
    callbacks = yaml.safe_load((REPO / "conf" / "train.yaml").read_text())["hydra"]["callbacks"]
    classes = [get_class(node["_target_"]) for node in callbacks.values()]
    assert classes == [launch.CheckRun, grid.CheckSweep]
    hooks = [
        {name for name, value in vars(kind).items() if inspect.isfunction(value) and name in dir(Callback)}
        for kind in classes
    ]
    assert hooks == [{"on_run_start"}, {"__init__", "on_multirun_start", "on_job_start", "on_job_end"}]
    assert "ghibli.sweeps" not in Path(launch.__file__).read_text()


def test_callbacks_that_old_run_folders_name_are_not_loaded(make_config, tmp_path: Path) -> None:
    """Hydra's own file in a run folder of before names a class that is gone; resume reads only the groups."""
    run = RunDir(tmp_path)
    config = make_config()
    run.config.write_text(to_yaml(config))
    (tmp_path / ".hydra").mkdir()
    callbacks = {"check_first": {"_target_": "ghibli.grids.CheckFirst"}}
    old = {"hydra": {"callbacks": callbacks, "runtime": {"choices": {"model": "demo", "data": "demo"}}}}
    (tmp_path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(old))
    assert resume.chosen_groups(run) == {"model": "demo", "data": "demo"}
    asked = SimpleNamespace(hydra=[], task=[f"resume={tmp_path}", "model=demo"])
    assert resume.resumed_config(run, asked) == from_yaml(run.config)
    with pytest.raises(UserError, match="model is demo in this run, sd15 requested"):
        resume.resumed_config(run, SimpleNamespace(hydra=[], task=[f"resume={tmp_path}", "model=sd15"]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.rank=4,8", "optimizer.lr=1e-4,1e-3", "seed=3"],
        ["lora.rank=range(2,9,3)", "lora.dropout=choice(0,0.1)", "data.caption='a, b'"],
        ["+trainer.max_time=00:00:30:00", "~wandb.name", "lora.targets=[to_q,to_k],[to_v]", "lora.init=null"],
        ["lora.rank=4,8", "seed=1", "lora.rank=16", "optimizer.lr=sort(3,1,2)"],
    ],
)
def test_a_grid_is_that_of_hydras_own_sweeper(overrides: list[str]) -> None:
    """BasicSweeper is private to Hydra: the authority here is the one of hydra-core 1.3."""
    (wanted,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    assert grid.grid_trials(NO_PARAMS, overrides) == wanted


def test_an_interval_is_no_grid() -> None:
    with pytest.raises(UserError, match=r"^optimizer\.lr=interval\(0\.1,1\): a grid needs a list or a range"):
        grid.grid_trials(NO_PARAMS, ["optimizer.lr=interval(0.1,1)"])


# Folders


def composed(*words: str) -> Any:
    """A composed command of train.py with Hydra's own settings."""
    register()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return compose("train", overrides=["data=demo", *words], return_hydra_config=True)


@pytest.fixture
def one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, where it is always the same second."""
    fixed = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr("ghibli.runs.compose.datetime", fixed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_runs_in_one_second(one_second: Path) -> None:
    """Each goes through all checks before its first step and has a folder that it can lock."""
    folders = []
    for _ in range(3):
        cfg = composed()
        launch.check_job(cfg)
        folders.append(cfg.hydra.run.dir)
    assert folders == [f"outputs/train/2026-01-02_03-04-05{more}" for more in ("", "+2", "+3")]
    assert all((one_second / folder).is_dir() for folder in folders)


def test_two_sweeps_in_one_second(one_second: Path) -> None:
    """`train.py -m`: its jobs get the new name too, and the printed command resumes this sweep."""
    for more in ("", "+2"):
        cfg = composed("hydra.mode=MULTIRUN", "hydra.sweep.dir=outputs/sweeps/now")
        with read_write(cfg.hydra):
            cfg.hydra.job.config_name, cfg.hydra.overrides.hydra = "train", []
            cfg.hydra.overrides.task = ["lora.rank=4,8"]
        with grid.hydra_on_conf():
            grid.plan_sweep(cfg)
        assert cfg.hydra.sweep.dir == f"outputs/sweeps/now{more}"
        assert list(cfg.hydra.overrides.hydra) == [f"hydra.sweep.dir=outputs/sweeps/now{more}"]
        assert grid.studies[-1].folder == Path(cfg.hydra.sweep.dir)
        grid.studies.pop().lock.close()


@pytest.mark.parametrize("name", ["study.csv", "report.html", "optuna.db", "multirun.yaml"])
def test_a_study_replaces_no_file_of_the_user(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is there already and belongs to no study: move it away"):
        grid.refuse_foreign_study(tmp_path)
    RunDir(tmp_path / "lora.rank=4").status.update(settings_hash="x")  # a study from elsewhere, copied
    grid.refuse_foreign_study(tmp_path)


def test_a_study_that_was_opened_before_is_its_own(tmp_path: Path) -> None:
    RunDir(tmp_path).lock("hydra.sweep.dir").close()
    (tmp_path / "study.csv").write_text("place,trial")
    grid.refuse_foreign_study(tmp_path)
