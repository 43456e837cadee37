"""What trainings that differ only in their seed come to: mean gain, spread, interval."""

from dataclasses import dataclass

import numpy as np
import torch

from ghibli.evaluation.gain import Gain, Probe, gain_over_seeds


@dataclass(frozen=True)
class OverSeeds:
    """Trainings with two or more seeds, scored on the same items."""

    seeds: list[int]
    gains: list[Gain]  # of each, with its error over images
    mean: Gain  # with its error over seeds and images together

    @property
    def deviation(self) -> float:
        """Standard deviation of the gain between seeds, with N - 1."""
        return float(np.std([gain.value for gain in self.gains], ddof=1))

    @property
    def interval(self) -> str:
        """Format the mean and its interval: `61.3 % +- 0.4 %, 95 % interval 60.2 .. 62.4 %`."""
        low, high = 100 * self.mean.low, 100 * self.mean.high
        return f"{self.mean.signed_size}, 95 % interval {low:.1f} .. {high:.1f} %"

    def __str__(self) -> str:
        return (
            f"over {len(self.seeds)} seeds ({', '.join(map(str, self.seeds))}) the mean gain is "
            f"{self.interval}, over seeds and held-out images together"
        )

    @property
    def lines(self) -> list[str]:
        """Return the closing lines of a run with several seeds."""
        each = ", ".join(
            f"{seed}: {gain.signed_size}" for seed, gain in zip(self.seeds, self.gains, strict=True)
        )
        return [
            f"seeds    {each}",
            f"gain     mean {self.interval}, over seeds and held-out images together",
            f"         a new seed alone moves it by {100 * self.deviation:.2f} points (standard deviation)",
        ]


def over_seeds(scored: dict[int, Probe]) -> OverSeeds | None:
    """Combine the best epochs of trainings that differ only in their seed.

    Args:
        scored: seed -> its scores.

    Returns:
        None for fewer than two, or where they were not scored on the same items by the same base.
    """
    probes = [scored[seed] for seed in sorted(scored)]
    if len(probes) < 2 or any(not torch.equal(probe.base_val, probes[0].base_val) for probe in probes):
        return None
    mean = gain_over_seeds(torch.stack([probe.val for probe in probes]), probes[0].base_val)
    return OverSeeds(sorted(scored), [probe.val_gain for probe in probes], mean)
