"""The jobs that Hydra starts: the entry point, checks before a job begins, its folder and settings."""

import argparse
import functools
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf, read_write

from ghibli.config.files import from_yaml
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.schema import Config
from ghibli.config.typed_paths import with_typed_paths
from ghibli.runs import distributed
from ghibli.runs.compose import (
    check_overrides,
    checks_of,
    errors_in,
    parse_overrides,
    register,
    reject_spaces_around_equals,
    to_config,
)
from ghibli.runs.find import has_checkpoint, run_to_resume
from ghibli.runs.folder import RunDir
from ghibli.runs.here import on_this_machine
from ghibli.runs.inputs import check_inputs
from ghibli.runs.repeats import planned_seeds, refuse_change_of_one, repetition, with_seed
from ghibli.runs.resume import resumed_config
from ghibli.runs.reuse import require_free, require_same_trial
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.wording import number_of

MULTIRUN = ("-m", "--multirun")

logger = logging.getLogger(__name__)


def hydra_entry(config_dir: Path, config_name: str, job: Callable[[Any], Any]) -> None:
    """Run `job(cfg)` under Hydra with CONFIG_DIR/CONFIG_NAME.yaml; a user's error ends it in one line."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors instead of printing them

    def explained(cfg: Any) -> Any:
        with hydra_errors():
            return job(cfg)

    @functools.wraps(job)
    def guarded(cfg: Any) -> Any:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return explained(cfg)  # the other trials continue; Hydra reports this one at the end
        return one_line_errors(lambda: explained(cfg))

    def run() -> None:
        reject_spaces_around_equals(sys.argv[1:])
        sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN)  # Hydra wants it first
        is_sweep = config_name == "sweep" or any(word in MULTIRUN for word in sys.argv[1:])
        sys.argv[1:] = with_typed_paths(sys.argv[1:], is_sweep)
        decorate = hydra_main(version_base="1.3", config_path=str(config_dir), config_name=config_name)
        words = list(sys.argv[1:])
        with further_errors(lambda: errors_in_words(words, is_sweep)), hydra_errors(), readable_help():
            decorate(guarded)()

    one_line_errors(run)


@contextmanager
def further_errors(find: Callable[[], list[str]]) -> Iterator[None]:
    """Add to an error in the settings what else is wrong with them, in the same line.

    Args:
        find: lists all errors, this one included.
    """
    try:
        yield
    except UserError as error:
        others = [other for other in dict.fromkeys(find()) if other not in str(error)]
        if not others:
            raise
        raise UserError("; and: ".join([str(error), *others])) from error


def errors_in_words(words: list[str], is_sweep: bool) -> list[str]:
    """List all errors in the words of a command that starts one new run; none for any other command.

    A sweep's error names its trial, and a run to resume has settings of its own.
    """
    is_other = is_sweep or any(word.startswith(("-", "resume=", "hydra")) for word in words)
    return [] if is_other or len(words) < 2 else check_overrides(words)[2]


def errors_in_cfg(cfg: Any) -> list[str]:
    """List all errors in the values of a composed config; none for a run to resume."""
    if cfg.resume is not None:
        return []
    return [error for check in checks_of(cfg) for error in errors_in(check)]


@contextmanager
def readable_help() -> Iterator[None]:
    """Let argparse read only help that is text, while Hydra builds its parser.

    From Python 3.14 on argparse formats every help when it is added, and refuses the object by which
    Hydra 1.3 puts off building the help of --shell-completion. Private in argparse: `_get_help_string`.
    """
    original = argparse.HelpFormatter._get_help_string

    def as_text(formatter: argparse.HelpFormatter, action: argparse.Action) -> str | None:
        return original(formatter, action) if isinstance(action.help, str | None) else ""

    argparse.HelpFormatter._get_help_string = as_text  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        argparse.HelpFormatter._get_help_string = original  # type: ignore[method-assign]


class CheckRun(Callback):
    """Check a single run before Hydra makes its folder, so that an error leaves nothing behind."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        def check() -> None:
            with further_errors(lambda: errors_in_cfg(config)):
                check_job(config)

        one_line_errors(check)


def check_job(cfg: Any) -> None:
    """Check all of a command that can be checked before anything is loaded or written.

    Raises:
        UserError: a value that is not accepted, a path that does not exist, a folder that is taken.
    """
    with hydra_errors():
        reject_chdir(cfg)
        if cfg.resume is None:
            check_new_run(cfg)
        else:
            run = run_to_resume(cfg.resume)
            if cfg.resume == "latest":
                done = run.status.read().get("epoch") or 0
                logger.info(f"latest   {run.path}: {run.status.state}, {number_of(done, 'epoch')} done")
            config = resumed_here(run, cfg, cfg.hydra.overrides)
            check_places(config)
            reject_seeds_outside(config)
            run.lock().close()
            check_other_seeds(run, config, resumes=True)


def check_new_run(cfg: Any) -> None:
    """Check the settings, paths and folder of a new run.

    Raises:
        UserError: as check_job.
    """
    config = to_config(cfg)
    check_inputs(config)
    reject_seeds_outside(config)
    is_folder_given = config.name is not None or any(
        text.startswith("hydra.run.dir=") for text in cfg.hydra.overrides.hydra
    )
    if distributed.started_outside() and not is_folder_given:
        raise UserError(
            "several processes of this command were started at once (srun, torchrun): "
            "give them one folder, hydra.run.dir=DIR"
        )
    run = RunDir(Path(OmegaConf.select(cfg, "hydra.run.dir")))
    require_same_trial(config, run)
    if not is_folder_given:
        run = RunDir(claimed(run.path))
        with read_write(cfg.hydra.run):
            cfg.hydra.run.dir = str(run.path)
    run.lock().close()
    check_other_seeds(run, config)


def check_other_seeds(run: RunDir, config: Config, resumes: bool = False) -> None:
    """Check the folders of the further trainings of a run with several seeds, before the first one begins.

    Raises:
        UserError: another process works in one of them, or it holds another run.
    """
    first, seeds = planned_seeds(run, config)
    for seed in seeds[1:]:
        other = repetition(first, seed)
        if other != run:
            require_free(with_seed(config, first, seed), other, resumes and has_checkpoint(other))


def reject_seeds_outside(config: Config) -> None:
    """Raise a UserError for seeds=3 of processes that srun or torchrun started, which share one training."""
    if config.seeds > 1 and distributed.started_outside():
        raise UserError(
            f"seeds={config.seeds}: several processes of this command were started at once (srun, torchrun), "
            "which train one run: start one command for each seed, seed=0, seed=1, ..."
        )


def reject_seeds_of_trial(config: Config) -> None:
    """Raise a UserError for seeds=3 in a sweep."""
    if config.seeds > 1:
        raise UserError(
            f"seeds={config.seeds} repeats a single run: in a sweep use sweep.repeats={config.seeds - 1}, "
            "for the best trials, or sweep seed=0,1,2"
        )


def check_places(config: Config) -> None:
    """Check the paths of a run to resume; which images data.exclude left out is in its split.json.

    Raises:
        UserError: one does not exist; the message says how to name its new place.
    """
    try:
        check_inputs(replace(config, data=replace(config.data, exclude=None)))
    except UserError as error:
        raise UserError(f"{error}; if it only moved, say where it is now beside resume=, KEY=DIR") from None


def reject_chdir(cfg: Any) -> None:
    """Raise a UserError for hydra.job.chdir=true: paths would mean other files once the job has begun."""
    if cfg.hydra.job.chdir:
        raise UserError("hydra.job.chdir=true: relative paths would then mean other files; drop it")


def claimed(folder: Path) -> Path:
    """Make a new folder that no other process has, under this name or with a number added; return it.

    Raises:
        UserError: it cannot be made.
    """
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = folder.with_name(f"{folder.name.partition('+')[0]}+{number}")
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {folder} ({error.strerror}): choose another"
            ) from error
    raise AssertionError("count() does not end")


def current_run() -> RunDir:
    """Return the run folder that Hydra chose for the running job."""
    return RunDir(Path(HydraConfig.get().runtime.output_dir))


def job_config(cfg: Any) -> Config:
    """Return what the running job trains with: the composed settings, or with resume=RUN the run's own."""
    if cfg.resume is not None:
        config = resumed_here(current_run(), cfg, HydraConfig.get().overrides)
        before = from_yaml(current_run().config).cache_dir
        if os.path.abspath(before) != os.path.abspath(config.cache_dir):
            logger.info(f"this machine's cache_dir={config.cache_dir} is used, not {before} of the run")
        return config
    config = to_config(cfg)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        reject_seeds_of_trial(config)
        set_wandb_names(config, current_run(), Path(HydraConfig.get().sweep.dir))
    return config


def resumed_here(run: RunDir, cfg: Any, overrides: Any) -> Config:
    """Return the settings of a run to resume, as resumed_config does, with the cache of this command."""
    names = {override.key_or_group for override in parse_overrides(overrides.task)}
    config = resumed_config(run, overrides)
    refuse_change_of_one(run, from_yaml(run.config), config)
    return on_this_machine(config, cfg.cache_dir, keep_root="data.root" in names)


def set_wandb_names(config: Config, run: RunDir, sweep: Path) -> None:
    """Name a trial on W&B after its folder, and its group after the sweep's, unless the user named them."""
    config.wandb.group = config.wandb.group or sweep.name
    if config.wandb.name in (None, config.name):  # that names the sweep
        config.wandb.name = run.path.name
