"""Which trials of a study gain most for what they forget of the base: the front of best trade-offs."""

import math

from ghibli.evaluation.gain import Gain
from ghibli.sweeps.trials import Trial


def priced(trials: list[Trial]) -> list[tuple[Trial, Gain, Gain]]:
    """Return (trial, gain, price) of the trials that have both."""
    found = [(trial, trial.gain, trial.price) for trial in trials]
    return [(trial, gain, price) for trial, gain, price in found if gain is not None and price is not None]


def front(trials: list[Trial]) -> list[tuple[Trial, Gain, Gain]]:
    """Return (trial, gain, price) of the Pareto front, the lowest price first.

    No trial has both a higher gain and a lower price than one of them; errors are not considered.
    """
    found, highest = [], -math.inf
    for trial, gain, price in sorted(priced(trials), key=lambda one: (one[2].value, -one[1].value)):
        if gain.value > highest:
            found.append((trial, gain, price))
            highest = gain.value
    return found


def front_line(trials: list[Trial]) -> str:
    """Name the front by the places in the ranking; empty for fewer than two trials with a price.

    Args:
        trials: in the order of the ranking.
    """
    if len(priced(trials)) < 2:
        return ""
    places = {id(trial): place for place, trial in enumerate(trials, start=1)}
    listed = [
        f"{places[id(trial)]} (gain {gain.signed_size}, price {price.signed_size})"
        for trial, gain, price in front(trials)
    ]
    return f"best trade-offs, the lowest price first: {'; '.join(listed)}"
