"""What the page says in words: the verdict on one run and on several, computed from their files."""

import math
import re

from markupsafe import Markup, escape
from scipy.stats import norm

from ghibli.evaluation.diagnosis import NOTHING
from ghibli.evaluation.gain import Gain
from ghibli.report.run_data import RunData, gain_of
from ghibli.report.svg import tag
from ghibli.sweeps.effects import Effect, SeedNoise, gain_difference, number_of

MOST_ENDINGS = 5  # unfinished runs of several that the verdict names
Scan = list[tuple[float, float, float]]  # (sampling scale / training guidance, kernel distance, its error)


def typeset(text: object) -> str:
    """The project's plain numbers as print has them: a plus-minus sign, a true minus, nothing torn apart."""
    plain = (
        str(text).replace(" +- ", "\u00a0\u00b1\u00a0").replace(" %", "\u00a0%").replace(" -> ", " \u2192 ")
    )
    return re.sub(r"(?<![\w.\-/=])-(?=\d)", "\u2212", plain)


def prose(text: object) -> Markup:
    """A sentence for the page: typeset, and what stands between backticks as code; all of it escaped."""
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:  # an odd backtick is only a backtick
        return escape(typeset(text))
    parts = [tag("code", piece) if k % 2 else escape(typeset(piece)) for k, piece in enumerate(pieces)]
    return Markup("").join(parts)


def percent(gain: Gain | None) -> str:
    """`63.2 % +- 0.9 %` with its sign where it is below 0; `-` without a gain."""
    return "-" if gain is None else gain.signed_size


def points(gain: Gain) -> str:
    """`+1.23 +- 0.20 points` for a difference of two gains."""
    return f"{100 * gain.value:+.2f} +- {100 * gain.standard_error:.2f} points"


def verdict(part: RunData) -> list[str]:
    """What became of one run, the most important first."""
    return [line for line in (learned(part), epochs(part), by_heart(part), ending(part)) if line]


def learned(part: RunData) -> str:
    """Whether it learned, by how much and with which error."""
    gain = part.gain
    if part.trial.settings.get("finetune") == "none":
        return "Nothing was trained (finetune=none): this run only measures the untouched base."
    if gain is None:
        return "No epoch is finished yet, so nothing can be said about learning."
    if math.isnan(gain.standard_error):
        return f"It is {gain}; there is one held-out image, so this has no error and proves nothing."
    if gain.low > 0 and gain.value >= NOTHING:
        return f"It learned: {gain}."
    if gain.high < 0:
        return f"It did not learn: even at its best it is {gain}."
    return f"It learned nothing that stands out from chance: the gain is {percent(gain)}."


def epochs(part: RunData) -> str | None:
    """Which epoch is the best, and how the last one compares."""
    if part.best is None:
        return None
    best, last, planned = part.best_epoch, part.probe[-1], part.trial.settings.get("trainer.max_epochs")
    count = int(last["epoch"])
    early = isinstance(planned, int) and count < planned and part.state == "finished"
    stopped = f" Early stopping ended it before epoch {planned}." if early else ""
    if count == 1:
        return f"It has one epoch.{stopped}"
    if not math.isfinite(gain_of(last).value):
        return f"Epoch {best} of {count} is the best; the last one's gain is no number."
    if best < count:
        lost = gain_of(part.best).value - gain_of(last).value
        return f"Epoch {best} of {count} is the best; the last is {100 * lost:.1f} points below it.{stopped}"
    added = gain_of(last).value - gain_of(part.probe[-2]).value
    return f"The last epoch, {count}, is the best and added {100 * added:.1f} points.{stopped}"


def by_heart(part: RunData) -> str | None:
    """Whether it learned its training images by heart."""
    if part.best is None:
        return None
    if any(finding["name"] == "overfitting" for finding in part.findings):
        return "It overfits: held-out images got worse while training images got better."
    held_out, training = gain_of(part.probe[-1]), gain_of(part.probe[-1], "train")
    gap, error = training.value - held_out.value, math.hypot(training.standard_error, held_out.standard_error)
    if gap > 2 * error:
        return (
            f"Training images gain more ({percent(training)}) than held-out ones ({percent(held_out)}): "
            "part of it is learning by heart, though the doctor saw no overfitting."
        )
    if gap <= 2 * error:
        return f"No sign of overfitting: training images gain as much ({percent(training)})."
    return None


def ending(part: RunData) -> str | None:
    """Why it is not finished, and what to do; None for a finished run."""
    if part.state == "finished":
        return None
    status = part.trial.status
    if part.state == "running":
        return f"It is still running: the page shows it as of {moment(status.get('updated')) or 'its start'}."
    reason = str(status.get("reason") or "no reason was noted")
    words = {
        "failed": f"It failed: {reason}.",
        "interrupted": f"It was stopped: {reason}.",
        "killed": "It was killed: its status says running, but its process is gone.",
    }
    unknown = "How it ended is not known: status.json is missing or damaged."
    return f"{words.get(part.state, unknown)} {next_step(part)}"


def moment(time: object) -> str | None:
    """An ISO time in UTC as one reads it."""
    return None if time is None else str(time).replace("T", " ").replace("+00:00", " UTC")


def next_step(part: RunData) -> str:
    """How an unfinished run goes on."""
    if part.run.usable_checkpoint() is not None:
        return f"`python train.py resume={part.run.path}` goes on where it stopped."
    command = part.trial.status.get("command")
    again = f" with `python {command}`" if command else ""
    return f"It left no whole checkpoint to go on from: start it again{again}."


def study_verdict(runs: list[tuple[str, RunData]], found: list[Effect], noise: SeedNoise | None) -> list[str]:
    """What came out of several runs, ranked best first."""
    parts = [part for _, part in runs]
    states = [part.state for part in parts]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    ranked = [part for part in parts if part.gain is not None]
    if not ranked:
        return [f"No run of {len(parts)} has finished an epoch yet, so there is nothing to rank ({counts})."]
    best = next(label for label, part in runs if part is ranked[0])
    lines = [f"The best run ({best}) is {ranked[0].gain}.", *ahead(ranked)]
    better = sum(part.gain.low > 0 for part in ranked)
    worse = sum(part.gain.high < 0 for part in ranked)
    groups = ((better, "learned"), (worse, "got worse"), (len(ranked) - better - worse, "show neither"))
    lines.append(f"{', '.join(f'{count} {word}' for count, word in groups if count)}; {counts}.")
    strong = [effect for effect in found if effect.matters]
    if strong:
        lines.append(f"What changes most: {strong[0]}.")
    elif found:
        lines.append("No setting changes the gain by more than its error.")
    if noise is not None:
        lines.append(f"Of the {noise}.")
    endings = [f"{label}: {decapitalised(said)}" for label, part in runs if (said := ending(part))]
    return lines + endings[:MOST_ENDINGS]


def decapitalised(sentence: str) -> str:
    """A sentence as it stands after a colon."""
    return sentence[:1].lower() + sentence[1:]


def ahead(ranked: list[RunData]) -> list[str]:
    """By how much the best run is ahead of the next, in pairs where their images are the same."""
    if len(ranked) < 2:
        return []
    first, second = ranked[0].trial.best, ranked[1].trial.best
    if first is None or second is None or not first.base_val.equal(second.base_val):
        return ["The first two were not scored on the same held-out images, so their gap has no error."]
    lead = gain_difference([(ranked[1].trial, ranked[0].trial)])
    if lead.low > 0 and lead.value >= NOTHING:
        return [f"The first is ahead of the second by {points(lead)} of gain, in pairs."]
    return [f"The first two cannot be told apart: they differ by {points(lead)} of gain, in pairs."]


def copies(copying: float, base: float | None) -> str:
    """How near samples come to training images, in words."""
    beside = "" if base is None else f" (the untouched base: {base:.2f})"
    amount = f"{copying:.2f} of the distance that unseen real images have{beside}"
    if copying >= 0.9:
        return f"no sign of copies: the nearest training image is at {amount}"
    if copying >= 0.5:
        return f"nearer to training images than unseen real ones are: the nearest is at {amount}"
    return f"close to copies: the nearest training image is at {amount}"


def rule_holds(ordinary: Scan, guided: Scan) -> tuple[bool, str] | None:
    """Whether a guided training sampled at s scores as the ordinary one at s / w; None without an overlap.

    The ordinary curve is read off between its points; errors are taken as independent, and with m
    points the bar is that of one test in m (Bonferroni).
    """
    ordinary = sorted(ordinary)
    shared = [point for point in guided if ordinary and ordinary[0][0] <= point[0] <= ordinary[-1][0]]
    if not shared:
        return None
    bar = norm.ppf(1 - 0.025 / len(shared))
    gaps = [(x, y - at(ordinary, x)[0], math.hypot(error, at(ordinary, x)[1])) for x, y, error in shared]
    apart = [gap for gap in gaps if abs(gap[1]) > bar * gap[2]]
    where = f"in the {number_of(len(shared), 'point')} they share"
    if not apart:
        return True, f"{where} nothing contradicts the rule"
    x, gap, error = max(apart, key=lambda one: abs(one[1]) / one[2])
    return False, (
        f"the rule does not hold: {where}, {len(apart)} differ by more than chance, most clearly at s / w = "
        f"{x:.3g}, where the guided one is {gap:+.2f} +- {error:.2f} away"
    )


def at(curve: Scan, x: float) -> tuple[float, float]:
    """Distance and error of a curve at x, between its points on the logarithmic axis."""
    for (left, *low), (right, *high) in zip(curve, curve[1:], strict=False):
        if left <= x <= right:
            share = math.log(x / left) / math.log(right / left)
            return tuple(a + share * (b - a) for a, b in zip(low, high, strict=True))
    return curve[0][1:] if x <= curve[0][0] else curve[-1][1:]
