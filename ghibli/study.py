"""A study's trials, read from their folders, and which settings matter."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
import yaml

from ghibli.run_dir import RunDir
from ghibli.trial import flat, shown, that_count
from ghibli.validation import Gain, Probe, best_epoch, paired_gain
from ghibli.whole_files import is_whole

REPEAT = "+seed="  # in the folder of a trial that was repeated with another seed


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    run: RunDir
    settings: dict[str, Any]  # dotted key -> value, all that can change a result
    status: dict[str, Any]
    best: Probe | None  # scores of the best epoch; None for one that has not finished, or was refused

    @property
    def gain(self) -> Gain | None:
        """How much better than the base its best epoch is."""
        return None if self.best is None else self.best.val_gain

    @property
    def verdict(self) -> str:
        """What became of it: the doctor's findings, or why it has no result."""
        if self.run.no_result.exists():
            return f"failed: {self.run.no_result.read_text()}"
        if self.run.state != "finished":
            reason = self.status.get("reason")
            return f"{self.run.state}: {reason}" if reason else self.run.state
        return ", ".join(finding["name"] for finding in self.status.get("findings", []))

    @property
    def repeats(self) -> bool:
        """True for one that repeats another trial with another seed."""
        return REPEAT in self.run.path.name

    @property
    def distance(self) -> tuple[float, float, str] | None:
        """(kernel distance, its standard error, `ddim 7.5`) of its best cell; None when not evaluated."""
        try:
            cells = self.run.read_evaluation()["models"]["run"]
            found = [(*cell["kernel"], f"{cell['sampler']} {cell['guidance']:g}") for cell in cells]
        except (KeyError, TypeError, ValueError):
            return None
        return min(found, default=None)

    @property
    def grid(self) -> Path | None:
        """The last picture grid."""
        return max(self.run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime_ns, default=None)

    @property
    def minutes(self) -> float | None:
        """From start to end; None for a resumed trial, as nothing says how long it did not run."""
        times = self.status.get("started"), self.status.get("ended")
        if None in times or len(self.status.get("starts", [])) > 1:
            return None
        started, ended = map(datetime.fromisoformat, times)
        return (ended - started).total_seconds() / 60


def read_trials(folder: Path) -> list[Trial]:
    """Every trial below a study's folder, the best first, those without a gain last."""
    trials = [read_trial(RunDir(path.parent)) for path in sorted(folder.glob("*/status.json"))]
    found = [trial for trial in trials if trial is not None]
    return sorted(found, key=lambda trial: -(trial.gain.value if trial.gain else -float("inf")))


def read_trial(run: RunDir) -> Trial | None:
    """One trial; None where config.yaml cannot be read."""
    try:
        content = yaml.safe_load(run.config.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return None
    is_result = run.state == "finished" and not run.no_result.exists()  # nor is what a trial under way has
    best = best_probe(run) if is_result else None
    return Trial(run, that_count(flat(content)), run.read_status(), best)


def best_probe(run: RunDir) -> Probe | None:
    """The scores of the best epoch, from best.ckpt; None without a whole one."""
    if not is_whole(run.best_checkpoint):
        return None
    stored = torch.load(run.best_checkpoint, weights_only=True, map_location="cpu")["probe"]
    history = [Probe(**probe) for probe in stored]
    return history[best_epoch(history)] if len(history) > 1 else None


def varied(trials: list[Trial]) -> list[str]:
    """The settings that are not the same in all trials, but for those that follow another one."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    several = [key for key in keys if len({str(trial.settings.get(key)) for trial in trials}) > 1]
    return [key for key in several if key != "lora.alpha" or not alpha_follows(trials)]


def alpha_follows(trials: list[Trial]) -> bool:
    """True where lora.alpha is the same multiple of lora.rank in all trials."""
    pairs = [(trial.settings.get("lora.alpha"), trial.settings.get("lora.rank")) for trial in trials]
    return None not in sum(pairs, ()) and len({round(alpha / rank, 9) for alpha, rank in pairs}) == 1


def levels(key: str, trials: list[Trial]) -> list[Any]:
    """The values of a setting, each once, in order."""
    values = {str(trial.settings.get(key)): trial.settings.get(key) for trial in trials}
    return sorted(values.values(), key=order)


def distinct(trials: list[Trial]) -> list[Trial]:
    """One trial for each full settings: the same again in another folder is no second result."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(as_key(trial.settings), trial)
    return list(first.values())


def as_key(settings: dict[str, Any]) -> str:
    """The same words for the same settings."""
    return json.dumps(settings, sort_keys=True, default=str)


@dataclass(frozen=True)
class Effect:
    """What one setting changes: the mean over pairs of trials that differ in nothing else."""

    key: str
    low: Any
    high: Any
    pairs: int
    difference: Gain  # gain at `high` minus gain at `low`

    @property
    def matters(self) -> bool:
        """The 95 % interval does not hold 0."""
        return self.difference.low > 0 or self.difference.high < 0

    def __str__(self) -> str:
        value, error = 100 * self.difference.value, 100 * self.difference.standard_error
        low, high = 100 * self.difference.low, 100 * self.difference.high
        change = f"{self.key} {shown(self.low)} -> {shown(self.high)}"
        size = f"{value:+.2f} +- {error:.2f} points of gain, 95 % {low:+.2f} .. {high:+.2f}"
        word = "" if self.matters else " (not told apart from nothing)"
        return f"{change}: {size}, {number_of(self.pairs, 'pair')}{word}"


def number_of(count: int, word: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{count} {word}{'s' * (count != 1)}"


def effects(trials: list[Trial]) -> list[Effect]:
    """The effect of every varied setting, between neighbouring values, largest first.

    The error is that of the choice of held-out pictures (jackknife); what another seed would change
    is not in it.
    """
    scored = distinct([trial for trial in trials if trial.best is not None])
    found = [effect for key in varied(scored) if key != "seed" for effect in effects_of(key, scored)]
    return sorted(found, key=lambda effect: -abs(effect.difference.value))


def effects_of(key: str, trials: list[Trial]) -> Iterator[Effect]:
    """Effects of one setting's neighbouring values, where there are pairs."""
    values = levels(key, trials)
    others = [name for name in varied(trials) if name != key]
    for low, high in zip(values, values[1:], strict=False):
        pairs = [
            (a, b)
            for a in trials
            for b in trials
            if a.settings.get(key) == low
            and b.settings.get(key) == high
            and all(a.settings.get(name) == b.settings.get(name) for name in others)
            and torch.equal(a.best.base_val, b.best.base_val)
        ]
        if pairs:
            yield Effect(key, low, high, len(pairs), gain_difference(pairs))


def order(value: Any) -> tuple[bool, Any]:
    """Sorts numbers by size and puts words behind them."""
    is_word = not isinstance(value, int | float)
    return is_word, str(value) if is_word else value


@dataclass(frozen=True)
class SeedNoise:
    """What another seed alone changes."""

    deviation: float  # of the gain among trials that differ in the seed only
    freedom: int  # repeats beyond the first, over all settings that were repeated
    settings: int

    @property
    def band(self) -> float:
        """Two single trials must differ by more than this before the difference can be believed (95 %)."""
        return float(scipy.stats.t.ppf(0.975, self.freedom) * 2**0.5 * self.deviation)

    def __str__(self) -> str:
        repeats = f"{number_of(self.freedom, 'repeat')} of {number_of(self.settings, 'setting')}"
        return (
            f"seed: another one alone moves the gain by {100 * self.deviation:.2f} points (standard "
            f"deviation, {repeats}); two single trials that differ by less than {100 * self.band:.2f} points "
            "cannot be told apart"
        )


def seed_noise(trials: list[Trial]) -> SeedNoise | None:
    """The spread among trials that differ in the seed alone, pooled; None without such trials."""
    groups: dict[str, list[float]] = {}
    for trial in distinct([trial for trial in trials if trial.gain is not None]):
        rest = as_key({key: value for key, value in trial.settings.items() if key != "seed"})
        groups.setdefault(rest, []).append(trial.gain.value)
    repeated = [gains for gains in groups.values() if len(gains) > 1]
    if not repeated:
        return None
    freedom = sum(len(gains) - 1 for gains in repeated)
    squares = sum(np.var(gains) * len(gains) for gains in repeated)
    return SeedNoise(float((squares / freedom) ** 0.5), freedom, len(repeated))


def gain_difference(pairs: list[tuple[Trial, Trial]]) -> Gain:
    """Mean of the second's gain minus the first's, with its jackknife error over pictures.

    Pairs that share the base's scores are one group, whose mean difference is the gain of
    base + mean(second - first). Groups of other bases or items may share pictures, so their errors
    are added as if they went together, which never makes them too small.
    """
    groups: list[list[tuple[Trial, Trial]]] = []
    for pair in pairs:
        same = [group for group in groups if torch.equal(group[0][0].best.base_val, pair[0].best.base_val)]
        if same:
            same[0].append(pair)
        else:
            groups.append([pair])
    found = [difference_within(group) for group in groups]
    shares = [len(group) / len(pairs) for group in groups]
    value = sum(share * gain.value for share, gain in zip(shares, found, strict=True))
    error = sum(share * gain.standard_error for share, gain in zip(shares, found, strict=True))
    return Gain(value, error)


def difference_within(pairs: list[tuple[Trial, Trial]]) -> Gain:
    """gain_difference of pairs that all have the same base's scores."""
    base = pairs[0][0].best.base_val.double()
    change = torch.stack([b.best.val.double() - a.best.val.double() for a, b in pairs]).mean(0)
    return paired_gain(base + change, base)
