"""Studies that choose their trials on the way: Optuna's search, and successive halving."""

import csv
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from ghibli.config.files import read_settings
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runs.reuse import require_same_trial_except_epochs
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError
from ghibli.sweeps.grid import Choice, Study, trial_of

AGAIN = "again"  # of a trial that is tried again: the number of the one that failed
KEEP = 3  # halving keeps the best of so many
Train = Callable[[Config, RunDir, bool], float]  # train.run, which gives NaN for a trial that failed


def search(choice: Choice, study: Study, train: Train) -> None:
    """Trains `sweep.search` trials, each where Optuna's TPE expects most after those before it.

    What was asked and what came of it stands in optuna.db of the study's folder. Each suggestion
    depends on the seed, the trial's number and the finished trials alone, so a search that was
    killed goes on as if it had not been. Trials that had failed are tried again first.

    Raises:
        UserError: Optuna is not installed, or the folder's earlier search had other choices.
    """
    optuna = import_optuna()
    table = optuna.create_study(
        study_name="search", storage=f"sqlite:///{study.folder / 'optuna.db'}",
        direction="maximize", load_if_exists=True,
    )  # fmt: skip
    put_right(table, choice, train)
    while (trial := next_trial(table, choice.settings.search)) is not None:
        console.print(f"\ntrial {place_of(table, trial) + 1} of {choice.settings.search}", style="bold")
        config, run = trial_of([*choice.fixed, *suggestions(table, trial, choice)])
        gain = train(config, run, False)
        if math.isnan(gain):
            table.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        else:
            table.tell(trial.number, gain)


def corners(choice: Choice) -> list[list[str]]:
    """A trial for each value of a choice and each end of a range or an interval; of the others the first."""
    ends = {override.get_key_element(): ends_of(override) for override in choice.free}
    first = {key: values[0] for key, values in ends.items()}
    trials = [first | {key: value} for key, values in ends.items() for value in values]
    return [[*choice.fixed, *(f"{key}={value}" for key, value in trial.items())] for trial in trials]


def import_optuna() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError('sweep.search needs Optuna: pip install -e ".[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def put_right(table: Any, choice: Choice, train: Train) -> None:
    """Asks for finished trials again, whose folders answer or are made anew, and queues the failed ones."""
    from optuna.trial import TrialState

    for trial in table.get_trials(states=(TrialState.COMPLETE,)):
        words = [f"{key}={value}" for key, value in trial.params.items()]
        train(*trial_of([*choice.fixed, *words]), False)
    latest = {trial.user_attrs.get(AGAIN, trial.number): trial for trial in table.trials}
    for number, trial in latest.items():
        if trial.state == TrialState.FAIL:
            table.enqueue_trial(trial.params, user_attrs={AGAIN: number})


def next_trial(table: Any, count: int) -> Any:
    """The trial that a killed process left, else one that is queued or new; None when there were enough."""
    from optuna.trial import Trial, TrialState

    left = table.get_trials(states=(TrialState.RUNNING,))
    if left:
        return Trial(table, left[0]._trial_id)  # remembers what was suggested to it
    queued = table.get_trials(states=(TrialState.WAITING,))
    return table.ask() if queued or len(first_numbers(table)) < count else None


def first_numbers(table: Any) -> list[int]:
    """Optuna's numbers of all trials but those that try another one again."""
    return [trial.number for trial in table.trials if AGAIN not in trial.user_attrs]


def place_of(table: Any, trial: Any) -> int:
    """The place of a trial in the search, from 0; one that is tried again keeps it."""
    return first_numbers(table).index(trial.user_attrs.get(AGAIN, trial.number))


def suggestions(table: Any, trial: Any, choice: Choice) -> list[str]:
    """The overrides that Optuna suggests, one for each sweep of the command line.

    Raises:
        UserError: an earlier trial of this search could choose among other values.
    """
    from optuna.samplers import TPESampler

    words, number = [], place_of(table, trial)
    for place, override in enumerate(choice.free):
        key, seed = override.get_key_element(), (choice.cfg.seed, number, place)
        table.sampler = TPESampler(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
        try:
            words.append(f"{key}={suggested(trial, key, override)}")
        except ValueError as error:
            raise UserError(
                f"{key}: the search in this folder had other values to choose from; give the same ones, or "
                f"another folder with hydra.sweep.dir=DIR ({error})"
            ) from error
    return words


def suggested(trial: Any, key: str, override: Override) -> Any:
    """One value: of a list, of a range of whole numbers, or of an interval (log with `tag(log, ...)`)."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return trial.suggest_float(key, sweep.start, sweep.end, log="log" in sweep.tags)
    if is_whole(sweep):
        return trial.suggest_int(key, sweep.start, sweep.stop - 1, step=sweep.step)
    return trial.suggest_categorical(key, list(override.sweep_string_iterator()))


def ends_of(override: Override) -> list[Any]:
    """What `suggested` can give: all values of a list, the first and the last of the others."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [sweep.start, sweep.end]
    values = list(override.sweep_string_iterator())
    return [values[0], values[-1]] if is_whole(sweep) else values


def is_whole(sweep: Any) -> bool:
    """True for a range of whole numbers."""
    if not isinstance(sweep, RangeSweep):
        return False
    return all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step))


def halve(choice: Choice, trials: list[list[str]], train: Train) -> None:
    """Trains all trials for a ninth of the epochs, the best third of them for a third, the best to the end.

    Successive halving (Jamieson & Talwalkar 2016) with a factor of 3. A trial goes on where it
    stopped, which is the same as never having stopped because its learning rate is constant and
    nothing counts epochs without an improvement.

    Raises:
        UserError: the learning rate is not constant, the epochs are swept, or a trial's folder holds
            another one.
    """
    words = list(trials)
    asked = [trial_of(one) for one in words]
    epochs = {config.trainer["max_epochs"] for config, _ in asked}
    if len(epochs) > 1:
        raise UserError("sweep.halving=true chooses trainer.max_epochs itself: give one value for it")
    if not all(can_go_on(config) for config, _ in asked):
        raise UserError(
            "sweep.halving=true stops trials early and lets some go on, so it must not matter how long they "
            "train: add optimizer.schedule=constant optimizer.warmup_steps=0 early_stopping.patience=null"
        )
    for config, run in asked:
        require_same_trial_except_epochs(config, run)
    for rung in rungs(*epochs):
        console.print(f"\n{len(words)} trials until epoch {rung}", style="bold")
        gains = [train_until(one, rung, train) for one in words]
        order = np.argsort([math.inf if math.isnan(gain) else -gain for gain in gains], kind="stable")
        words = [words[place] for place in order[: math.ceil(len(words) / KEEP)]]


def can_go_on(config: Config) -> bool:
    """True where a run that is trained longer ends as one that was planned so."""
    optimizer = config.optimizer
    is_constant = optimizer.schedule == "constant" and not optimizer.warmup_steps
    return is_constant and config.early_stopping.patience is None


def rungs(epochs: int) -> list[int]:
    """The epochs after which trials are compared: 1, 3, 9 of 9."""
    return sorted({max(1, epochs // KEEP**power) for power in range(3)})


def train_until(words: list[str], epochs: int, train: Train) -> float:
    """The best gain of a trial within so many epochs; trains what is missing. NaN when it failed."""
    config, run = trial_of(words)
    config.trainer["max_epochs"] = epochs
    planned, status = planned_epochs(run), run.read_status()
    stopped_early = run.state == "finished" and status.get("epoch", 0) < planned
    passed = planned > epochs or (planned == epochs and run.state == "finished") or stopped_early
    if not passed and math.isnan(train(config, run, planned > 0 and run.usable_checkpoint() is not None)):
        return math.nan
    return gain_within(run, epochs)


def planned_epochs(run: RunDir) -> int:
    """What the trial was last started for; 0 when it was not."""
    try:
        return int(read_settings(run.config)["trainer"]["max_epochs"])
    except (KeyError, TypeError, ValueError):
        return 0


def gain_within(run: RunDir, epochs: int) -> float:
    """The highest held-out gain after the epochs 1 .. `epochs`; NaN when there is none."""
    try:
        with open(run.probe, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return math.nan
    gains = [float(row["probe/val_gain"]) for row in rows if 0 < int(row["epoch"]) <= epochs]
    return max(gains, default=math.nan)
