"""The slides' table of a study: models x cells, what each cost, and all of them on the slides' prompts."""

import math
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from safetensors import safe_open

from ghibli.progress import counted
from ghibli.records import read_rows
from ghibli.run_dir import write_atomically, write_text
from ghibli.sampling import Cell, cells_of, compose_grid, draw_cells
from ghibli.study import Trial
from ghibli.trained import config_of, starting_base, trained_base

NAMES = {"none": "untouched base", "full": "all weights"}


def evaluated(trials: list[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
    """The trials that were evaluated, with their evaluation.json."""
    found = [(trial, trial.run.read_evaluation()) for trial in trials]
    return [(trial, result) for trial, result in found if is_usable(result)]


def is_usable(result: dict[str, Any]) -> bool:
    """True for the content of an evaluation.json in which every row has its cell and its distance."""
    try:
        rows = [row for own in (result["models"]["base"], *result["models"].values()) for row in own]
        cells = [(str(row["sampler"]), float(row["guidance"]), *map(float, row["kernel"])) for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return all(len(cell) == 4 for cell in cells)


def name_of(trial: Trial) -> str:
    """`LoRA, trained at guidance 7.5`, and what else was chosen."""
    kind = trial.settings.get("finetune")
    if kind in NAMES:
        return NAMES[kind]
    return f"LoRA, trained at guidance {trial.settings.get('loss.guidance'):g}"


def cell_rows(trials: list[Trial]) -> tuple[list[Cell], list[tuple[str, list[dict | None]]]]:
    """(cells, (model, its row of evaluation.json in each cell or None)); the base first."""
    found = evaluated(trials)
    models = {} if not found else {"untouched base": found[0][1]["models"]["base"]}
    for trial, result in found:
        if "run" in result["models"]:
            name = name_of(trial)
            models[name if name not in models else f"{name} ({trial.run.path.name})"] = result["models"][
                "run"
            ]
    every = {(row["sampler"], row["guidance"]) for rows in models.values() for row in rows}
    cells = [Cell(*cell) for cell in sorted(every, key=lambda cell: (cell[0] != "ddpm", cell[1]))]
    by_cell = {
        name: {(row["sampler"], row["guidance"]): row for row in rows} for name, rows in models.items()
    }
    return cells, [
        (name, [own.get((cell.sampler, cell.guidance)) for cell in cells]) for name, own in by_cell.items()
    ]


def cell_table(trials: list[Trial]) -> Table | None:
    """The kernel distance to real pictures of every model in every cell; None when nothing was evaluated."""
    cells, rows = cell_rows(trials)
    if not rows:
        return None
    table = Table(title="kernel distance to real pictures", box=None, pad_edge=False, title_justify="left")
    table.add_column("model")
    for cell in cells:
        table.add_column(f"{cell.sampler.upper()} {cell.guidance:g}", justify="right", no_wrap=True)
    for name, own in rows:
        table.add_row(name, *(shown(row) for row in own))
    return table


def shown(row: dict[str, Any] | None) -> str:
    """`0.58 +- 0.22`."""
    return "" if row is None else "{:.2f} +- {:.2f}".format(*row["kernel"])


def write_cells(folder: Path, trials: list[Trial]) -> Path | None:
    """cells.md: the same table and the costs, to paste."""
    cells, rows = cell_rows(trials)
    if not rows:
        return None
    head = ["model", *(f"{cell.sampler.upper()} {cell.guidance:g}" for cell in cells)]
    lines = [head, ["---"] * len(head), *([name, *map(shown, own)] for name, own in rows)]
    costs = [["model", *COSTS], ["---"] * (1 + len(COSTS))]
    costs += [[name, *values] for name, values in cost_rows([trial for trial, _ in evaluated(trials)])]
    text = "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in part) for part in (lines, costs))
    file = folder / "cells.md"
    write_text(file, "\n\n".join([text, *notes(trials)]) + "\n")
    return file


def notes(trials: list[Trial]) -> list[str]:
    """What one must know beside the table: the floor."""
    real = [result for _, result in evaluated(trials) if {"real", "floor_pictures"} <= result.keys()][:1]
    return [f"Floor of {result['floor_pictures']} real pictures: {shown(result['real'])}." for result in real]


COSTS = ("trainable", "file", "seconds per epoch", "peak memory")


def cost_rows(trials: list[Trial]) -> list[tuple[str, tuple[str, ...]]]:
    """Trainable parameters, size of the file, time and memory of every model that was trained."""
    return [(name_of(trial), cost(trial)) for trial in trials if trial.settings.get("finetune") != "none"]


def cost(trial: Trial) -> tuple[str, ...]:
    """One model's costs as text; `-` where the folder does not tell."""
    files = [*trial.run.adapter.glob("*.safetensors"), *trial.run.unet.glob("*.safetensors")]
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
    """Numbers in a .safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118


def seconds_per_epoch(trial: Trial) -> float | None:
    """Training alone, without validation and grids, from the median speed in metrics.csv."""
    speeds = [float(row["time/images_per_second"]) for row in read_rows(trial.run.metrics)]
    settings, status = trial.settings, trial.status
    if not speeds or not status.get("epoch"):
        return None
    batch = settings["data.batch_size"] * settings["trainer.accumulate_grad_batches"]
    return status["step"] / status["epoch"] * batch * status.get("devices", 1) / median(speeds)


def cost_table(trials: list[Trial]) -> Table | None:
    """What every evaluated model cost; None when there is none."""
    rows = cost_rows([trial for trial, _ in evaluated(trials)])
    if not rows:
        return None
    table = Table(title="what it cost", box=None, pad_edge=False, title_justify="left")
    for name in ("model", *COSTS):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, values in rows:
        table.add_row(name, *values)
    return table


def write_models(folder: Path, trials: list[Trial]) -> Path | None:
    """models.png: the sample prompts drawn by every evaluated model from the same start noise."""
    found = [trial for trial, _ in evaluated(trials) if trial.settings.get("finetune") != "none"]
    if not found:
        return None
    configs = [config_of(trial.run) for trial in found]
    widest = max(configs, key=lambda config: config.loss.guidance)
    cells, sample = cells_of(widest.sample, widest.loss.guidance), widest.sample
    bases = [("base", lambda: starting_base(configs[0]))]
    for trial, config in zip(found, configs, strict=True):
        label = {"full": "all weights"}.get(config.finetune, f"LoRA {config.loss.guidance:g}")
        bases.append((label, lambda trial=trial, config=config: trained_base(trial.run, config)))
    rows = []
    with counted("drawing the slides' prompts") as on_progress:
        for number, (label, load) in enumerate(bases):
            rows.append((label, draw_cells(load(), sample, cells, widest.model.resolution)))
            on_progress(number + 1, len(bases))
    title = f"{folder.name}\nsame start noise in every tile of a prompt"
    grid = compose_grid(rows, sample.prompts, [cell.label for cell in cells], title)
    file = folder / "models.png"
    write_atomically(file, lambda opened: grid.save(opened, format="PNG"))
    return file
