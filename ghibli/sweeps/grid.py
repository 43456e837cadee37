"""Plan the trials of a sweep: a grid of settings, every trial checked before the first one is trained."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf, read_write

from ghibli.config.files import to_dataclass
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.schema import Config, EvaluateConfig, SweepConfig
from ghibli.config.typed_paths import with_typed_paths
from ghibli.runs.compose import conf_folder, parse_overrides, register, to_config
from ghibli.runs.folder import RunDir
from ghibli.runs.inputs import check_inputs
from ghibli.runs.launch import claimed, reject_chdir, reject_seeds_of_trial, set_wandb_names
from ghibli.runs.lock import Lock
from ghibli.runs.monitor import in_words
from ghibli.runs.reuse import is_of_a_run
from ghibli.runtime.commands import path_setting, quoted
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.wording import number_of
from ghibli.sweeps.jobs import Stopwatch, Timed, Work, past_runs, progress, seconds_left

logger = logging.getLogger(__name__)

STUDY_FILES = (  # that sweep.py and Hydra write beside the trials
    "study.csv", "effects.csv", "study.png", "best_and_worst.png", "cells.md", "models.png", "report.html",
    "optuna.db", "multirun.yaml",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedTrial:
    """One trial of a grid."""

    name: str  # what distinguishes it from the others, as it was typed
    work: Work


@dataclass(frozen=True)
class Study:
    """A sweep that this process runs."""

    folder: Path
    settings: SweepConfig
    evaluate: EvaluateConfig  # for sweep.evaluate
    cache_dir: str  # of this command: a trial in the folder may be a stranger's
    plan: list[PlannedTrial] | None  # None with a sweeper that decides while it runs
    is_local: bool  # this process trains, not those of a launcher
    lock: Lock  # held until the process ends


studies: list[Study] = []  # the sweep of this process, once it has started


class CheckSweep(Callback):
    """Check all trials of a sweep before Hydra starts the first, so that an error leaves nothing behind."""

    def __init__(self) -> None:
        self.stopwatch: Stopwatch | None = None

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        one_line_errors(lambda: reject_resume(config.hydra.overrides.task))
        one_line_errors(lambda: plan_sweep(config))

    def on_job_start(self, config: Any, **_: Any) -> None:
        """Say which trial begins, and how long the rest takes."""
        if config.hydra.mode != RunMode.MULTIRUN or config.get("sweep", {}).get("report_only"):
            return
        plan, number = studies[-1].plan if studies else None, int(config.hydra.job.num)
        name = plan[number].name if plan else Path(config.hydra.runtime.output_dir).name
        position = progress(number, None if plan is None else [trial.work for trial in plan])
        logger.info(f"{position}: {name}" if name else position)
        self.stopwatch = None if plan is None else Stopwatch(plan[number].work)

    def on_job_end(self, config: Any, **_: Any) -> None:
        if self.stopwatch is not None:
            self.stopwatch.stop()


def plan_sweep(cfg: Any) -> None:
    """Check the trials that Hydra is about to start, and lock the study's folder.

    Raises:
        UserError: a trial that would be refused, or another process works on this study.
    """
    reject_chdir(cfg)
    if cfg.sweep.search is not None or cfg.sweep.halving or cfg.sweep.race:
        raise UserError(
            "sweep.search, sweep.halving and sweep.race work only with `python sweep.py KEY=VALUE ...`"
        )
    overrides = list(cfg.hydra.overrides.task)
    with read_write(cfg.hydra):
        cfg.hydra.sweeper.params = default_grid(cfg, overrides)
    plan, example = None, None
    if "BasicSweeper" in cfg.hydra.sweeper._target_:
        plan, example = check_trials(cfg.hydra.job.config_name, grid_trials(cfg, overrides))
    chosen = any(word.startswith("hydra.sweep.dir=") for word in cfg.hydra.overrides.hydra)
    is_dated = cfg.hydra.job.config_name == "train" and not chosen  # named after the time
    if is_dated:
        name_anew(cfg)
    study = open_study(cfg, plan)
    if plan is not None and example is not None and not cfg.sweep.report_only:
        for line in announcement(cfg, overrides, plan, past_runs(example)):
            logger.info(line)
    if is_dated:
        again = quoted(path_setting("hydra.sweep.dir", study.folder))
        logger.info(f"to resume these trials: the same command with {again}")


def announcement(cfg: Any, overrides: list[str], plan: list[PlannedTrial], past: list[Timed]) -> list[str]:
    """Say how many trials begin, where their values come from, about how long they take, and what else to do.

    Args:
        past: finished runs of this base and images, to estimate the time from.
    """
    given = default_grid(cfg, overrides)
    epochs = sum(trial.work.epochs for trial in plan)
    of = f" of grid={cfg.hydra.runtime.choices.grid}, over {', '.join(given)}" if given else ""
    time = time_in_all([trial.work for trial in plan], past)
    return [
        f"{number_of(len(plan), 'trial')}{of}: {number_of(epochs, 'epoch')} in all; {time}",
        "to train others, sweep something yourself, such as lora.rank=4,8; Ctrl-C stops, the same command "
        "goes on",
    ]


def time_in_all(works: list[Work], past: list[Timed]) -> str:
    """Say about how long trials take, from finished runs of this base and images."""
    left = seconds_left(works, past)
    if left is None:
        return "the first one will tell how long they take"
    return f"about {in_words(left)} at the pace of your last runs of this base and images"


def name_anew(cfg: Any) -> None:
    """Make the dated folder of a sweep, under another name if it is taken, for all its jobs."""
    folder = str(claimed(Path(cfg.hydra.sweep.dir)))
    with read_write(cfg.hydra):
        cfg.hydra.sweep.dir = folder
        cfg.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")


def open_study(cfg: Any, plan: list[PlannedTrial] | None) -> Study:
    """Lock the study's folder for this process and forget which trials failed last time.

    Args:
        plan: its trials; None where they are chosen while the study runs.

    Raises:
        UserError: another process works on this study, or the folder holds files that are not a study's.
    """
    folder = Path(cfg.hydra.sweep.dir)
    refuse_foreign_study(folder)
    settings = to_dataclass(OmegaConf.to_container(cfg.sweep, resolve=True), SweepConfig)
    evaluate = to_dataclass(OmegaConf.to_container(cfg.evaluate, resolve=True), EvaluateConfig)
    lock = RunDir(folder).lock(key="hydra.sweep.dir")
    is_local = "BasicLauncher" in cfg.hydra.launcher._target_
    studies.append(Study(folder, settings, evaluate, str(cfg.cache_dir), plan, is_local, lock))
    for note in failure_notes(folder):
        note.unlink()
    return studies[-1]


def refuse_foreign_study(folder: Path) -> None:
    """Check that a study would replace no file that another program or the user made.

    Raises:
        UserError: the folder has a file that a study writes, and neither a study's lock nor a run.
    """
    if (folder / ".lock").exists() or any(is_of_a_run(RunDir(path)) for path in folder.glob("*/")):
        return
    foreign = next((folder / name for name in STUDY_FILES if (folder / name).exists()), None)
    if foreign is not None:
        raise UserError(
            f"{foreign} is there already and belongs to no study: move it away, or choose another folder "
            "with hydra.sweep.dir=DIR"
        )


def failure_notes(folder: Path) -> list[Path]:
    """Return the notes left by trials that failed since the study was opened, in whichever process."""
    return list(folder.glob("*/no_result.txt"))


def default_grid(cfg: Any, overrides: list[str]) -> dict[str, Any]:
    """Return the grid of conf/grid; empty where the command line sweeps something itself."""
    if any(override.is_sweep_override() for override in parse_overrides(overrides)):
        return {}
    return OmegaConf.to_container(cfg.hydra.sweeper, resolve=True).get("params") or {}


def grid_trials(cfg: Any, overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every trial of a full grid, in the order of Hydra's BasicSweeper.

    Raises:
        UserError: a sweep whose values cannot be listed.
    """
    params = [f"{key}={value}" for key, value in default_grid(cfg, overrides).items()]
    choices: dict[str, list[str]] = {}  # key -> its overrides; the last one given for a key counts
    with hydra_errors():
        for override in parse_overrides([*params, *overrides]):
            key = override.get_key_element()
            choices[key] = [f"{key}={value}" for value in listed_values(override)]
    return [list(trial) for trial in itertools.product(*choices.values())]


def listed_values(override: Override) -> list[str]:
    """Return all values of an override, as they are typed: one, or several of a sweep.

    Raises:
        UserError: an interval, which has no list of values.
    """
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: a grid needs a list or a range of values; "
            "an interval is for sweep.search=N"
        )
    return list(override.sweep_string_iterator())


def check_trials(config_name: str, trials: list[list[str]]) -> tuple[list[PlannedTrial], Config]:
    """Check every trial of a sweep before the first one starts; return them, and the settings of the first.

    Raises:
        UserError: a trial that would be refused, or that has the same folder as another one; the
            message names it by what it sweeps.
    """
    common = set(trials[0]).intersection(*trials)
    names: dict[str, str] = {}  # folder -> the trial that has it
    plan, configs = [], []
    for overrides in trials:
        own = ", ".join(word for word in overrides if word not in common)
        try:
            with hydra_errors():
                cfg = compose_trial(config_name, overrides)
                config = to_config(cfg)
                check_inputs(config)
                reject_seeds_of_trial(config)
                first = names.setdefault(cfg.hydra.sweep.subdir, own)
        except UserError as error:
            raise UserError(f"trial {own}: {error}" if own else str(error)) from None
        if first != own:
            raise UserError(
                f"trial {own} would have the folder of trial {first}, because folder names leave out what "
                "differs between them: sweep other keys, or give each a study of its own with "
                "hydra.sweep.dir=DIR"
            )
        plan.append(PlannedTrial(own, Work.of(config)))
        configs.append(config)
    return plan, configs[0]


def compose_trial(config_name: str, overrides: list[str]) -> Any:
    """Compose conf/CONFIG_NAME.yaml with these overrides and Hydra's own settings, as each job does."""
    return GlobalHydra.instance().config_loader().load_configuration(config_name, overrides, RunMode.RUN)


def reject_resume(overrides: list[str]) -> None:
    """Raise a UserError for `-m resume=...`."""
    if any(text.startswith("resume=") for text in overrides):
        raise UserError("resume continues one run at a time: drop -m")


@contextmanager
def hydra_on_conf() -> Iterator[None]:
    """Point Hydra to conf/ where it does not run the command itself."""
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"), hydra_errors():
        yield


@dataclass(frozen=True)
class StudyRequest:
    """A study that sweep.py runs without Hydra's sweeper: sweep.search, halving, race or report_only."""

    cfg: Any  # the composed settings without the sweeps
    fixed: list[str]  # overrides that all trials share
    free: list[Override]  # the sweeps: a list, a range or an interval each

    @property
    def settings(self) -> SweepConfig:
        return to_dataclass(OmegaConf.to_container(self.cfg.sweep, resolve=True), SweepConfig)


def parse_study_request(overrides: list[str]) -> StudyRequest | None:
    """Read `sweep.py WORDS` as a search, halving or report_only; None for a plain grid, which is Hydra's.

    Raises:
        UserError: an unknown key or group, or a launcher, which these do not use.
    """
    overrides = [word for word in overrides if word not in ("-m", "--multirun")]  # sweep.py always is one
    overrides = with_typed_paths(overrides, sweeps=True)
    if any(word.startswith("-") for word in overrides):
        return None  # --help and its like are Hydra's
    with hydra_on_conf():
        parsed = parse_overrides(overrides)
        given = {o.key_or_group: o for o in parsed}.values()  # the last one given for a key counts
        fixed = [o.input_line for o in given if not o.is_sweep_override()]
        cfg = compose_trial("sweep", fixed)
        if cfg.sweep.search is None and not (cfg.sweep.halving or cfg.sweep.race or cfg.sweep.report_only):
            return None
        reject_chdir(cfg)
        reject_resume(overrides)
        if "BasicLauncher" not in cfg.hydra.launcher._target_ and not cfg.sweep.report_only:
            raise UserError(
                "sweep.search, sweep.halving and sweep.race train one trial after the other: "
                "drop hydra/launcher"
            )
        params = parse_overrides([f"{key}={value}" for key, value in default_grid(cfg, overrides).items()])
        return StudyRequest(cfg, fixed, [o for o in (*params, *given) if o.is_sweep_override()])


def settings_and_folder(overrides: list[str]) -> tuple[Config, RunDir]:
    """Return the checked settings of one trial of `sweep.py`, and its folder.

    Raises:
        UserError: settings that are not accepted.
    """
    with hydra_on_conf():
        cfg = compose_trial("sweep", overrides)
        config, folder = to_config(cfg), Path(cfg.hydra.sweep.dir)
        check_inputs(config)
        run = RunDir(folder / cfg.hydra.sweep.subdir)
        set_wandb_names(config, run, folder)
        return config, run
