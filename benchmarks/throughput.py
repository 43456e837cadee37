"""Measure how fast this machine trains and samples: python benchmarks/throughput.py [KEY=VALUE ...] --help"""

import argparse
import datetime
import json
import subprocess
from pathlib import Path

import loading
import pairs
import peer
import steps
import torch

from ghibli.runs.compose import compose_config
from ghibli.runtime.errors import one_line_errors
from ghibli.runtime.resources import device_name

OPTIONS = {
    "as it is": [],
    "channels_last": ["compute.channels_last=true"],
    "compile": ["compute.compile=true"],
    "compile, channels_last": ["compute.compile=true", "compute.channels_last=true"],
    "checkpoint every block": ["compute.checkpoint_every=1"],
    "bf16": ["trainer.precision=bf16-mixed"],
}
MEASUREMENTS = ["training", "pairs", "overhead", "loading", "encoding", "sampling"]
USUAL = ["training", "overhead", "encoding", "sampling"]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="overrides of train.py, such as lora.rank=16"
    )
    parser.add_argument("--what", nargs="*", default=USUAL, choices=MEASUREMENTS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1, 7.5])
    parser.add_argument(
        "--options", nargs="+", default=["as it is", "channels_last"], choices=[*OPTIONS, "all"]
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps per row; their median is reported"
    )
    parser.add_argument(
        "--peer", metavar="COMMAND", help="another trainer's `SCRIPT ARGS`, with {steps} and {out}"
    )
    parser.add_argument("--steps", type=int, default=150, help="of train.py and of its peer")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser.parse_intermixed_args()


def training_rows(args: argparse.Namespace) -> list[dict]:
    """Measure and print the table: batch x {plain, guided} x options."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates: dict[torch.dtype, float] = {}
    rows = []
    for option in OPTIONS if "all" in args.options else args.options:
        for guidance in args.guidance:
            for batch in args.batch:
                overrides = [*args.words, *OPTIONS[option], f"loss.guidance={guidance:g}"]
                dtype = steps.dtype_of(overrides) or torch.float32
                if dtype not in rates:
                    rates[dtype] = steps.matmul_rate(dtype, device)
                row = {"batch": batch, "guidance": guidance, "options": option}
                row |= steps.time_training(overrides, batch, args.repeats, rates[dtype])
                rows.append(row)
                print(markdown_row(row), flush=True)
    return rows


def speedups(args: argparse.Namespace) -> list[dict]:
    """Measure and print how many times faster each option makes a step than none, in pairs of steps."""
    names = [name for name in (OPTIONS if "all" in args.options else args.options) if OPTIONS[name]]
    rows = []
    for guidance in args.guidance:
        for batch in args.batch:
            words = [*args.words, f"loss.guidance={guidance:g}"]
            chosen = {name: OPTIONS[name] for name in names}
            for name, found in pairs.compare_options(words, chosen, batch, args.repeats).items():
                rows.append({"batch": batch, "guidance": guidance, "options": name, **found._asdict()})
                print(f"| {batch} | {guidance:g} | {name} | {found} |", flush=True)
    return rows


def markdown_row(row: dict) -> str:
    """Format a row of the table."""
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
    share = f"{100 * row['of_matmul_rate']:.0f} %"
    return (
        f"| {row['batch']} | {row['guidance']:g} | {row['options']} | {row['precision']} "
        f"| {row['images_per_second']:.2f} | {peak} | {row['kernels']} | {share} |"
    )


def main() -> None:
    """Measure what was asked for, print it and write it as JSON."""
    args = parse_arguments()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=peer.REPO, capture_output=True, text=True
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "words": args.words,
        "device": device_name(device), "torch": torch.__version__,
    }  # fmt: skip
    print(f"{found['date']}, commit {found['commit']}, {found['device']}, torch {found['torch']}\n")
    if "training" in args.what:
        print("| batch | guidance | options | precision | images/s | peak GiB | kernels | of matmul rate |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        found["training"] = training_rows(args)
    if "pairs" in args.what:
        found["pairs"] = speedups(args)
    if "loading" in args.what:
        batch = max(args.batch)
        found["loading"] = times = loading.time_loading(compose_config(args.words), batch, args.repeats)
        print(f"\nA batch of {batch} takes {1000 * times['batch']:.2f} ms to make; a device's step of "
              f"{1000 * times['device']:.2f} ms takes {1000 * times['step']:.2f} ms with it.")  # fmt: skip
    if "overhead" in args.what:
        ours, bare = steps.time_overhead(args.words)
        found["overhead"] = {"step": ours, "bare": bare, "ratio": ours / bare}
        print(f"\nA step of the trainer costs {ours / bare:.3f} x the bare forward and backward.")
    if "encoding" in args.what:
        each = found["encoding"] = steps.time_encoding(args.words, max(args.batch))
        print(f"\nWithout caches, every step would take another {1000 * each['image']:.1f} ms per image "
              f"and {1000 * each['caption']:.2f} ms per caption.")  # fmt: skip
    if "sampling" in args.what:
        found["sampling"] = steps.time_sampling(args.words, max(args.batch))
        rates = found["sampling"]
        print(f"\nSampling: {rates['evaluations_per_second']:.1f} UNet evaluations/s, "
              f"{rates['images_per_second']:.2f} images/s of a guided cell.")  # fmt: skip
    if args.peer:
        other = peer.time_against_peer(args.words, args.peer, args.steps)
        found["peer"] = other._asdict() | {"ratio": other.ratio._asdict(), "command": args.peer}
        print(f"\ntrain.py is {other.ratio.value:.2f} times as fast as its peer (95 %: {other.ratio.low:.2f} "
              f"to {other.ratio.high:.2f}; {other.ours:.3f} s and {other.peers:.3f} s per step, medians of "
              f"{other.steps} steps each).")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    one_line_errors(main)
