"""What the best trial of a study is worth on images, and with seeds, that did not choose it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ghibli.evaluation.gain import Gain, gain_over_seeds, paired_difference, paired_gain
from ghibli.evaluation.statistics import crossed_mean
from ghibli.runtime.wording import number_of
from ghibli.sweeps.effects import settings_key, without_duplicates
from ghibli.sweeps.trials import Trial

FEWEST_IMAGES = 8  # held out; in halves of fewer than four nothing is chosen
PAIRED_SEEDS = 2  # that the best two must share for their order: the fewest that have a spread


@dataclass(frozen=True)
class Winner:
    """The gain of the best of several trials, and what is left of it without the luck of being the best."""

    trials: int  # among which was chosen
    shown: Gain  # on all held-out images, which also chose the trial
    fresh: Gain  # on the half that did not choose it, of both halves

    def __str__(self) -> str:
        return (
            f"the best gain, {self.shown.signed_size}, was chosen among {self.trials} trials on the images "
            "that measure it: the trial that one half of the held-out images chooses gains "
            f"{self.fresh.signed_size} on the other half"
        )


def winner(trials: list[Trial]) -> Winner | None:
    """Choose the best trial on one half of the held-out images and score it on the other, both ways round.

    The mean of both is free of the winner's curse: choosing the largest of several gains, each with an
    error, chooses a lucky error too. Each trial's epoch was chosen on all images; that is not undone here.

    Returns:
        None for fewer than two trials that were scored on the same items, or for too few held-out images.
    """
    scored = without_duplicates([trial for trial in trials if trial.best is not None and not trial.repeats])
    if not scored:
        return None
    first = max(scored, key=lambda trial: trial.scores.val_gain.value)
    base = first.scores.base_val
    same = [trial for trial in scored if torch.equal(trial.scores.base_val, base)]
    if len(same) < 2 or len(base) < FEWEST_IMAGES:
        return None
    losses = torch.empty_like(base)
    for chosen_on, judged_on in ((0, 1), (1, 0)):
        best = min(same, key=lambda trial: trial.scores.val[chosen_on::2].double().sum().item())
        losses[judged_on::2] = best.scores.val[judged_on::2]
    return Winner(len(same), first.scores.val_gain, paired_gain(losses, base))


@dataclass(frozen=True)
class Seeded:
    """The gain of some settings with other seeds than that of the trial which was among the best."""

    place: int  # of that trial: 1 is the best
    seeds: int
    gain: Gain  # mean over these seeds; its error is over images and over seeds

    def __str__(self) -> str:
        which = {1: "the best trial", 2: "the second trial"}.get(self.place, f"trial {self.place}")
        return (
            f"{which}'s settings with {number_of(self.seeds, 'other seed')}: "
            f"{self.gain.signed_size}, an error over images and seeds"
        )


@dataclass(frozen=True)
class Order:
    """How far apart the settings of the best two trials are, with seeds that chose neither."""

    seeds: int
    ahead: Gain  # the best trial's gain minus the second's; its error is over images and over seeds

    def __str__(self) -> str:
        points = f"{100 * self.ahead.value:+.2f} +- {100 * self.ahead.standard_error:.2f} points"
        low, high = 100 * self.ahead.low, 100 * self.ahead.high
        if low > 0 or high < 0:
            verdict = "the first is better" if low > 0 else "the second is better"
        else:
            verdict = "which is better is open"
        return (
            f"the best two with {number_of(self.seeds, 'other seed')} in pairs: {points} (95 % {low:+.2f} to "
            f"{high:+.2f}), {verdict}"
        )


def by_settings(trials: list[Trial]) -> list[list[Trial]]:
    """Return groups of trials that differ in the seed alone, each with its best first, the best group first.

    What `sweep.repeats` trained is never first in its group: it was not there to be chosen. Only trials that
    were scored on the same items as the best are in a group.
    """
    scored = [trial for trial in trials if trial.best is not None]
    ordered = sorted(scored, key=lambda trial: (trial.repeats, -trial.scores.val_gain.value))
    groups: dict[str, list[Trial]] = {}
    for trial in without_duplicates(ordered):
        if torch.equal(trial.scores.base_val, ordered[0].scores.base_val):
            groups.setdefault(without_seed(trial), []).append(trial)
    return [group for group in groups.values() if not group[0].repeats]


def without_seed(trial: Trial) -> str:
    """Return a text that is the same for trials which differ in the seed alone."""
    return settings_key({key: value for key, value in trial.settings.items() if key != "seed"})


def shared_seeds(groups: list[list[Trial]]) -> list[int]:
    """Return the seeds that the best two groups of by_settings share, without those that chose them."""
    first, second = ({trial.settings["seed"] for trial in others} for _, *others in groups[:2])
    return sorted(first & second)


def seeded(trials: list[Trial]) -> list[Seeded]:
    """Return the gain of the best settings with other seeds, for all that have two or more (`sweep.repeats`).

    The seed that was the best of many trials was partly lucky and is left out.
    """
    found = []
    for place, (_, *others) in enumerate(by_settings(trials), start=1):
        if len(others) >= 2 and len(others[0].scores.val) >= 2:
            base, losses = others[0].scores.base_val, torch.stack([one.scores.val for one in others])
            found.append(Seeded(place, len(others), gain_over_seeds(losses, base)))
    return found


def order(trials: list[Trial]) -> Order | None:
    """Compare the settings of the best two trials over the other seeds that both have.

    Returns:
        None for fewer than two such seeds, or fewer than two held-out images.
    """
    groups = by_settings(trials)
    if len(groups) < 2:
        return None
    first, second = ({trial.settings["seed"]: trial for trial in others} for _, *others in groups[:2])
    shared = shared_seeds(groups)
    base = groups[0][0].scores.base_val
    if len(shared) < PAIRED_SEEDS or len(base) < 2:
        return None
    pairs = [second[seed].scores.val.double() - first[seed].scores.val.double() for seed in shared]
    found = crossed_mean(torch.stack(pairs).sum(2) / base.double().sum(1).mean())
    return Order(len(shared), Gain(found.value, found.standard_error, freedom=found.freedom))


def is_close(trials: list[Trial]) -> bool:
    """Tell whether the order of the best two settings may be chance: a paired difference below two errors.

    Not if both were trained with the same PAIRED_SEEDS already, which neither was chosen with.
    """
    groups = by_settings(trials)
    if len(groups) < 2 or len(shared_seeds(groups)) >= PAIRED_SEEDS:
        return False
    difference, error = paired_difference(groups[1][0].scores.val, groups[0][0].scores.val)
    return difference < 2 * error


def close_second(trials: list[Trial]) -> str | None:
    """Say that the order of the best two trials may be chance, and what tells; None where it is clear."""
    if not is_close(trials):
        return None
    return (
        "the second trial is within two errors of the best, and another seed is not in these errors: "
        "sweep.repeats=3 trains both with three more"
    )


def winner_lines(trials: list[Trial], is_study: bool = True) -> Iterator[str]:
    """Yield what is to be expected of the best trials, as far as they tell.

    Args:
        is_study: sweep.py trained them, so it can repeat them.
    """
    advice = close_second(trials) if is_study else None
    for line in (winner(trials), *seeded(trials), order(trials), advice):
        if line is not None:
            yield str(line)
