"""What each swept setting did to the gain, and how much of that the seed alone explains."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch

from ghibli.evaluation.gain import Gain, paired_gain
from ghibli.runs.settings import as_yaml
from ghibli.runtime.wording import number_of
from ghibli.sweeps.trials import Trial, setting_values, varied


def without_duplicates(trials: list[Trial]) -> list[Trial]:
    """Keep one trial for each full set of settings: a copy in another folder is no second result."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(settings_key(trial.settings), trial)
    return list(first.values())


def settings_key(settings: dict[str, Any]) -> str:
    """Return a text that is the same for the same settings."""
    return json.dumps(settings, sort_keys=True, default=str)


@dataclass(frozen=True)
class Effect:
    """What one setting changes: the mean over pairs of trials that differ in nothing else."""

    key: str
    low: Any
    high: Any
    pairs: int
    difference: Gain  # gain at `high` minus gain at `low`, its error over images
    each: tuple[float, ...] = ()  # the same of each pair

    @property
    def error_over_pairs(self) -> float:
        """The standard error of the mean over pairs: how much it depends on the rest, and on luck."""
        return float(np.std(self.each, ddof=1) / len(self.each) ** 0.5) if len(self.each) > 1 else math.nan

    @property
    def matters(self) -> bool:
        """True if the 95 % interval does not contain 0."""
        return self.difference.low > 0 or self.difference.high < 0

    def __str__(self) -> str:
        value, error = 100 * self.difference.value, 100 * self.difference.standard_error
        low, high = 100 * self.difference.low, 100 * self.difference.high
        change = f"{self.key} {as_yaml(self.low)} -> {as_yaml(self.high)}"
        size = f"{value:+.2f} +- {error:.2f} points of gain, 95 % {low:+.2f} .. {high:+.2f}"
        doubt = "" if self.matters else " (indistinguishable from zero)"
        return f"{change}: {size}, {number_of(self.pairs, 'pair')}{self.spread}{doubt}"

    @property
    def spread(self) -> str:
        """What the pairs say one by one: a mean can hide that a setting acts differently beside others."""
        if len(self.each) < 2:
            return ""
        least, most = 100 * min(self.each), 100 * max(self.each)
        return f" from {least:+.2f} to {most:+.2f} (mean +- {100 * self.error_over_pairs:.2f} over pairs)"


def effects(trials: list[Trial]) -> list[Effect]:
    """Compute the effect of every varied setting, between neighbouring values, largest first.

    The standard error is over the choice of held-out images (jackknife); what another seed would change
    is not part of it. Repeats of the best trials are left out: they would count one corner of the grid most.
    """
    scored = without_duplicates([trial for trial in trials if trial.best is not None and not trial.repeats])
    found = [effect for key in varied(scored) if key != "seed" for effect in effects_of(key, scored)]
    return sorted(found, key=lambda effect: -abs(effect.difference.value))


def effects_of(key: str, trials: list[Trial]) -> Iterator[Effect]:
    """Yield the effects between neighbouring values of one setting, as far as there are pairs of trials."""
    values = setting_values(key, trials)
    others = [name for name in varied(trials) if name != key]
    for low, high in zip(values, values[1:], strict=False):
        pairs = [
            (a, b)
            for a in trials
            for b in trials
            if a.settings.get(key) == low
            and b.settings.get(key) == high
            and all(a.settings.get(name) == b.settings.get(name) for name in others)
            and torch.equal(a.scores.base_val, b.scores.base_val)
        ]
        if pairs:
            each = tuple(gain_difference([pair]).value for pair in pairs)
            yield Effect(key, low, high, len(pairs), gain_difference(pairs), each)


@dataclass(frozen=True)
class SeedNoise:
    """How much a new seed alone changes the gain."""

    deviation: float  # standard deviation of the gain among trials that differ only in the seed
    freedom: int  # degrees of freedom: repeats beyond the first, over all settings that were repeated
    settings: int  # how many settings were repeated

    @property
    def band(self) -> float:
        """Two single trials must differ by more than this for the difference to be credible (95 %)."""
        return float(scipy.stats.t.ppf(0.975, self.freedom) * 2**0.5 * self.deviation)

    def __str__(self) -> str:
        repeats = f"{number_of(self.freedom, 'repeat')} of {number_of(self.settings, 'setting')}"
        return (
            f"seed: a new one alone moves the gain by {100 * self.deviation:.2f} points (standard "
            f"deviation, {repeats}); two single trials that differ by less than {100 * self.band:.2f} points "
            "cannot be told apart"
        )


def repeated_trials(trials: list[Trial]) -> list[list[Trial]]:
    """Return the groups of two or more scored trials that differ in nothing but the seed."""
    groups: dict[str, list[Trial]] = {}
    for trial in without_duplicates([trial for trial in trials if trial.gain is not None]):
        rest = settings_key({key: value for key, value in trial.settings.items() if key != "seed"})
        groups.setdefault(rest, []).append(trial)
    return [group for group in groups.values() if len(group) > 1]


def seed_noise(trials: list[Trial]) -> SeedNoise | None:
    """Compute the pooled spread among trials that differ only in the seed; None without such trials."""
    repeated = [[trial.scores.val_gain.value for trial in group] for group in repeated_trials(trials)]
    if not repeated:
        return None
    freedom = sum(len(gains) - 1 for gains in repeated)
    squares = sum(np.var(gains) * len(gains) for gains in repeated)
    return SeedNoise(float((squares / freedom) ** 0.5), freedom, len(repeated))


def gain_difference(pairs: list[tuple[Trial, Trial]]) -> Gain:
    """Compute the mean of the second trial's gain minus the first's, with its jackknife error over images.

    Pairs that share the base's scores form a group, whose mean difference is the gain of
    base + mean(second - first). Groups with other bases or items may share images, so their errors are
    added as if fully correlated, which never underestimates the total.
    """
    groups: list[list[tuple[Trial, Trial]]] = []
    for pair in pairs:
        same = [
            group for group in groups if torch.equal(group[0][0].scores.base_val, pair[0].scores.base_val)
        ]
        if same:
            same[0].append(pair)
        else:
            groups.append([pair])
    found = [difference_within(group) for group in groups]
    shares = [len(group) / len(pairs) for group in groups]
    value = sum(share * gain.value for share, gain in zip(shares, found, strict=True))
    error = sum(share * gain.standard_error for share, gain in zip(shares, found, strict=True))
    return Gain(value, error, freedom=min(gain.freedom for gain in found))


def difference_within(pairs: list[tuple[Trial, Trial]]) -> Gain:
    """Compute gain_difference for pairs that all have the same base's scores."""
    base = pairs[0][0].scores.base_val.double()
    change = torch.stack([b.scores.val.double() - a.scores.val.double() for a, b in pairs]).mean(0)
    return paired_gain(base + change, base)
