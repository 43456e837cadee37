"""The slides' table of a study: models x cells, what each cost, and all of them on the slides' prompts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from safetensors import safe_open

from ghibli.base_model import BaseModel
from ghibli.features import called
from ghibli.lora import ADAPTER_FILE
from ghibli.mistakes import UserMistake
from ghibli.progress import console, counted, whole
from ghibli.records import read_rows
from ghibli.sampling import GUIDED_SCALE, Cell, cells_of, compose_grid, draw_cells
from ghibli.schema import Config
from ghibli.study import Trial, varied
from ghibli.trained import config_of, starting_base, trained_base
from ghibli.trial import shown as value
from ghibli.whole_files import is_whole, write_atomically, write_text
from ghibli.yardstick import Reference

NAMES = {"none": "untouched base", "full": "all weights"}
COMPARED = 4  # models that are compared in pairs, the nearest to real pictures


@dataclass(frozen=True)
class Model:
    """One line of the table."""

    name: str
    trial: Trial | None  # None for an untouched base
    rows: list[dict[str, Any]]  # of evaluation.json, one for each cell


def evaluated(trials: list[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
    """The trials that were evaluated since they were trained, with their evaluation.json."""
    found = [(trial, trial.run.read_evaluation()) for trial in trials]
    return [(trial, result) for trial, result in found if is_usable(result)]


def is_usable(result: dict[str, Any]) -> bool:
    """True for the content of an evaluation.json in which all is there that the tables show."""
    try:
        rows = [row for own in (result["models"]["base"], *result["models"].values()) for row in own]
        pairs = [row["kernel"] for row in (*rows, *([result["real"]] if "real" in result else []))]
        words = [row["sampler"] for row in rows]
        words += [finding[part] for finding in result.get("findings", []) for part in ("name", "text")]
        numbers = [row["guidance"] for row in rows] + [number for pair in pairs for number in pair]
        whole = all(result["models"].values()) and all(len(pair) == 2 for pair in pairs)
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        whole
        and all(isinstance(word, str) for word in words)
        and all(isinstance(number, int | float) for number in numbers)
    )


def name_of(trial: Trial) -> str:
    """`LoRA, trained at guidance 7.5`."""
    kind = trial.settings.get("finetune")
    return NAMES.get(kind) or f"LoRA, trained at guidance {trial.settings.get('loss.guidance'):g}"


def short_name(trial: Trial) -> str:
    """`LoRA 7.5`, for beside a picture."""
    kind = trial.settings.get("finetune")
    return NAMES.get(kind) or f"LoRA {trial.settings.get('loss.guidance'):g}"


def names_of(trials: list[Trial], name: Callable[[Trial], str] = name_of, separator: str = ", ") -> list[str]:
    """A name for each that tells it apart: models of one name say what varies among them, or their folder."""
    plain, names = [name(trial) for trial in trials], []
    for own, trial in zip(plain, trials, strict=True):
        same = [other for other, their in zip(trials, plain, strict=True) if their == own]
        words = [f"{key.split('.')[-1]} {value(trial.settings.get(key))}" for key in varied(same)]
        names.append(separator.join([own, *words]))
    for folder in (lambda trial: trial.run.path.name, lambda trial: str(trial.run.path)):
        names = [
            f"{own} ({folder(trial)})" if names.count(own) > 1 else own
            for own, trial in zip(names, trials, strict=True)
        ]
    return names


def models_of(trials: list[Trial]) -> list[Model]:
    """The untouched bases, then every evaluated training."""
    found = evaluated(trials)
    trained = [(trial, result) for trial, result in found if "run" in result["models"]]
    names = names_of([trial for trial, _ in trained])
    models = [
        Model(name, trial, result["models"]["run"])
        for name, (trial, result) in zip(names, trained, strict=True)
    ]
    bases: dict[tuple, Model] = {}
    for name, (_, result) in zip(names_of([trial for trial, _ in found]), found, strict=True):
        rows = result["models"]["base"]
        scores = tuple((row["sampler"], row["guidance"], *row["kernel"]) for row in rows)
        bases.setdefault(scores, Model(f"base of: {name}", None, rows))
    if len(bases) == 1:
        return [replace(base, name=NAMES["none"]) for base in bases.values()] + models
    return [*bases.values(), *models]


def cells_in(models: list[Model]) -> list[Cell]:
    """Every cell that one of them was drawn in; DDPM first."""
    every = {(row["sampler"], row["guidance"]) for model in models for row in model.rows}
    return [Cell(*cell) for cell in sorted(every, key=lambda cell: (cell[0] != "ddpm", cell[1]))]


def in_cells(model: Model, cells: list[Cell]) -> list[dict[str, Any] | None]:
    """Its row in each cell, None where it was not drawn."""
    own = {(row["sampler"], row["guidance"]): row for row in model.rows}
    return [own.get((cell.sampler, cell.guidance)) for cell in cells]


def cell_rows(trials: list[Trial]) -> tuple[list[Cell], list[tuple[str, list[dict | None]]]]:
    """(cells, (model, its row of evaluation.json in each cell or None)); the base first."""
    models = models_of(trials)
    cells = cells_in(models)
    return cells, [(model.name, in_cells(model, cells)) for model in models]


def title_of(trials: list[Trial]) -> str:
    """What the numbers of the table are."""
    kinds = {result.get("features") for _, result in evaluated(trials)}
    return f"{' / '.join(sorted(called(kind)[0] for kind in kinds))} to real pictures"


def cell_table(trials: list[Trial]) -> Table | None:
    """The kernel distance to real pictures of every model in every cell; None when nothing was evaluated."""
    cells, rows = cell_rows(trials)
    if not rows:
        return None
    table = Table(title=title_of(trials), box=None, pad_edge=False, title_justify="left")
    table.add_column("model")
    for cell in cells:
        table.add_column(f"{cell.sampler.upper()} {cell.guidance:g}", justify="right", no_wrap=True)
    for name, own in rows:
        table.add_row(name, *(shown(row) for row in own))
    return whole(table)


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
    write_text(file, "\n\n".join([text, *notes(trials), *comparisons(trials)]) + "\n")
    return file


def notes(trials: list[Trial]) -> list[str]:
    """What one must know beside the table: the floor, why a cell looks as it does, too few pictures."""
    found = [result for _, result in evaluated(trials)]
    floors = [
        f"Floor, {result['floor_pictures']} real pictures: {shown(result['real'])}."
        for result in found
        if "floor_pictures" in result and "real" in result
    ]
    findings = [
        f"{finding['name']}: {finding['text']}." for result in found for finding in result.get("findings", [])
    ]
    return [*dict.fromkeys(floors), *mush(trials), *dict.fromkeys(findings)]


def mush(trials: list[Trial]) -> list[str]:
    """Why a guided training sampled without guidance looks as it does, where the table has such a cell."""
    guided = {
        model.trial.settings.get("loss.guidance", 1)
        for model in models_of(trials)
        if model.trial is not None and any(row["guidance"] == 1 for row in model.rows)
    }
    return [
        f"Trained at guidance {scale:g} a model learns to undo that guidance: sampled at 1 its pictures are "
        f"mush, which is no failed training; its own scale is about {GUIDED_SCALE * scale:g}."
        for scale in sorted(guided - {1})
    ]


def comparisons(trials: list[Trial]) -> list[str]:
    """The nearest models in pairs, each in its best cell: same prompts, same start noise.

    Empty where they were not measured against the same pictures, or the cache no longer has them.
    """
    found = [result for _, result in evaluated(trials)]
    keys = ("cache_dir", "reference_file", "features")
    places = {tuple(str(result.get(key)) for key in keys) for result in found}
    best = [(model.name, min(model.rows, key=lambda row: row["kernel"][0])) for model in models_of(trials)]
    best = sorted(best, key=lambda one: one[1]["kernel"][0])[:COMPARED]
    if len(places) != 1:
        return []
    cache_dir, reference_file, kind = places.pop()
    files = [reference_file, *(str(row.get("file")) for _, row in best)]
    features = [features_in(Path(cache_dir) / "evaluation" / file) for file in files]
    if any(rows is None for rows in features) or len({len(rows) for rows in features[1:]}) != 1:
        return []
    reference = Reference(features[0], standardise=kind == "style")
    lines = []
    for ((near, row), ours), ((far, other), theirs) in combinations(zip(best, features[1:], strict=True), 2):
        behind = reference.difference(theirs, ours)
        lines.append(
            f"{far} ({label_of(other)}) is farther from real pictures than {near} ({label_of(row)}) by "
            f"{behind.value:.2f} +- {behind.standard_error:.2f}, in pairs."
        )
    return lines


def label_of(row: dict[str, Any]) -> str:
    """`DDIM 7.5`."""
    return f"{row['sampler'].upper()} {row['guidance']:g}"


def features_in(file: Path) -> torch.Tensor | None:
    """The features that an evaluation left in the cache; None when they are gone."""
    return torch.load(file, weights_only=True)["features"] if is_whole(file) else None


COSTS = ("trainable", "file", "seconds per epoch", "peak memory")


def cost_rows(trials: list[Trial]) -> list[tuple[str, tuple[str, ...]]]:
    """Trainable parameters, size of the file, time and memory of every model that was trained."""
    trained = [trial for trial in trials if trial.settings.get("finetune") != "none"]
    return [(name, cost(trial)) for name, trial in zip(names_of(trained), trained, strict=True)]


def cost(trial: Trial) -> tuple[str, ...]:
    """One model's costs as text; `-` where the folder does not tell."""
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
    return whole(table)


def write_models(folder: Path, trials: list[Trial]) -> Path | None:
    """models.png: the sample prompts drawn by every evaluated model from the same start noise."""
    trained = [trial for trial, _ in evaluated(trials) if trial.settings.get("finetune") != "none"]
    found = [(trial, config) for trial in trained if (config := config_or_none(trial)) is not None]
    if not found:
        return None
    widest = max((config for _, config in found), key=lambda config: config.loss.guidance)
    cells, sample = cells_of(widest.sample, widest.loss.guidance), widest.sample
    labels = names_of([trial for trial, _ in found], short_name, "\n")
    loaders = base_loaders([config for _, config in found])
    for label, (trial, config) in zip(labels, found, strict=True):
        loaders.append((label, lambda trial=trial, config=config: trained_base(trial.run, config)))
    rows = []
    with counted("drawing the slides' prompts") as on_progress:
        for number, (label, load) in enumerate(loaders):
            rows.append((label, draw_cells(load(), sample, cells, widest.model.resolution)))
            on_progress(number + 1, len(loaders))
    title = f"{folder.name}\nsame start noise in every tile of a prompt"
    grid = compose_grid(rows, sample.prompts, [cell.label for cell in cells], title)
    file = folder / "models.png"
    write_atomically(file, lambda opened: grid.save(opened, format="PNG"))
    return file


def config_or_none(trial: Trial) -> Config | None:
    """A finished trial's settings; None, and a line, for any other."""
    try:
        return config_of(trial.run)
    except UserMistake as mistake:
        console.print(f"models.png leaves one out: {mistake}", style="yellow")
        return None


def base_loaders(configs: list[Config]) -> list[tuple[str, Callable[[], BaseModel]]]:
    """(label, how to load it) of every base that these trainings start from."""
    bases = {(c.model.path, c.model.adapter, c.model.adapter_scale): c for c in configs}
    labels = ["base"] if len(bases) == 1 else [f"base of\n{path}" for path, *_ in bases]
    return [
        (label, lambda config=config: starting_base(config))
        for label, config in zip(labels, bases.values(), strict=True)
    ]
