"""Does this working tree train what another commit trains? The same runs by both, compared to the bit.

    python tests/end_to_end/compare_with_commit.py [COMMIT] [--images DIR] [--only NAME] [--threads N]

Compared are the trained weights' bytes, the loss column, probe.csv and the pixels of the grids.
A refactor leaves all of it as it is. --images names a folder of real images; without it that run is left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tests"))

from faults.compare import image, rows_of  # noqa: E402

FIXED = ("model=demo", "wandb.mode=disabled", "hydra.run.dir=run", "cache_dir=cache")
RUNS = {
    "plain": ("data=demo",),
    "guided": ("data=demo", "loss.guidance=7.5", "lora.rank=16"),
    "full": ("data=demo", "experiment=full_finetune"),
}


def train(tree: Path, folder: Path, words: list[str]) -> Path:
    """Train with the code of a tree in an empty folder; return the run folder."""
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tree / "train.py"), *FIXED, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return folder / "run"


def weights_of(run: Path) -> dict[str, bytes]:
    """Read all trained weights of the last and the best epoch, by checkpoint and name.

    From the checkpoints, since later commits multiply alpha / rank into the B of an adapter's file.
    """
    found = {}
    for name in ("last", "best"):
        state = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        found |= {f"{name}.{key}": value.numpy().tobytes() for key, value in state.items()}
    return found


def differences(left: Path, right: Path) -> list[str]:
    """Name everything in which two finished runs differ."""
    found = []
    ours, theirs = weights_of(left), weights_of(right)
    if not ours or ours.keys() != theirs.keys():
        found.append(f"names of weights: {sorted(ours.keys() ^ theirs.keys())}")
    found += [name for name in ours if ours[name] != theirs.get(name)]
    losses = [[row["train/loss"] for row in rows_of(run / "metrics.csv")] for run in (left, right)]
    if not losses[0] or losses[0] != losses[1]:
        found.append("loss column")
    if (left / "probe.csv").read_bytes() != (right / "probe.csv").read_bytes():
        found.append("probe.csv")
    grids = [sorted(file.name for file in (run / "samples").iterdir()) for run in (left, right)]
    if not grids[0] or grids[0] != grids[1]:
        found.append("names of grids")
    for name in set(grids[0]) & set(grids[1]):
        if not (image(left / "samples" / name) == image(right / "samples" / name)).all():
            found.append(f"pixels of {name}")
    return found


def main() -> None:
    """Train every run twice and print what differs; exit with 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", default="73ce106")
    parser.add_argument("--images", type=Path, help="folder of real images with captions")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=[*RUNS, "real"])
    asked = parser.parse_args()
    runs = dict(RUNS)
    if asked.images is not None:
        runs["real"] = ("data=ghibli", f"data.root={asked.images.resolve()}")
    different = False
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch, "tree")
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", other, asked.commit], cwd=REPO, check=True
        )
        try:
            for name, words in runs.items():
                if asked.only not in (None, name):
                    continue
                words = [*words, f"trainer.max_epochs={asked.epochs}", f"threads={asked.threads}"]
                pair = [
                    train(tree, Path(scratch, side, name), words)
                    for side, tree in (("theirs", other), ("ours", REPO))
                ]
                found = differences(*pair)
                different = different or bool(found)
                print(f"{name}: {', '.join(found) or 'equal to the bit'}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=REPO, check=True)
    raise SystemExit(different)


if __name__ == "__main__":
    main()
