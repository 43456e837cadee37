"""What a style costs on the demo, and what loss.keep saves: python docs/price.py [KEY=VALUE ...]

Trains runs with several learning rates and brakes below outputs/price, prints the tables of
docs/understanding.md and writes its figure. Finished runs are not trained again.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from ghibli.evaluation.gain import Gain, Probe, paired_gain
from ghibli.runs.folder import RunDir, read_checkpoint

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "understanding" / "price.png"
COMMON = ("model=demo", "data=demo", "data.epochs=2", "sample.every_n_epochs=0", "wandb.mode=disabled")
RATES = ("1.25e-4", "2.5e-4", "5e-4")  # without a brake
BRAKES = ("0.1", "0.3", "1")  # at the default rate, 5e-4


def trained(name: str, *words: str) -> list[Probe]:
    """Train a run of this name and return its probes, the base's first; a finished one answers at once."""
    run = RunDir(ROOT / "outputs" / "price" / name)
    command = [sys.executable, str(ROOT / "train.py"), *COMMON, f"hydra.run.dir={run.path}", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return [Probe(**probe) for probe in read_checkpoint(run.last_checkpoint)["probe"]]


def price_at(gain: float, history: list[Probe]) -> torch.Tensor | None:
    """Return the losses (R, K) on the price's items where a run had this gain, between two epochs.

    They are interpolated linearly in the gain; None for a gain that the run never had.
    """
    for before, now in zip(history, history[1:], strict=False):
        low, high = before.val_gain.value, now.val_gain.value
        if low <= gain <= high:
            share = (gain - low) / (high - low)
            return (1 - share) * before.price.double() + share * now.price.double()
    return None


def saved(end: Probe, others: list[list[Probe]]) -> Gain | None:
    """Return by how much the price is below the lowest that any other run paid for the same gain."""
    paid = [price for history in others if (price := price_at(end.val_gain.value, history)) is not None]
    if not paid:
        return None
    rise = min(paid, key=lambda losses: losses.sum().item()) - end.price.double()
    return paired_gain(end.base_price.double() - rise, end.base_price)


def draw(plain: dict[str, list[Probe]], held: dict[str, list[Probe]]) -> None:
    """Draw gain over price from epoch to epoch, with one standard error."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for runs, colours, label in (
        (plain, plt.cm.Greys, "lr {}, no brake"), (held, plt.cm.Blues, "lr 5e-4, loss.keep={}"),
    ):  # fmt: skip
        for place, (name, history) in enumerate(runs.items(), start=2):
            points = [(probe.forgotten, probe.val_gain) for probe in history]
            axis.errorbar(
                [100 * price.value for price, _ in points], [100 * gain.value for _, gain in points],
                xerr=[100 * price.standard_error for price, _ in points], marker="o", ms=3, lw=1.2,
                color=colours(place / (len(runs) + 2)), label=label.format(name),
            )  # fmt: skip
    axis.set(xlabel="price: loss above the base's on photo-like scenes (%)", ylabel="gain (%)")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize="small")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Train, print both tables and draw the figure."""
    words = sys.argv[1:]
    print("| `optimizer.lr` | gain | price |\n|---|---|---|")
    plain: dict[str, list[Probe]] = {}
    for rate in RATES:
        plain[rate] = trained(f"lr{rate}", f"optimizer.lr={rate}", *words)
        end = plain[rate][-1]
        print(f"| {rate} | {end.val_gain.signed_size} | {end.forgotten.signed_size} |", flush=True)
    print("\n| `loss.keep` | gain | price | saved at equal gain |\n|---|---|---|---|")
    held: dict[str, list[Probe]] = {}
    for brake in BRAKES:
        held[brake] = trained(f"keep{brake}", f"loss.keep={brake}", *words)
        end = held[brake][-1]
        less = saved(end, list(plain.values()))
        text = "-" if less is None else less.signed_size
        print(f"| {brake} | {end.val_gain.signed_size} | {end.forgotten.signed_size} | {text} |", flush=True)
    draw(plain, held)


if __name__ == "__main__":
    main()
