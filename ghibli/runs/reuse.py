"""A run folder that was used before: return its result, resume it, start over, or refuse it."""

import logging
import os
from dataclasses import asdict, replace

from ghibli.config.files import CHECKSUM_LINE, LONGEST, from_yaml, to_yaml
from ghibli.config.schema import CONFIG_VERSION, Config, age_of
from ghibli.runs.folder import RunDir, step_of
from ghibli.runs.identity import code_hash, describe_commit, finished_objective, settings_hash
from ghibli.runs.repeats import shares_settings_with
from ghibli.runs.settings import describe_differences, differences, relevant_settings, stored_settings
from ghibli.runtime.commands import command_here, path_setting, quoted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole, read_plain, write_text
from ghibli.runtime.rank import is_first

logger = logging.getLogger(__name__)


def holds_results(run: RunDir) -> bool:
    """Return whether the folder holds checkpoints or a finished run's result."""
    checkpoints = (run.last_checkpoint, run.previous_checkpoint, run.best_checkpoint)
    return any(path.exists() for path in checkpoints) or run.status.read().get("state") == "finished"


def is_of_a_run(run: RunDir) -> bool:
    """Return whether the files of a folder are a run's: its status or its settings say so."""
    if "settings_hash" in run.status.read():
        return True
    try:
        return CHECKSUM_LINE in read_plain(run.config, LONGEST).decode()
    except (OSError, ValueError):
        return False


def refuse_foreign_files(run: RunDir) -> None:
    """Check that a run would replace and delete no file that another program or the user made.

    Raises:
        UserError: the folder holds such a file.
    """
    if is_of_a_run(run):
        return
    own = (run.config, run.status.path, run.split, run.metrics, run.probe, run.distances)
    foreign = next((path for path in own if path.exists()), None)
    if foreign is not None:
        raise UserError(
            f"{foreign} is there already and belongs to no run that can be told: choose another folder, or "
            "move that file away"
        )


def require_same_trial(config: Config, run: RunDir) -> None:
    """Check that a folder is free, or holds a run of these settings and this code.

    Whether that run is still training is decided by the folder's lock, not by the process number in
    status.json, which may belong to another process by now.

    Raises:
        UserError: the folder holds another run.
    """
    status = run.status.read()
    if not is_first():
        return
    if not holds_results(run):
        refuse_foreign_files(run)
        return
    advice = f"resume it with {quoted(path_setting('resume', run.path))}, or choose another folder"
    if "settings_hash" not in status:
        raise UserError(
            f"{run.path} already holds a run, and its status.json does not say which one: {advice}"
        )
    if status["settings_hash"] != settings_hash(config):
        found = list(differences(stored_settings(run), relevant_settings(asdict(config))))
        what = describe_differences(found, "there") or "its config.yaml does not say which"
        raise UserError(f"{run.path} already holds a run with other settings: {what}; {advice}")
    require_same_code(run, advice)
    if status.get("grown"):
        raise UserError(
            f"{run.path} already holds a run whose epochs were raised on resume, so its result may differ "
            f"from a run planned for as many: {advice}"
        )


def require_free(config: Config, run: RunDir, resumes: bool = False) -> None:
    """Check that no other process works in a run folder, and none of another run is there.

    Args:
        resumes: the run that is there goes on, whatever it is.

    Raises:
        UserError: the folder is not free.
    """
    if not run.path.exists():
        return
    if not resumes:
        require_same_trial(config, run)
    run.lock().close()


def require_same_trial_except_epochs(config: Config, run: RunDir) -> None:
    """Check that a folder is free, or holds this trial of successive halving, for any number of epochs.

    Raises:
        UserError: it holds other settings, or a result of other code.
    """
    if not holds_results(run):
        return
    advice = "choose another folder with hydra.sweep.dir=DIR"
    found = differences(stored_settings(run), relevant_settings(asdict(config)))
    others = [difference for difference in found if difference[0] != "trainer.max_epochs"]
    if others:
        what = describe_differences(others, "there")
        raise UserError(f"{run.path} already holds a run with other settings: {what}; {advice}")
    require_same_code(run, advice)


def require_same_code(run: RunDir, advice: str) -> None:
    """Raise a UserError, ending in the advice, for a run that was made by other code."""
    status = run.status.read()
    if status.get("code_hash") != code_hash():
        raise UserError(
            f"{run.path} already holds this run, made by other code (commit {describe_commit(status)}), so "
            f"its result may differ from what this code gives: {advice}"
        )


def resume_or_restart(config: Config, run: RunDir, resumes: bool = False) -> tuple[float | None, bool]:
    """Decide what is left to do for a run: (stored objective, whether to resume); say so on the console.

    A finished run returns its objective, an unfinished one with an intact checkpoint is resumed, and what
    any other attempt left is deleted.

    Args:
        resumes: resume it in any case, with a warning of what has changed since its start.

    Raises:
        UserError: the folder holds another run.
    """
    if resumes:
        if has_ended(config, run):
            more = f"trainer.max_epochs={2 * config.trainer['max_epochs']}"
            folder, whole = (os.path.relpath(one.path) for one in (run, shares_settings_with(run, config)))
            again = command_here("python", "train.py", path_setting("resume", whole), more)
            logger.info(f"{folder} is finished, and nothing was done; to train on: {again}")
            store_more_seeds(config, run)
            return finished_objective(run), True
        warn_of_changes(run)
        return None, True
    require_same_trial(config, run)
    objective, folder = finished_objective(run), os.path.relpath(run.path)
    if objective is not None:
        logger.info(f"{folder} is finished: its objective was {objective:.4f}")
        store_more_seeds(config, run)
        return objective, False
    status, checkpoint = run.status.read(), run.usable_checkpoint()
    if status.get("state") == "failed":
        logger.warning(f"{folder} failed before: {status.get('reason')}")
    if checkpoint is not None:
        logger.info(f"{folder} is unfinished: resuming from step {step_of(checkpoint)}")
        return None, True
    if holds_results(run):
        logger.warning(f"{folder} has no intact checkpoint: starting over")
    if run.status.path.exists():
        delete_results(run)
    return None, False


def store_more_seeds(config: Config, run: RunDir) -> None:
    """Raise `seeds` in a finished run's settings, from which a resume of any of its trainings knows them all.

    Raises:
        UserError: its config.yaml is damaged.
    """
    if config.seeds > 1 and config.seeds > (stored := from_yaml(run.config)).seeds:
        write_text(run.config, to_yaml(replace(stored, seeds=config.seeds)))


def has_ended(config: Config, run: RunDir) -> bool:
    """Return whether a run is finished, has its weights, and is to be resumed without a change.

    Without them, or its best checkpoint, it is not: resuming makes the weights again, or says what is lost.
    """
    is_same = relevant_settings(asdict(config)) == stored_settings(run)
    has_all = config.finetune == "none" or (run.has_weights and is_whole(run.best_checkpoint))
    return finished_objective(run) is not None and is_same and has_all


def delete_results(run: RunDir) -> None:
    """Delete the files that an earlier attempt left, the checkpoints first."""
    checkpoints = (run.last_checkpoint, run.previous_checkpoint, run.best_checkpoint)
    for path in (*checkpoints, run.metrics, run.probe, run.distances, run.split, run.status.path):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def warn_of_changes(run: RunDir) -> None:
    """Print a warning for each change since the run's start that may change how it ends on resume."""
    status = run.status.read()
    if not status:
        logger.warning(
            "status.json is damaged or missing: earlier starts are forgotten, and W&B gets a new run"
        )
        return
    version = status.get("config_version", 0)
    if version != CONFIG_VERSION:
        logger.warning(
            f"this run has settings of version {version}, this code of version {CONFIG_VERSION}: it was made "
            f"by {age_of(version)} version, and they were read unchanged; to repeat it exactly, check out "
            f"its commit, {describe_commit(status)}"
        )
    if status.get("code_hash", code_hash()) != code_hash():
        logger.warning(
            f"the code has changed since this run was started (commit {describe_commit(status)}): it may end "
            "differently from an uninterrupted run"
        )
