"""Use a dashboard as a run does; read what TensorBoard and trackio have stored, by their own readers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from ghibli.evaluation.gain import Gain
from ghibli.training.loggers import tables
from ghibli.training.loggers.dashboard import DashboardLogger

Curve = list[tuple[int, float]]  # (step, value)

READ_TRACKIO = """
import json, sys
import trackio
from trackio.sqlite_storage import SQLiteStorage

runs = [
    {"name": run.name, "config": run.config, "alerts": run.alerts(),
     "logs": SQLiteStorage.get_logs(sys.argv[1], run=run.name, run_id=run.id)}
    for run in trackio.Api().runs(sys.argv[1])
]
print(json.dumps(runs, default=str))
"""


def use_all(logger: DashboardLogger) -> None:
    """Everything that a run does with a dashboard."""
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.log_image("samples", Image.new("RGB", (8, 8)), "caption", 1)
    rows = [{"epoch": 0} | {f"probe/val_gain{end}": 0.0 for end in ("", "_low", "_high")}]
    logger.log_table(tables.gain_curve(rows), 1)
    logger.log_table(tables.gain_by_timestep({"0-9": Gain(0.1, 0.1)}), 1)
    logger.log_finding("name", "text", 1)
    logger.log_summary({"best/val_gain": 0.5}, 1)
    logger.finalize("success")


def tensorboard_events(folder: Path) -> dict[str, Any]:
    """Curves, images and texts of a folder of event files: {"scalars": ..., "images": ..., "texts": ...}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})  # 0: keep them all
    events.Reload()
    tags = events.Tags()
    texts = [tag for tag in tags["tensors"] if tag.endswith("/text_summary")]
    return {
        "scalars": {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags["scalars"]},
        "images": {
            tag: [(one.step, one.encoded_image_string) for one in events.Images(tag)]
            for tag in tags["images"]
        },
        "texts": {
            tag.removesuffix("/text_summary"): [
                (one.step, one.tensor_proto.string_val[0].decode()) for one in events.Tensors(tag)
            ]
            for tag in texts
        },
        "charts": [one.tensor_proto.string_val[0] for one in events.Tensors("custom_scalars__config__")],
    }


def trackio_runs(folder: Path, project: str = "ghibli-lora-lab") -> list[dict[str, Any]]:
    """All runs in a store of trackio, by its own reader, in a process of its own: it reads one store each."""
    done = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO, project], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"TRACKIO_DIR": str(folder)},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def curves_of(logs: list[dict[str, Any]]) -> dict[str, Curve]:
    """The curves among trackio's logs."""
    found: dict[str, Curve] = {}
    for log in logs:
        for name, value in log.items():
            if isinstance(value, int | float) and name not in ("step", "timestamp"):
                found.setdefault(name, []).append((log["step"], value))
    return found
