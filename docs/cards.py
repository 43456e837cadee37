"""Print the tables of docs/training-sd15.md: python docs/cards.py

What fits on which card, and what 8 and 4 bits save, at the size of Stable Diffusion 1.5; rehearsed on tensors
without numbers, so neither a GPU nor the base is needed.
"""

import dataclasses
from collections.abc import Callable

from ghibli.config.schema import Config
from ghibli.models.base import BaseModel
from ghibli.models.sd15 import sd15_shapes
from ghibli.prepare.cards import GB, SIZES, Choice, choices_among
from ghibli.prepare.rehearsal import Prediction, predict
from ghibli.runs.compose import compose_config

SETTINGS = ["model=sd15", "model.path=demo", "lora.rank=32", "data.batch_size=1", "data.accumulate=16"]
PRECISION = "bf16-mixed"


def with_bits(config: Config, bits: int | None) -> Config:
    """Return the settings with model.frozen_bits."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, frozen_bits=bits))


def cell(choices: list[Choice]) -> str:
    """Format what fits best, with its peak."""
    if not choices:
        return "nothing fits"
    return f"`{choices[0].words}` ({choices[0].size / GB:.1f} GB)"


def print_cards(configs: list[Config], rehearsed: Callable[[Config], Prediction]) -> None:
    """Print which settings fit on which card, plain and guided."""
    print("| memory | plain, `loss.guidance=1` | guided, `loss.guidance=7.5` |\n|---|---|---|")
    for size in SIZES:
        cells = [cell(choices_among(rehearsed, config, size * GB)) for config in configs]
        print(f"| {size} GB | {' | '.join(cells)} |")


def print_bits(config: Config, rehearsed: Callable[[Config], Prediction]) -> None:
    """Print the weights and the peak of one guided example in 16, 8 and 4 bits."""
    print("\n| `model.frozen_bits` | weights | peak, one example | with `compute.checkpoint_every=1` |")
    print("|---|---|---|---|")
    for bits in (None, 8, 4):
        found = rehearsed(with_bits(config, bits))
        peaks = [found.phases(checkpoint, 1)["training"] / GB for checkpoint in (0, 1)]
        print(f"| {bits or 'null'} | {found.weights / GB:.2f} GB | {peaks[0]:.2f} GB | {peaks[1]:.2f} GB |")


def main() -> None:
    """Rehearse each setting once and print both tables."""
    like: BaseModel = sd15_shapes()
    known: dict[str, Prediction] = {}

    def rehearsed(config: Config) -> Prediction:
        key = f"{config.loss.guidance} {config.model.frozen_bits}"
        if key not in known:
            known[key] = predict(config, like, PRECISION)
        return known[key]

    plain, guided = (compose_config([*SETTINGS, f"loss.guidance={g}"]) for g in (1, 7.5))
    print_cards([plain, guided], rehearsed)
    print_bits(guided, rehearsed)


if __name__ == "__main__":
    main()
