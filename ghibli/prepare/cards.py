"""What fits on a card that need not be there: `ghibli check --card 8GB`, and the words to type."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ghibli.config.schema import Config
from ghibli.models.base import BaseModel
from ghibli.prepare.rehearsal import Prediction, predict
from ghibli.runtime.errors import UserError

SIZES = (6, 8, 12, 16, 24, 80)  # GB of usual cards
BATCHES = (32, 16, 8, 4, 2, 1)
FREE = 0.95  # share of a card's memory that its driver and a desktop leave
GB = 2**30  # a card of 8 GB has 8 GiB


@dataclass(frozen=True)
class Choice:
    """Settings that fit on a card, and what they take there."""

    batch_size: int
    accumulate: int
    checkpoint_every: int
    frozen_bits: int | None
    size: float  # bytes at the peak

    @property
    def words(self) -> str:
        """What to type after train.py."""
        words = [f"data.batch_size={self.batch_size}", f"data.accumulate={self.accumulate}"]
        if self.checkpoint_every:
            words.append(f"compute.checkpoint_every={self.checkpoint_every}")
        if self.frozen_bits:
            words.append(f"model.frozen_bits={self.frozen_bits}")
        return " ".join(words)


def card_size(text: str) -> float:
    """Read the size of a card, such as 8GB, 8 or 7.5GiB, in bytes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"([0-9]+[.]?[0-9]*)\s*(GB|GiB|G)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * GB if match else math.nan
    if not 0 < size < math.inf:
        raise UserError(f"--card {text} is no size of a card's memory: give it as 8GB")
    return size


def largest_batch(
    found: Prediction, config: Config, size: float, checkpoint_every: int, bits: int | None
) -> Choice | None:
    """Return the choice with the largest batch that fits; None where not even one example does."""
    together = config.data.batch_size * config.data.accumulate
    for batch in BATCHES:
        peak = found.peak(checkpoint_every, batch)
        if peak <= FREE * size:
            return Choice(batch, max(1, together // batch), checkpoint_every, bits, peak)
    return None


def choose(config: Config, like: BaseModel, precision: str, size: float) -> list[Choice]:
    """Return what fits on a card of `size` bytes, the fastest first."""
    return choices_among(lambda asked: predict(asked, like, precision), config, size)


def choices_among(rehearsed: Callable[[Config], Prediction], config: Config, size: float) -> list[Choice]:
    """Return what fits, the fastest first: a batch without checkpointing, with it, with 4-bit weights.

    Checkpointing costs a third more computation, so it stands behind a batch of 4 without it; 4 bits are
    asked for only where nothing else fits.

    Args:
        rehearsed: returns what a run with these settings takes.
    """
    found = rehearsed(config)
    every = config.compute.checkpoint_every or 1
    bits = config.model.frozen_bits
    plain = largest_batch(found, config, size, 0, bits)
    again = largest_batch(found, config, size, every, bits)
    choices = [choice for choice in (plain, again) if choice is not None]
    if plain and again and again.batch_size > plain.batch_size and plain.batch_size < 4:
        choices.reverse()
    if not choices and bits is None and config.finetune == "lora":
        smaller = replace(config, model=replace(config.model, frozen_bits=4))
        last = largest_batch(rehearsed(smaller), config, size, every, 4)
        choices += [] if last is None else [last]
    return choices


def nothing_fits(config: Config, like: BaseModel, precision: str, size: float) -> str:
    """Say what the smallest settings take, of which phase, and what would lower it."""
    phases = predict(config, like, precision).phases(config.compute.checkpoint_every or 1, 1)
    name = max(phases, key=phases.__getitem__)
    return (
        f"no settings fit: one example with gradient checkpointing takes {phases[name] / GB:.1f} GB at its "
        f"peak, {name}, of {size / GB:.3g}; lower model.resolution (it is {config.model.resolution})"
    )
