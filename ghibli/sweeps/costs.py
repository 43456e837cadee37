"""What each kind of training costs: parameters, file size, seconds per epoch, memory."""

import math
from pathlib import Path
from statistics import median

from rich.table import Table
from safetensors import safe_open

from ghibli.config.paths import ADAPTER_FILE
from ghibli.runtime.console import full_width
from ghibli.runtime.files import read_rows
from ghibli.sweeps.evaluations import evaluated, unique_names
from ghibli.sweeps.trials import Trial

COSTS = ("trainable", "file", "seconds per epoch", "peak memory")


def cost_rows(trials: list[Trial]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (model name, its COSTS as text) of every model that was trained."""
    trained = [trial for trial in trials if trial.settings.get("finetune") != "none"]
    return [(name, trial_costs(trial)) for name, trial in zip(unique_names(trained), trained, strict=True)]


def trial_costs(trial: Trial) -> tuple[str, ...]:
    """Return one model's COSTS as text; `-` where its folder does not say."""
    files = [*trial.run.adapter.glob(ADAPTER_FILE), *trial.run.unet.glob("*.safetensors")]
    parameters = sum(parameters_in(file) for file in files)
    size = sum(file.stat().st_size for file in files)
    seconds, memory = seconds_per_epoch(trial), trial.status.get("peak_memory")
    return (
        f"{parameters:,}" if files else "-",
        f"{size / 1e6:.1f} MB" if files else "-",
        "-" if seconds is None else f"{seconds:.1f}",
        "-" if memory is None else f"{memory / 2**30:.2f} GiB",
    )


def parameters_in(file: Path) -> int:
    """Count the parameters in a .safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118


def seconds_per_epoch(trial: Trial) -> float | None:
    """Compute the seconds per epoch from the median speed in metrics.csv; None if not recorded.

    Only training counts, without validation and image grids.
    """
    speeds = [float(row["time/images_per_second"]) for row in read_rows(trial.run.metrics)]
    settings, status = trial.settings, trial.status
    if not speeds or not status.get("epoch"):
        return None
    batch = settings["data.batch_size"] * settings["trainer.accumulate_grad_batches"]
    return status["step"] / status["epoch"] * batch * status.get("devices", 1) / median(speeds)


def cost_table(trials: list[Trial]) -> Table | None:
    """Tabulate the costs of every evaluated model; None if there is none."""
    rows = cost_rows([trial for trial, _ in evaluated(trials)])
    if not rows:
        return None
    table = Table(title="costs", box=None, pad_edge=False, title_justify="left")
    for name in ("model", *COSTS):
        is_name = name == "model"
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name)
    for name, values in rows:
        table.add_row(name, *values)
    return full_width(table)
