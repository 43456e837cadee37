"""Print what fits on which card, the table of docs/training-sd15.md: python docs/cards.py"""

from dataclasses import replace

from ghibli.models.sd15 import sd15_shapes
from ghibli.prepare.cards import GB, SIZES, Choice, largest_batch
from ghibli.prepare.rehearsal import predict
from ghibli.runs.compose import compose_config


def cell(choice: Choice | None) -> str:
    """Format what fits."""
    return "nothing" if choice is None else f"`{choice.words}` ({choice.size / GB:.1f} GB)"


def main() -> None:
    """Rehearse Stable Diffusion 1.5's sizes at 512 px, plain and guided, and print a row for each card."""
    shapes = sd15_shapes()
    print("| memory | `loss.guidance` | without checkpointing | `compute.checkpoint_every=1` |")
    print("|---|---|---|---|")
    for guidance in (1, 7.5):
        config = compose_config(["model=sd15", "data=ghibli", "data.root=docs"])
        config = replace(config, loss=replace(config.loss, guidance=guidance))
        found = predict(config, shapes, "bf16-mixed")
        for size in SIZES:
            fits = [largest_batch(found, config, size * GB, every, None) for every in (0, 1)]
            print(f"| {size} GB | {guidance} | {cell(fits[0])} | {cell(fits[1])} |")


if __name__ == "__main__":
    main()
