"""The trials of a sweep: a grid of settings, every one checked before the first is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf, read_write

from ghibli.config.files import to_dataclass
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.paths import check_paths
from ghibli.config.schema import Config, EvaluateConfig, SweepConfig
from ghibli.runs.compose import conf_folder, parse_overrides, register, to_config
from ghibli.runs.folder import RunDir
from ghibli.runs.launch import check_job, set_wandb_names
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, one_line_errors


@dataclass(frozen=True)
class Study:
    """A sweep that this process runs."""

    folder: Path
    settings: SweepConfig
    evaluate: EvaluateConfig  # of sweep.evaluate
    trials: int | None  # how many; None with a sweeper that decides as it goes
    lock: BinaryIO  # held as long as the process lives


studies: list[Study] = []  # the sweep of this process, once it has begun


class CheckFirst(Callback):
    """Hydra calls this before it makes the run folder, so that a mistake leaves nothing behind."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        one_line_errors(lambda: check_job(config))

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        one_line_errors(lambda: reject_resume(config.hydra.overrides.task))
        one_line_errors(lambda: self.plan(config))

    def plan(self, cfg: Any) -> None:
        """Checks all trials, and takes the study's folder for this process alone."""
        if cfg.sweep.search is not None or cfg.sweep.halving:
            raise UserError("sweep.search and sweep.halving are for `python sweep.py KEY=VALUE ...` alone")
        words = list(cfg.hydra.overrides.task)
        with read_write(cfg.hydra):
            cfg.hydra.sweeper.params = params_of(cfg, words)
        trials = None
        if "BasicSweeper" in cfg.hydra.sweeper._target_:
            trials = grid(cfg, words)
            check_trials(cfg.hydra.job.config_name, trials)
        folder = begin(cfg, None if trials is None else len(trials)).folder
        chosen = any(word.startswith("hydra.sweep.dir=") for word in cfg.hydra.overrides.hydra)
        if cfg.hydra.job.config_name == "train" and not chosen:  # then the folder is called after the time
            console.print(f"to go on with these trials: the same words and hydra.sweep.dir={folder}")


def begin(cfg: Any, trials: int | None) -> Study:
    """Takes the study's folder for this process.

    Raises:
        UserError: another process is at work there.
    """
    folder = Path(cfg.hydra.sweep.dir)
    settings = to_dataclass(OmegaConf.to_container(cfg.sweep, resolve=True), SweepConfig)
    evaluate = to_dataclass(OmegaConf.to_container(cfg.evaluate, resolve=True), EvaluateConfig)
    studies.append(Study(folder, settings, evaluate, trials, RunDir(folder).lock(key="hydra.sweep.dir")))
    for note in notes(folder):
        note.unlink()
    return studies[-1]


def notes(folder: Path) -> list[Path]:
    """What the trials of a study left that failed since it began, in whichever process they ran."""
    return list(folder.glob("*/no_result.txt"))


def params_of(cfg: Any, words: list[str]) -> dict[str, Any]:
    """The grid of conf/; none where the command line has one, which stands for it."""
    if any(override.is_sweep_override() for override in parse_overrides(words)):
        return {}
    return OmegaConf.to_container(cfg.hydra.sweeper, resolve=True).get("params") or {}


def grid(cfg: Any, words: list[str]) -> list[list[str]]:
    """The overrides of every trial of a full grid, in the order of Hydra's own sweeper."""
    params = [f"{key}={value}" for key, value in params_of(cfg, words).items()]
    with hydra_errors():
        (trials,) = BasicSweeper.split_arguments(parse_overrides([*params, *words]), None)
    return trials


def check_trials(config_name: str, trials: list[list[str]]) -> None:
    """Checks every trial of a sweep before the first one starts.

    Raises:
        UserError: a trial that would be refused, or have the folder of another one; it is named by
            what it sweeps.
    """
    common = set(trials[0]).intersection(*trials)
    names: dict[str, str] = {}  # folder -> the trial that has it
    for words in trials:
        own = ", ".join(word for word in words if word not in common)
        try:
            with hydra_errors():
                cfg = composed(config_name, words)
                check_paths(to_config(cfg))
                first = names.setdefault(cfg.hydra.sweep.subdir, own)
        except UserError as mistake:
            raise UserError(f"trial {own}: {mistake}" if own else str(mistake)) from None
        if first != own:
            raise UserError(
                f"trial {own} would have the folder of trial {first}, as folders are not called after what "
                "differs there: sweep other keys, or give each a study of its own with hydra.sweep.dir=DIR"
            )


def composed(config_name: str, words: list[str]) -> Any:
    """conf/CONFIG_NAME.yaml with these overrides, and Hydra's own settings, as one job of a sweep gets it."""
    return GlobalHydra.instance().config_loader().load_configuration(config_name, words, RunMode.RUN)


def reject_resume(words: list[str]) -> None:
    """Raises for `-m resume=...`."""
    if any(text.startswith("resume=") for text in words):
        raise UserError("resume goes on with one run at a time: drop -m")


@contextmanager
def hydra_here() -> Iterator[None]:
    """Makes conf/ known to Hydra where it does not run the command itself."""
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"), hydra_errors():
        yield


@dataclass(frozen=True)
class Choice:
    """A study whose trials are no plain grid: what is fixed, and what is to be chosen."""

    cfg: Any  # the composed settings without what is to be chosen
    fixed: list[str]  # overrides that all trials share
    free: list[Override]  # the sweeps: a choice, a range or an interval each

    @property
    def settings(self) -> SweepConfig:
        return to_dataclass(OmegaConf.to_container(self.cfg.sweep, resolve=True), SweepConfig)


def choice_of(words: list[str]) -> Choice | None:
    """What `sweep.py WORDS` leaves to sweep.search, halving or report_only; None for a plain grid.

    Raises:
        UserError: an unknown key or group, or a launcher, which has no part in these.
    """
    words = [word for word in words if word not in ("-m", "--multirun")]  # it always is one
    if any(word.startswith("-") for word in words):
        return None  # --help and its like are Hydra's
    with hydra_here():
        given = {
            o.key_or_group: o for o in parse_overrides(words)
        }.values()  # of a key given twice the last counts
        fixed = [o.input_line for o in given if not o.is_sweep_override()]
        cfg = composed("sweep", fixed)
        if cfg.sweep.search is None and not cfg.sweep.halving and not cfg.sweep.report_only:
            return None
        reject_resume(words)
        if "BasicLauncher" not in cfg.hydra.launcher._target_ and not cfg.sweep.report_only:
            raise UserError(
                "sweep.search and sweep.halving train one trial after the other: drop hydra/launcher"
            )
        params = parse_overrides([f"{key}={value}" for key, value in params_of(cfg, words).items()])
        swept = [o for o in (*params, *given) if o.is_sweep_override()]
        return Choice(cfg, fixed, swept)


def trial_of(words: list[str]) -> tuple[Config, RunDir]:
    """The checked settings of one trial of `sweep.py`, and its folder.

    Raises:
        UserError: settings that are not accepted.
    """
    with hydra_here():
        cfg = composed("sweep", words)
        config, folder = to_config(cfg), Path(cfg.hydra.sweep.dir)
        check_paths(config)
        run = RunDir(folder / cfg.hydra.sweep.subdir)
        set_wandb_names(config, run, folder)
        return config, run
