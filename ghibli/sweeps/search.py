"""Studies that choose their trials while they run: Optuna's search, and successive halving."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from ghibli.config.files import read_settings
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.reuse import require_same_trial_except_epochs
from ghibli.runtime.commands import install_command
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_rows
from ghibli.runtime.wording import number_of
from ghibli.sweeps.grid import PlannedTrial, Study, StudyRequest, settings_and_folder, time_in_all
from ghibli.sweeps.jobs import Timed, Work

logger = logging.getLogger(__name__)

RETRY_OF = "again"  # user attribute of a retried trial: the number of the one that failed
REDUCTION = 3  # halving keeps the best of so many
Train = Callable[[Config, RunDir, bool], float]  # train.run, which gives NaN for a trial that failed


def optuna_search(request: StudyRequest, study: Study, train: Train) -> None:
    """Train `sweep.search` trials, each where Optuna's TPE expects the most after the trials before it.

    Everything that was asked, and its result, is stored in optuna.db in the study's folder. A suggestion
    depends only on the seed, the trial's number and the finished trials, so a search that was killed
    continues exactly as if it had not been. Failed trials are retried first.

    Raises:
        UserError: Optuna is not installed, or the earlier search in this folder had other choices.
    """
    count = request.settings.search
    assert count is not None, "sweep.py searches only if sweep.search is set"
    optuna = import_optuna()
    table = optuna.create_study(
        study_name="search", storage=database(study.folder),
        direction="maximize", load_if_exists=True,
    )  # fmt: skip
    restore_trials(table, request, train)
    while (trial := next_trial(table, count)) is not None:
        logger.info("")
        logger.info(f"trial {search_position(table, trial) + 1} of {count}")
        config, run = settings_and_folder([*request.fixed, *suggested_overrides(table, trial, request)])
        gain = train(config, run, False)
        if math.isnan(gain):
            table.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        else:
            table.tell(trial.number, gain)


def announcement(request: StudyRequest, plan: list[PlannedTrial], past: list[Timed]) -> str:
    """Say how many trials a search trains, over which keys, and about how long it takes.

    Args:
        plan: corner_trials, of whose kinds the trials will be.
        past: finished runs of this base and images, to estimate the time from.
    """
    count = request.settings.search or 0
    works = [plan[at % len(plan)].work for at in range(count)]
    keys = ", ".join(override.get_key_element() for override in request.free)
    return (
        f"{number_of(count, 'trial')} over {keys}; {time_in_all(works, past)}; Ctrl-C stops, the same "
        "command goes on"
    )


def halving_announcement(plan: list[PlannedTrial], past: list[Timed]) -> str:
    """Say how many trials begin, until which epochs how many of them go on, and about how long it takes.

    Args:
        past: finished runs of this base and images, to estimate the time from.
    """
    left, done, works, parts = len(plan), 0, [], []
    for rung in rungs(plan[0].work.epochs):
        works += [Work(rung - done, plan[0].work.is_guided)] * left
        parts.append(f"{left} until epoch {rung}")
        left, done = math.ceil(left / REDUCTION), rung
    return (
        f"{number_of(len(plan), 'trial')}: {', '.join(parts)}; {time_in_all(works, past)}; Ctrl-C stops, "
        "the same command goes on"
    )


def database(folder: Path) -> str:
    """Return the URL of a study's database; every character of the folder's name means itself in it."""
    from sqlalchemy.engine import URL  # comes with Optuna

    return URL.create("sqlite", database=str(folder / "optuna.db")).render_as_string(hide_password=False)


def corner_trials(request: StudyRequest) -> list[list[str]]:
    """Return one trial for each value of a list and each end of a range or interval.

    The other keys keep their first value. Checking these checks every value that a search can suggest.
    """
    ends = {override.get_key_element(): extreme_values(override) for override in request.free}
    first = {key: values[0] for key, values in ends.items()}
    trials = [first | {key: value} for key, values in ends.items() for value in values]
    return [[*request.fixed, *(f"{key}={value}" for key, value in trial.items())] for trial in trials]


def import_optuna() -> Any:
    """Import Optuna, an optional extra, and silence its log.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError(f"sweep.search needs Optuna: {install_command('search')}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # its line about each trial; train.py prints ours
    return optuna


def restore_trials(table: Any, request: StudyRequest, train: Train) -> None:
    """Ask for every finished trial again, which retrains those whose folder is gone; queue failed ones."""
    from optuna.trial import TrialState

    for trial in table.get_trials(states=(TrialState.COMPLETE,)):
        overrides = [f"{key}={value}" for key, value in trial.params.items()]
        train(*settings_and_folder([*request.fixed, *overrides]), False)
    latest = {trial.user_attrs.get(RETRY_OF, trial.number): trial for trial in table.trials}
    for number, trial in latest.items():
        if trial.state == TrialState.FAIL:
            table.enqueue_trial(trial.params, user_attrs={RETRY_OF: number})


def next_trial(table: Any, count: int) -> Any:
    """Return the trial that a killed process left running, else a queued or a new one.

    None after `count` trials.
    """
    from optuna.trial import TrialState

    running = table.get_trials(states=(TrialState.RUNNING,))
    if running:
        return reopen_trial(table, running[0])
    queued = table.get_trials(states=(TrialState.WAITING,))
    return table.ask() if queued or len(first_attempts(table)) < count else None


def reopen_trial(table: Any, frozen: Any) -> Any:
    """Continue a trial that is still running in the database, with the values suggested to it so far.

    Optuna has no public call for this: `ask` only starts trials, and a FrozenTrial has no public id.
    Private: FrozenTrial._trial_id, as of Optuna 5.0.
    """
    from optuna.trial import Trial

    return Trial(table, frozen._trial_id)


def first_attempts(table: Any) -> list[int]:
    """Return Optuna's numbers of all trials that are not retries."""
    return [trial.number for trial in table.trials if RETRY_OF not in trial.user_attrs]


def search_position(table: Any, trial: Any) -> int:
    """Return a trial's position in the search, from 0; a retry has that of the trial it repeats."""
    return first_attempts(table).index(trial.user_attrs.get(RETRY_OF, trial.number))


def suggested_overrides(table: Any, trial: Any, request: StudyRequest) -> list[str]:
    """Return the overrides that Optuna suggests, one for each sweep on the command line.

    Raises:
        UserError: an earlier trial of this search had other values to choose from.
    """
    from optuna.samplers import TPESampler

    overrides, number = [], search_position(table, trial)
    for index, override in enumerate(request.free):
        key, seed = override.get_key_element(), (request.cfg.seed, number, index)
        table.sampler = TPESampler(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
        try:
            overrides.append(f"{key}={suggest_value(trial, key, override)}")
        except ValueError as error:
            raise UserError(
                f"{key}: the search in this folder had other values to choose from; give the same ones, or "
                f"another folder with hydra.sweep.dir=DIR ({error})"
            ) from error
    return overrides


def suggest_value(trial: Any, key: str, override: Override) -> Any:
    """Suggest one value: of a list, of a range of integers, or of an interval (log with `tag(log, ...)`)."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return trial.suggest_float(key, sweep.start, sweep.end, log="log" in sweep.tags)
    if is_integer_range(sweep):
        return trial.suggest_int(key, sweep.start, sweep.stop - 1, step=sweep.step)
    return trial.suggest_categorical(key, list(override.sweep_string_iterator()))


def extreme_values(override: Override) -> list[Any]:
    """Return the extreme values that `suggest_value` can reach.

    All of a list, the first and last of a range or interval.
    """
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [sweep.start, sweep.end]
    values = list(override.sweep_string_iterator())
    return [values[0], values[-1]] if is_integer_range(sweep) else values


def is_integer_range(sweep: Any) -> bool:
    """Return True for `range(...)` of integers."""
    if not isinstance(sweep, RangeSweep):
        return False
    return all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step))


def successive_halving(trials: list[list[str]], train: Train) -> None:
    """Train all trials for a ninth of the epochs, the best third of them for a third, its best third fully.

    Successive halving (Jamieson & Talwalkar 2016) with a reduction factor of 3. A trial resumes where it
    stopped, which equals never having stopped, because its learning rate is constant and nothing counts
    epochs without an improvement.

    Args:
        trials: the overrides of each trial.

    Raises:
        UserError: the learning rate is not constant, trainer.max_epochs is swept, or a trial's folder
            holds another trial.
    """
    survivors = list(trials)
    planned = [settings_and_folder(overrides) for overrides in survivors]
    epochs = {config.trainer["max_epochs"] for config, _ in planned}
    if len(epochs) > 1:
        raise UserError("sweep.halving=true chooses trainer.max_epochs itself: give one value for it")
    if not all(can_be_extended(config) for config, _ in planned):
        raise UserError(
            "sweep.halving=true stops trials early and resumes some, so the result must not depend on the "
            "planned length: add optimizer.schedule=constant optimizer.warmup_steps=0 "
            "early_stopping.patience=null"
        )
    for config, run in planned:
        require_same_trial_except_epochs(config, run)
    for rung in rungs(*epochs):
        logger.info("")
        logger.info(f"{number_of(len(survivors), 'trial')} until epoch {rung}")
        gains = [train_until(overrides, rung, train) for overrides in survivors]
        order = np.argsort([math.inf if math.isnan(gain) else -gain for gain in gains], kind="stable")
        survivors = [survivors[index] for index in order[: math.ceil(len(survivors) / REDUCTION)]]


def can_be_extended(config: Config) -> bool:
    """Return True if a run that is extended later ends like one that was planned that long."""
    optimizer = config.optimizer
    is_constant = optimizer.schedule == "constant" and not optimizer.warmup_steps
    return is_constant and config.early_stopping.patience is None


def rungs(epochs: int) -> list[int]:
    """Return the epochs after which trials are compared: 1, 3, 9 of 9."""
    return sorted({max(1, epochs // REDUCTION**power) for power in range(3)})


def train_until(overrides: list[str], epochs: int, train: Train) -> float:
    """Train what is missing of a trial up to an epoch; return its best gain so far, NaN when it failed."""
    config, run = settings_and_folder(overrides)
    config.trainer["max_epochs"] = epochs
    planned, status = planned_epochs(run), run.status.read()
    stopped_early = run.status.state == "finished" and status.get("epoch", 0) < planned
    passed = planned > epochs or (planned == epochs and run.status.state == "finished") or stopped_early
    if not passed and math.isnan(train(config, run, planned > 0 and run.usable_checkpoint() is not None)):
        return math.nan
    return best_gain_until(run, epochs)


def planned_epochs(run: RunDir) -> int:
    """Return how many epochs the trial was last started for; 0 if it was not."""
    try:
        return int((read_settings(run.config) or {})["trainer"]["max_epochs"])
    except (KeyError, TypeError, ValueError):
        return 0


def best_gain_until(run: RunDir, epochs: int) -> float:
    """Return the highest held-out gain after the epochs 1 .. `epochs`; NaN if there is none."""
    try:
        rows = read_rows(run.probe)
    except OSError:
        return math.nan
    gains = [float(row["probe/val_gain"]) for row in rows if 0 < int(row["epoch"]) <= epochs]
    return max(gains, default=math.nan)
