"""Does this working tree train what another commit trains? The same runs by both, compared to the bit.

    python tests/end_to_end/compare_with_commit.py [COMMIT] [--images DIR] [--only NAME] [--threads N]

Compared are the trained weights' bytes, the loss column, the columns of probe.csv that both have (to
rounding), and the pixels of the grids of both. A refactor leaves all of it as it is; MEANT names what changed
on purpose after 73ce106. --images names a folder of real images; without it that run is left out. Images with
a colour profile other than sRGB are left out of it: commits before 894e136 ignored the profile, so they train
on other colours.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tests"))

from faults.compare import image, rows_of  # noqa: E402

from ghibli.images.read import is_image_name, open_file, transform_to_srgb  # noqa: E402

FIXED = ("model=demo", "wandb.mode=disabled", "hydra.run.dir=run", "cache_dir=cache")
MEANT = {
    "probe.csv: probe/val_gain_low": "Student's t in place of 1.96 (9af01ff)",
    "probe.csv: probe/val_gain_high": "Student's t in place of 1.96 (9af01ff)",
    "only ours: epoch_001.png": "a first grid after epoch 1 (444a4fd)",
}
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


def differing_weights(left: Path, right: Path) -> list[str]:
    """Say how many trained weights two runs do not share to the bit, and name the first."""
    ours, theirs = weights_of(left), weights_of(right)
    assert ours, f"{left} has trained nothing"
    names = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    return [f"{len(names)} of {len(ours)} weights, the first {names[0]}"] if names else []


def differing_scores(left: Path, right: Path) -> list[str]:
    """Name the columns of probe.csv that both runs have and that differ by more than rounding.

    Several small images are scored together since ea9b502, so the last digits of a score are others.
    """
    ours, theirs = rows_of(left / "probe.csv"), rows_of(right / "probe.csv")
    if len(ours) != len(theirs):
        return [f"probe.csv has {len(ours)} rows against {len(theirs)}"]
    both = [name for name in theirs[0] if name in ours[0]]
    assert "probe/val_gain" in both, f"no gain in {left / 'probe.csv'}"
    pairs = list(zip(ours, theirs, strict=True))
    return [f"probe.csv: {name}" for name in both if not all(is_score(a[name], b[name]) for a, b in pairs)]


def is_score(one: str, other: str) -> bool:
    """Tell whether two cells of probe.csv are the same text, or numbers that differ by rounding alone."""
    try:
        return one == other or math.isclose(float(one), float(other), rel_tol=1e-4, abs_tol=1e-5)
    except ValueError:
        return False


def differences(left: Path, right: Path) -> list[str]:
    """Name everything in which two finished runs differ."""
    found = [*differing_weights(left, right), *differing_scores(left, right)]
    losses = [[row["train/loss"] for row in rows_of(run / "metrics.csv")] for run in (left, right)]
    if not losses[0] or losses[0] != losses[1]:
        found.append("loss column")
    theirs, ours = [{file.name for file in (run / "samples").iterdir()} for run in (left, right)]
    assert theirs & ours, "no grid in common"
    found += [f"only theirs: {name}" for name in sorted(theirs - ours)]
    found += [f"only ours: {name}" for name in sorted(ours - theirs)]
    for name in sorted(theirs & ours):
        if not (image(left / "samples" / name) == image(right / "samples" / name)).all():
            found.append(f"pixels of {name}")
    return found


def has_profile(file: Path) -> bool:
    """Return whether an image has a colour profile that is not sRGB."""
    with open_file(file) as image:
        profile = image.info.get("icc_profile")
        return bool(profile) and transform_to_srgb(profile, image.mode) is not None


def without_profiles(images: Path, copy: Path) -> Path:
    """Copy a folder of images, except those with a colour profile; return the copy."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if is_image_name(Path(name)) and has_profile(Path(folder, name))]

    return Path(shutil.copytree(images, copy, ignore=left_out))


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
    different = False
    with tempfile.TemporaryDirectory() as scratch:
        if asked.images is not None:
            real = without_profiles(asked.images, Path(scratch, "images"))
            runs["real"] = ("data=ghibli", f"data.root={real}")
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
                unmeant = [one for one in found if one not in MEANT]
                different = different or bool(unmeant)
                meant = "".join(f"\n  on purpose: {one}: {MEANT[one]}" for one in found if one in MEANT)
                print(f"{name}: {', '.join(unmeant) or 'equal to the bit'}{meant}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=REPO, check=True)
    raise SystemExit(different)


if __name__ == "__main__":
    main()
