"""Race trials: stop one that is behind the best by more than chance allows; it can be resumed.

After every epoch but its last, a trial is compared with the best finished trial of as many epochs, at that
epoch and on the same items of the same held-out images, by a paired t-test. A study makes many such looks,
and at each the rival is the best of several on these very images, so all comparisons that could be made are
counted, and each is made at ALPHA divided by their number (Bonferroni; Dunn 1961): the chance of stopping
any trial at an epoch at which it is truly not behind is at most ALPHA, however the comparisons depend on
each other. (Tests that spend ALPHA over growing samples, as the Hoeffding races of Maron & Moore 1994 do,
do not fit: every look sees all images.) What the test cannot know is whether a trial that is behind now
would have caught up.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import scipy.special
import torch

from ghibli.config.schema import Config, base_name, images_name
from ghibli.evaluation.gain import Probe, best_epoch, paired_difference
from ghibli.runs.find import all_runs
from ghibli.runs.folder import RunDir, read_checkpoint
from ghibli.runtime.errors import UserError
from ghibli.runtime.wording import number_of
from ghibli.sweeps.grid import settings_and_folder
from ghibli.sweeps.jobs import PAST_RUNS, Stopwatch, Work, progress

logger = logging.getLogger(__name__)

ALPHA = 0.05  # chance of stopping any trial of a study that is not behind
POWER = 0.8  # chance of finding the difference for which images are counted
POINTS = (1, 3)  # differences of the gain, in points, for which they are
MOST_IMAGES = 1_000_000
Judge = Callable[[list[Probe]], str | None]
"""History of a trial, as PairedProbe has it -> why it is stopped, or None."""
Train = Callable[[Config, RunDir, Judge], float]


@dataclass(frozen=True)
class Runner:
    """A trial that has finished, with what it scored after every epoch."""

    name: str
    epochs: int  # that were planned; early stopping may have ended it before
    history: list[Probe]  # starts with the untouched model

    def at(self, epoch: int) -> Probe:
        """Return the scores after an epoch, or after the last one before it."""
        return self.history[min(epoch, len(self.history) - 1)]

    @property
    def loss(self) -> float:
        """The held-out loss of the best epoch."""
        return self.history[best_epoch(self.history)].val.double().mean().item()


def comparisons(epochs: list[int]) -> int:
    """Count the comparisons of trials of so many epochs: with each earlier trial, at each epoch but the last.

    The rival of a look is one of them alone, but which one the same images decide.
    """
    return max(1, sum(number * (count - 1) for number, count in enumerate(epochs)))


def behind(losses: torch.Tensor, leaders: torch.Tensor, chance: float) -> bool:
    """Tell whether losses (P, K) are above a leader's on the same items by a one-sided paired t-test.

    Args:
        chance: of saying so when they are not, for normal differences of the P images.
    """
    difference, error = paired_difference(losses, leaders)
    count = len(losses)
    return count > 2 and difference > error * float(scipy.special.stdtrit(count - 1, 1 - chance))


def judge_by(finished: list[Runner], epochs: int, chance: float) -> Judge:
    """Return the judge of a trial of so many epochs, by the best finished trial with the same items."""

    def judge(history: list[Probe]) -> str | None:
        now, at = history[-1], len(history) - 1
        rivals = [
            one for one in finished
            if one.epochs == epochs and at < epochs and torch.equal(one.at(at).base_val, now.base_val)
        ]  # fmt: skip
        if at == 0 or not rivals:
            return None
        leader = min(rivals, key=lambda one: one.loss)
        if not behind(now.val, leader.at(at).val, chance):
            return None
        difference, error = paired_difference(now.val, leader.at(at).val)
        share = 100 / now.base_val.double().mean().item()
        return (
            f"stopped by sweep.race after epoch {at}, {share * difference:.1f} +- {share * error:.1f} points "
            f"of gain behind {leader.name}"
        )

    return judge


def images_needed(points: float, spread: float, chance: float) -> int:
    """Return how many held-out images it takes to find a difference by one look, with a chance of POWER.

    Args:
        points: the difference of the gain.
        spread: standard deviation over images of a difference between trials, in points.
        chance: as for behind.

    The power is that of the noncentral t, sought around the normal's count: far above it scipy answers NaN.
    """
    sum_of_quantiles = scipy.special.ndtri(1 - chance) + scipy.special.ndtri(POWER)
    normal = int(min(MOST_IMAGES, (sum_of_quantiles * spread / points) ** 2))

    def finds(count: int) -> bool:
        bound = scipy.special.stdtrit(count - 1, 1 - chance)
        missed = float(scipy.special.nctdtr(count - 1, points / spread * count**0.5, bound))
        return count > normal if math.isnan(missed) else missed < 1 - POWER

    counts = range(max(3, normal // 2), 2 * normal + 20)
    return counts[0] + bisect_left(counts, True, key=finds)


def spread_of(histories: list[list[Probe]]) -> float | None:
    """Return the standard deviation over images of the differences between runs, in points of gain.

    It is pooled over all pairs that were scored on the same items, each at its last epoch; None without any,
    or where all are equal.
    """
    squares = []
    for one, other in combinations([history[-1] for history in histories], 2):
        if torch.equal(one.base_val, other.base_val) and len(one.val) > 1:
            share = 100 / one.base_val.double().mean()
            squares.append(((one.val - other.val).double().mean(1) * share).var().item())
    return (sum(squares) / len(squares)) ** 0.5 if any(squares) else None


def history_of(run: RunDir) -> list[Probe]:
    """Read what a run scored after every epoch; empty if it has no checkpoint that can be read."""
    checkpoint = run.usable_checkpoint()
    if checkpoint is None:
        return []
    try:
        return [Probe(**probe) for probe in read_checkpoint(checkpoint)["probe"]]
    except (UserError, KeyError, TypeError):
        return []


def past_histories(config: Config) -> list[list[Probe]]:
    """Return the histories of the newest finished runs of this base and image set."""
    found: list[list[Probe]] = []
    for run in reversed(all_runs()):
        status = run.status.read()
        origin = (status.get("base"), status.get("images"))
        if status.get("state") == "finished" and origin == (
            base_name(config.model),
            images_name(config.data),
        ):
            found += [history] if len(history := history_of(run)) > 1 else []
        if len(found) == PAST_RUNS:
            break
    return found


def announcement(epochs: list[int], histories: list[list[Probe]]) -> list[str]:
    """Say how many comparisons there may be, and how many held-out images a difference needs."""
    count, spread = comparisons(epochs), spread_of(histories)
    lines = [
        f"{number_of(len(epochs), 'trial')}, {number_of(sum(epochs), 'epoch')} at most; up to "
        f"{number_of(count, 'comparison')}, each at a chance of {ALPHA / count:.2g} to stop a trial that is "
        f"not behind, {ALPHA:g} for all"
    ]
    if spread is None:
        return [*lines, "how many held-out images a difference needs is known after two runs of these images"]
    needs = " and ".join(
        f"{images_needed(points, spread, ALPHA / count)} for {number_of(points, 'point')}"
        for points in POINTS
    )
    return [
        *lines,
        f"to see a difference in one look it takes {needs} of gain (80 % power; runs of these images differ "
        f"by {spread:.1f} points from image to image); those runs had {len(histories[0][-1].val)}",
    ]


def race(trials: list[list[str]], train: Train) -> None:
    """Train the trials one after the other, and stop each as soon as it is behind.

    Args:
        trials: the overrides of each trial.

    Raises:
        UserError: a trial on several devices, of which one process alone could stop.
    """
    planned = [settings_and_folder(overrides) for overrides in trials]
    if any(config.trainer["devices"] != 1 for config, _ in planned):
        raise UserError("sweep.race=true trains on one device at a time: set trainer.devices=1")
    epochs = [int(config.trainer["max_epochs"]) for config, _ in planned]
    known = [history for _, run in planned if len(history := history_of(run)) > 1]
    for line in announcement(epochs, known if len(known) > 1 else past_histories(planned[0][0])):
        logger.info(line)
    common = set(trials[0]).intersection(*trials)
    names = [", ".join(word for word in overrides if word not in common) for overrides in trials]
    chance, finished = ALPHA / comparisons(epochs), list[Runner]()
    plan = [Work.of(config) for config, _ in planned]
    for number, (config, run) in enumerate(planned):
        logger.info("")
        logger.info(f"{progress(number, plan)}: {names[number]}")
        stopwatch = Stopwatch(plan[number])
        train(config, run, judge_by(finished, epochs[number], chance))
        stopwatch.stop()
        if run.status.state == "finished" and len(history := history_of(run)) > 1:
            finished.append(Runner(names[number], epochs[number], history))
        elif run.status.state == "interrupted":
            logger.info(str(run.status.read().get("reason")))
    trained = sum(max(0, len(history_of(run)) - 1) for _, run in planned)
    stopped = sum(run.status.state == "interrupted" for _, run in planned)
    logger.info(
        f"raced: {stopped} of {number_of(len(planned), 'trial')} stopped, {trained} of "
        f"{number_of(sum(epochs), 'epoch')} trained"
    )


def replay(histories: list[list[Probe]], chance: float | None = None) -> dict[str, Any]:
    """Race trials that were trained to the end, in their order, and say what would have been.

    Args:
        histories: of each trial, all on the same items.
        chance: of one look; None = as race.

    Returns:
        `stopped`: index -> epoch; `epochs`: how many were trained; `winner`: index of the best that finished.
    """
    epochs = [len(history) - 1 for history in histories]
    runners = [Runner(str(number), epochs[number], history) for number, history in enumerate(histories)]
    chance = ALPHA / comparisons(epochs) if chance is None else chance
    finished: list[Runner] = []
    stopped: dict[int, int] = {}
    for number, one in enumerate(runners):
        judge = judge_by(finished, one.epochs, chance)
        at = next((at for at in range(1, one.epochs) if judge(one.history[: at + 1]) is not None), None)
        if at is None:
            finished.append(one)
        else:
            stopped[number] = at
    trained = sum(stopped.get(number, count) for number, count in enumerate(epochs))
    best = min(finished, key=lambda one: one.loss)
    return {"stopped": stopped, "epochs": trained, "winner": int(best.name)}
