"""What the best trial of a study is worth on images, and with seeds, that did not choose it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ghibli.evaluation.gain import Gain, gain_over_seeds, paired_difference, paired_gain
from ghibli.sweeps.effects import number_of, settings_key, without_duplicates
from ghibli.sweeps.trials import Trial

FEWEST_IMAGES = 8  # held out; in halves of fewer than four nothing is chosen


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
    scored = without_duplicates([trial for trial in trials if trial.best is not None])
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
    """The gain of the best trial's settings with other seeds, which did not choose them."""

    seeds: int
    gain: Gain  # mean over these seeds; its error is over images and over seeds

    def __str__(self) -> str:
        return (
            f"the best trial's settings with {number_of(self.seeds, 'other seed')}: "
            f"{self.gain.signed_size}, an error over images and seeds"
        )


def seeded(trials: list[Trial]) -> Seeded | None:
    """Return the gain of the best trial's settings with other seeds (`sweep.repeats`).

    The seed that was the best of many trials was partly lucky and is left out.

    Returns:
        None for fewer than two repeats of the best trial on the same items.
    """
    scored = without_duplicates([trial for trial in trials if trial.best is not None])
    first = max((t for t in scored if not t.repeats), key=lambda t: t.scores.val_gain.value, default=None)
    if first is None:
        return None
    base = first.scores.base_val
    again = [
        trial for trial in scored
        if trial.repeats and without_seed(trial) == without_seed(first)
        and torch.equal(trial.scores.base_val, base)
    ]  # fmt: skip
    if len(again) < 2 or len(base) < 2:
        return None
    losses = torch.stack([trial.scores.val for trial in again])
    return Seeded(len(again), gain_over_seeds(losses, base))


def without_seed(trial: Trial) -> str:
    """Return a text that is the same for trials which differ in the seed alone."""
    return settings_key({key: value for key, value in trial.settings.items() if key != "seed"})


def is_close(trials: list[Trial]) -> bool:
    """Tell whether the order of the best two trials may be chance: a paired difference below two errors.

    Not if the best was repeated already, or if the two differ in the seed alone.
    """
    first_attempts = [trial for trial in trials if trial.best is not None and not trial.repeats]
    best = sorted(without_duplicates(first_attempts), key=lambda trial: -trial.scores.val_gain.value)[:2]
    if len(best) < 2 or seeded(trials) is not None:
        return False
    if without_seed(best[0]) == without_seed(best[1]):
        return False
    if not torch.equal(best[0].scores.base_val, best[1].scores.base_val):
        return False
    difference, error = paired_difference(best[1].scores.val, best[0].scores.val)
    return difference < 2 * error


def close_second(trials: list[Trial]) -> str | None:
    """Say that the order of the best two trials may be chance, and what tells; None where it is clear."""
    if not is_close(trials):
        return None
    return (
        "the second trial is within two errors of the best, and another seed is not in these errors: "
        "sweep.repeats=3 trains both with three more"
    )


def winner_lines(trials: list[Trial]) -> Iterator[str]:
    """Yield what is to be expected of the best trial, as far as the study tells."""
    for line in (winner(trials), seeded(trials), close_second(trials)):
        if line is not None:
            yield str(line)
