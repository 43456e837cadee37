"""Sentences of a report page: the verdict on one run and on several, computed from their files."""

import math
import re
from typing import Any

from markupsafe import Markup, escape
from scipy.stats import norm

from ghibli.evaluation.diagnosis import NOTHING
from ghibli.evaluation.gain import Gain
from ghibli.evaluation.seeds import over_seeds
from ghibli.report.run_data import RunData, gain_of, price_of, timestep_gains
from ghibli.report.svg import tag
from ghibli.runtime.commands import command_line, resume_words
from ghibli.runtime.wording import number_of
from ghibli.sweeps.effects import Effect, SeedNoise, gain_difference, repeated_trials
from ghibli.sweeps.trials import Trial
from ghibli.sweeps.winner import winner_lines

MAX_UNFINISHED = 5  # unfinished runs that the verdict on several names

Scan = list[tuple[float, float, float]]  # (sampling scale / training guidance, kernel distance, its error)


def typeset(text: object) -> str:
    """Typeset numbers: a plus-minus sign, a true minus, arrows, and spaces that do not break."""
    plain = (
        str(text).replace(" +- ", "\u00a0\u00b1\u00a0").replace(" %", "\u00a0%").replace(" -> ", " \u2192 ")
    )
    return re.sub(r"(?<![\w.\-/=])-(?=\d)", "\u2212", plain)


def prose(text: object) -> Markup:
    """Typeset a sentence and set what is between backticks as code; everything is escaped."""
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:  # a backtick without its partner is only a backtick
        return escape(typeset(text))
    parts = [tag("code", piece) if k % 2 else escape(typeset(piece)) for k, piece in enumerate(pieces)]
    return Markup("").join(parts)


def gain_percent(gain: Gain | None) -> str:
    """Format a gain, `63.2 % +- 0.9 %`; `-` for None."""
    return "-" if gain is None else gain.signed_size


def difference_points(difference: Gain) -> str:
    """Format a difference of two gains, `+1.23 +- 0.20 points`."""
    return f"{100 * difference.value:+.2f} +- {100 * difference.standard_error:.2f} points"


def run_verdict(data: RunData) -> list[str]:
    """Return the sentences about one run, the most important first."""
    sentences = (
        learning_sentence(data),
        price_sentence(data),
        timestep_sentence(data),
        best_epoch_sentence(data),
        overfitting_sentence(data),
        unfinished_sentence(data),
    )
    return [sentence for sentence in sentences if sentence]


def learning_sentence(data: RunData) -> str:
    """Say whether the run learned and by how much, with the error."""
    gain = data.gain
    if data.trial.settings.get("finetune") == "none":
        return "Nothing was trained (finetune=none): this run only measures the untouched base."
    if gain is None:
        return "No epoch is finished yet, so nothing can be said about learning."
    if math.isnan(gain.standard_error):
        return f"It is {gain}; with one held-out image there is no standard error, so this proves nothing."
    if gain.low > 0 and gain.value >= NOTHING:
        return f"It learned: {gain}."
    if gain.high < 0:
        return f"It did not learn: even its best epoch is {gain}."
    return f"It shows no learning beyond chance: the gain is {gain_percent(gain)}."


def price_sentence(data: RunData) -> str | None:
    """Say what the best epoch has forgotten of what the base was made for, where that was measured."""
    price = None if data.best is None else price_of(data.best)
    if price is None or not math.isfinite(price.value):
        return None
    if math.isnan(price.standard_error):
        side = "above" if price.value >= 0 else "below"
        return (
            f"The price: on what the base was made for, its loss is {price.size} {side} the base's; so few "
            "images give no standard error, so this proves nothing: raise validation.price_images."
        )
    if price.low > 0:
        return f"The price: on what the base was made for, its loss is {price.size} above the base's."
    if price.high < 0:
        return f"It cost nothing: on what the base was made for, its loss is {price.size} below the base's."
    return f"What the base was made for cost no more than chance: {price.signed_size}."


def timestep_sentence(data: RunData) -> str | None:
    """Say in which ranges of timesteps the best epoch is worse than the base, if it is better as a whole."""
    if data.best is None or data.gain is None or not data.gain.low > 0:
        return None
    worse = {name: gain for name, gain in timestep_gains(data.best).items() if gain.high < 0}
    if not worse:
        return None
    ranges = ", ".join(f"{name} (by {gain.size})" for name, gain in worse.items())
    return f"But it is worse than the base at timesteps {ranges}, which count little in this gain."


def best_epoch_sentence(data: RunData) -> str | None:
    """Say which epoch is the best, and how the last one compares."""
    if data.best is None:
        return None
    last, planned = data.probe[-1], data.trial.settings.get("trainer.max_epochs")
    best, count = int(data.best["epoch"]), int(last["epoch"])
    early = isinstance(planned, int) and count < planned and data.state == "finished"
    stopped = f" Early stopping ended it before epoch {planned}." if early else ""
    if count == 1:
        return f"It ran for one epoch.{stopped}"
    if not math.isfinite(gain_of(last).value):
        return f"Epoch {best} of {count} is the best; the gain of the last is not finite."
    if best < count:
        lost = gain_of(data.best).value - gain_of(last).value
        return f"Epoch {best} of {count} is the best; the last is {100 * lost:.1f} points below it.{stopped}"
    added = gain_of(last).value - gain_of(data.probe[-2]).value
    return f"The last epoch, {count}, is the best; it added {100 * added:.1f} points.{stopped}"


def overfitting_sentence(data: RunData) -> str | None:
    """Say whether the run memorised its training images."""
    if data.best is None:
        return None
    if any(finding["name"] == "overfitting" for finding in data.findings):
        return "It overfits: held-out images got worse while training images got better."
    held_out, training = gain_of(data.probe[-1]), gain_of(data.probe[-1], "train")
    gap, error = training.value - held_out.value, math.hypot(training.standard_error, held_out.standard_error)
    if gap > 2 * error:
        return (
            f"Training images gain more ({gain_percent(training)}) than held-out ones "
            f"({gain_percent(held_out)}): part of it is memorisation, though the run doctor found no "
            "overfitting."
        )
    if gap <= 2 * error:
        return f"No sign of overfitting: training images gain as much ({gain_percent(training)})."
    return None  # the gap is NaN


def unfinished_sentence(data: RunData) -> str | None:
    """Say why a run is not finished and how to continue; None for a finished run."""
    if data.state == "finished":
        return None
    status = data.trial.status
    if data.state == "running":
        updated = format_time(status.get("updated")) or "its start"
        return f"It is still running: this page shows it as of {updated}."
    reason = str(status.get("reason") or "no reason was recorded")
    sentences = {
        "failed": f"It failed: {reason}.",
        "interrupted": f"It was stopped: {reason}.",
        "killed": "It was killed: its status says running, but its process is gone.",
    }
    unknown = "How it ended is unknown: status.json is missing or damaged."
    return f"{sentences.get(data.state, unknown)} {continue_advice(data)}"


def format_time(time: object) -> str | None:
    """Format an ISO time in UTC for a reader; None stays None."""
    return None if time is None else str(time).replace("T", " ").replace("+00:00", " UTC")


def continue_advice(data: RunData) -> str:
    """Say how to continue an unfinished run."""
    if data.run.usable_checkpoint() is not None:
        return f"`{command_line('python', *resume_words(data.run.path))}` resumes it."
    command = data.trial.status.get("command")
    again = f" with `python {command}`" if command else ""
    return f"It left no intact checkpoint to resume from: start it again{again}."


def study_verdict(runs: list[tuple[str, RunData]], found: list[Effect], noise: SeedNoise | None) -> list[str]:
    """Return the sentences about several runs, which are ranked best first.

    Args:
        runs: (name on the page, run).
        found: effects of the settings, the largest first.
    """
    states = [data.state for _, data in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    ranked = [(label, data, data.gain) for label, data in runs if data.gain is not None]
    if not ranked:
        return [f"No run has finished an epoch yet, so there is nothing to rank ({counts})."]
    label, _, gain = ranked[0]
    sentences = [f"The best run ({label}) is {gain}.", *lead_sentences([data for _, data, _ in ranked])]
    better = sum(gain.low > 0 for *_, gain in ranked)
    worse = sum(gain.high < 0 for *_, gain in ranked)
    groups = ((better, "learned"), (worse, "got worse"), (len(ranked) - better - worse, "show neither"))
    sentences.append(f"{', '.join(f'{count} {word}' for count, word in groups if count)}; {counts}.")
    strong = [effect for effect in found if effect.matters]
    if strong:
        sentences.append(f"The largest effect: {strong[0]}.")
    elif found:
        sentences.append("No setting changes the gain by more than its error.")
    if noise is not None:
        sentences.append(noise_sentence(noise))
    unfinished = [
        f"{label}: {lower_first(text)}" for label, data in runs if (text := unfinished_sentence(data))
    ]
    return sentences + unfinished[:MAX_UNFINISHED]


def noise_sentence(noise: SeedNoise) -> str:
    """Say how much the seed alone changes the gain."""
    text = str(noise)
    return f"{text[:1].upper()}{text[1:]}."


def seed_sentences(trials: list[Trial]) -> list[str]:
    """Say what trainings that differ only in the seed come to, where there is one group of them."""
    groups = repeated_trials(trials)
    if len(groups) != 1:
        return []
    found = over_seeds({trial.settings["seed"]: trial.scores for trial in groups[0]})
    return [] if found is None else [f"{str(found)[:1].upper()}{str(found)[1:]}."]


def winner_sentences(trials: list[Trial], is_study: bool) -> list[str]:
    """Say what the best of several runs is worth on images and seeds that did not choose it, where known."""
    return [f"{line[:1].upper()}{line[1:]}." for line in winner_lines(trials, is_study)]


def lower_first(sentence: str) -> str:
    """Lower the first letter, for a sentence after a colon."""
    return sentence[:1].lower() + sentence[1:]


def lead_sentences(ranked: list[RunData]) -> list[str]:
    """Say by how much the best run leads the next, paired over images where both were scored on the same."""
    if len(ranked) < 2:
        return []
    first, second = ranked[0].trial.best, ranked[1].trial.best
    if first is None or second is None or not first.base_val.equal(second.base_val):
        return [
            "The first two were not scored on the same held-out images, so their difference has no "
            "standard error."
        ]
    lead = gain_difference([(ranked[1].trial, ranked[0].trial)])
    if lead.low > 0 and lead.value >= NOTHING:
        return [f"The first leads the second by {difference_points(lead)} of gain (paired over images)."]
    return [
        f"The first two cannot be told apart: they differ by {difference_points(lead)} of gain (paired over "
        "images)."
    ]


def counted_copies(found: dict[str, Any]) -> str:
    """Say how many samples are nearer to a training image than unseen real images are.

    Args:
        found: `copies` of a cell in evaluation.json.
    """
    counts = (
        f"{found['below']} of {found['samples']} samples are nearer to a training image than 99 % of unseen "
        f"real images, mirrored and in part too; {found['expected']:.1f} would be usual"
    )
    if found["p"] < 0.01 and found["below"] > found["expected"]:
        return f"signs of copies: {counts}: look at the nearest ones"
    return f"no sign of copies: {counts}"


def copies_sentence(copying: float, base: float | None) -> str:
    """Say how close samples come to training images.

    Args:
        copying: distance of samples to their nearest training images, over that of unseen real images.
        base: the same for the untouched base.
    """
    of_base = "" if base is None else f" (the untouched base: {base:.2f})"
    ratio = (
        f"the nearest training image is at {copying:.2f} times the distance of unseen real images{of_base}"
    )
    if copying >= 0.9:
        return f"no sign of copies: {ratio}"
    if copying >= 0.5:
        return f"closer to training images than unseen real ones are: {ratio}"
    return f"close to copies: {ratio}"


def scale_rule_verdict(ordinary: Scan, guided: Scan) -> tuple[bool, str] | None:
    """Test whether a guided run sampled at s scores like the ordinary one sampled at s / w.

    The ordinary curve is interpolated; errors are taken as independent, and with m points each is tested
    at 0.05 / m (Bonferroni).

    Returns:
        (whether nothing contradicts the rule, a sentence); None where the scans do not overlap.
    """
    ordinary = sorted(ordinary)
    shared = [point for point in guided if ordinary and ordinary[0][0] <= point[0] <= ordinary[-1][0]]
    if not shared:
        return None
    threshold = norm.ppf(1 - 0.025 / len(shared))
    differences = []
    for x, distance, error in shared:
        expected, expected_error = interpolate(ordinary, x)
        differences.append((x, distance - expected, math.hypot(error, expected_error)))
    apart = [one for one in differences if abs(one[1]) > threshold * one[2]]
    points = number_of(len(shared), "point")
    if not apart:
        return True, f"at the {points} they share, nothing contradicts the rule"
    x, difference, error = max(apart, key=lambda one: abs(one[1]) / one[2])
    return False, (
        f"the rule does not hold: of the {points} they share, {len(apart)} differ by more than chance, most "
        f"clearly at s / w = {x:.3g}, where the guided one is {difference:+.2f} +- {error:.2f} away"
    )


def interpolate(curve: Scan, x: float) -> tuple[float, float]:
    """Return distance and error of a curve at x, interpolated on a logarithmic x axis."""
    for (x0, distance0, error0), (x1, distance1, error1) in zip(curve, curve[1:], strict=False):
        if x0 <= x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return distance0 + share * (distance1 - distance0), error0 + share * (error1 - error0)
    return curve[0][1:] if x <= curve[0][0] else curve[-1][1:]
