"""An environment without W&B settings, and the records of an offline run."""

import json
import os
import subprocess
import sys
from pathlib import Path


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return kept | {"HF_HUB_OFFLINE": "1"} | extra


def offline_records(folder: Path) -> list[dict]:
    """The records of the run's W&B file, by wandb's own reader."""
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_curves(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """The curves among the records of a run, over the optimiser step."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        item = record["history"]["item"] if record["type"] == "history" else {}
        for name, value in item.items():
            if isinstance(value, int | float) and not name.startswith("_"):
                curves.setdefault(name, []).append((item["trainer/global_step"], value))
    return curves
