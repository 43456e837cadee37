"""What the best trial of a study is worth on images that did not choose it."""

from dataclasses import dataclass

import torch

from ghibli.evaluation.gain import Gain, paired_gain
from ghibli.sweeps.effects import without_duplicates
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
