"""The comparison table of the reference study: models x cells, notes below it, and models.png.

A cell is a sampler with a guidance scale; a model is an untouched base or an evaluated training.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ghibli.adapters.trained import starting_base, trained_base
from ghibli.config.registry import SAMPLERS, sampler_label
from ghibli.config.schema import Config, SampleConfig
from ghibli.diffusion.process import usual_guidance
from ghibli.diffusion.samplers import Cell, cells_of, draw_cells
from ghibli.evaluation.features import ReferenceSet, distance_names
from ghibli.images.grid import compose_grid
from ghibli.models.base import BaseModel
from ghibli.runs.settings import finished_config
from ghibli.runtime.console import counted, full_width
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole, write_atomically, write_text
from ghibli.sweeps.costs import COSTS, cost_rows
from ghibli.sweeps.evaluations import UNGUIDED_NAMES, evaluated, short_model_name, unique_names
from ghibli.sweeps.trials import Trial

logger = logging.getLogger(__name__)

COMPARED = 4  # how many models are compared in pairs: those nearest to real images
CellScores = dict[str, Any]  # of one model in one cell, as in evaluation.json


@dataclass(frozen=True)
class ComparedModel:
    """One line of the table."""

    name: str
    trial: Trial | None  # None for an untouched base
    rows: list[CellScores]


def models_of(trials: list[Trial]) -> list[ComparedModel]:
    """Return the untouched bases, each once, then every evaluated training."""
    found = evaluated(trials)
    trained = [(trial, result) for trial, result in found if "run" in result["models"]]
    names = unique_names([trial for trial, _ in trained])
    models = [
        ComparedModel(name, trial, result["models"]["run"])
        for name, (trial, result) in zip(names, trained, strict=True)
    ]
    bases: dict[tuple, ComparedModel] = {}  # bases with equal scores are one
    for name, (_, result) in zip(unique_names([trial for trial, _ in found]), found, strict=True):
        rows = result["models"]["base"]
        scores = tuple((row["sampler"], row["guidance"], *row["kernel"]) for row in rows)
        bases.setdefault(scores, ComparedModel(f"base of: {name}", None, rows))
    if len(bases) == 1:
        return [replace(base, name=UNGUIDED_NAMES["none"]) for base in bases.values()] + models
    return [*bases.values(), *models]


def cells_in(models: list[ComparedModel]) -> list[Cell]:
    """Return every cell that any of the models was sampled in, in the order of the samplers."""
    every = {(row["sampler"], row["guidance"]) for model in models for row in model.rows}
    order = list(dict.fromkeys([*SAMPLERS, *sorted(sampler for sampler, _ in every)]))
    return [Cell(*cell) for cell in sorted(every, key=lambda cell: (order.index(cell[0]), cell[1]))]


def in_cells(model: ComparedModel, cells: list[Cell]) -> list[CellScores | None]:
    """Return the model's scores in each of these cells, None where it was not sampled."""
    own = {(row["sampler"], row["guidance"]): row for row in model.rows}
    return [own.get((cell.sampler, cell.guidance)) for cell in cells]


def cell_rows(trials: list[Trial]) -> tuple[list[Cell], list[tuple[str, list[CellScores | None]]]]:
    """Return (cells, (model name, its scores in each cell or None)), the base first."""
    models = models_of(trials)
    cells = cells_in(models)
    return cells, [(model.name, in_cells(model, cells)) for model in models]


def table_title(trials: list[Trial]) -> str:
    """Return what the numbers of the table measure."""
    kinds = {result.get("features") for _, result in evaluated(trials)}
    return f"{' / '.join(sorted(distance_names(kind)[0] for kind in kinds))} to real images"


def cell_table(trials: list[Trial]) -> Table | None:
    """Tabulate every model's kernel distance to real images in every cell; None if nothing was evaluated."""
    cells, rows = cell_rows(trials)
    if not rows:
        return None
    table = Table(title=table_title(trials), box=None, pad_edge=False, title_justify="left")
    table.add_column("model")
    for cell in cells:
        table.add_column(cell.short_label, justify="right", no_wrap=True)
    for name, own in rows:
        table.add_row(name, *(kernel_text(row) for row in own))
    return full_width(table)


def kernel_text(row: CellScores | None) -> str:
    """Format the kernel distance with its standard error: `0.58 +- 0.22`; empty for None."""
    return "" if row is None else "{:.2f} +- {:.2f}".format(*row["kernel"])


def write_cells(folder: Path, trials: list[Trial]) -> Path | None:
    """Write cells.md and return its path, None if nothing was evaluated.

    It holds the same table, the costs and the notes as Markdown, to paste.
    """
    cells, rows = cell_rows(trials)
    if not rows:
        return None
    head = ["model", *(cell.short_label for cell in cells)]
    distances = [head, ["---"] * len(head), *([name, *map(kernel_text, own)] for name, own in rows)]
    costs = [["model", *COSTS], ["---"] * (1 + len(COSTS))]
    costs += [[name, *values] for name, values in cost_rows([trial for trial, _ in evaluated(trials)])]
    tables = ["\n".join(f"| {' | '.join(line)} |" for line in table) for table in (distances, costs)]
    file = folder / "cells.md"
    write_text(file, "\n\n".join([*tables, *table_notes(trials), *paired_comparisons(trials)]) + "\n")
    return file


def table_notes(trials: list[Trial]) -> list[str]:
    """Return the notes that a reader of the table needs.

    They name the floor, say why a guided cell looks bad, and repeat the doctor's findings.
    """
    found = [result for _, result in evaluated(trials)]
    floors = [
        f"Floor, {result['floor_images']} real images: {kernel_text(result['real'])}."
        for result in found
        if "floor_images" in result and "real" in result
    ]
    findings = [
        f"{finding['name']}: {finding['text']}." for result in found for finding in result.get("findings", [])
    ]
    return [*dict.fromkeys(floors), *unguided_cell_notes(trials), *dict.fromkeys(findings)]


def unguided_cell_notes(trials: list[Trial]) -> list[str]:
    """Explain why a model trained with guidance looks bad when sampled without, if a cell shows it."""
    guided = {
        model.trial.settings.get("loss.guidance", 1)
        for model in models_of(trials)
        if model.trial is not None and any(row["guidance"] == 1 for row in model.rows)
    }
    return [
        f"A model trained at guidance {scale:g} is not made to be sampled at 1: its images are mush there, "
        f"which does not mean that training failed; its own scale is about {usual_guidance(scale):g}."
        for scale in sorted(guided - {1})
    ]


def paired_comparisons(trials: list[Trial]) -> list[str]:
    """Compare the nearest models in pairs, each in its best cell: same prompts, same start noise.

    Empty if they were not measured against the same images, or the cache no longer has their features.
    """
    found = [result for _, result in evaluated(trials)]
    keys = ("cache_dir", "reference_file", "units_file", "features")
    older = {"units_file": "reference_file"}  # their distances were in the reference's own units
    references = {
        tuple(str(result.get(key, result.get(older.get(key, key)))) for key in keys) for result in found
    }
    if len(references) != 1:
        return []
    cache_dir, reference_file, units_file, kind = references.pop()
    best = [(model.name, min(model.rows, key=lambda row: row["kernel"][0])) for model in models_of(trials)]
    best = sorted(best, key=lambda one: one[1]["kernel"][0])[:COMPARED]
    files = [reference_file, units_file, *(str(row.get("file")) for _, row in best)]
    real, units, *stored = [features_in(Path(cache_dir) / "evaluation" / file) for file in files]
    sampled = [rows for rows in stored if rows is not None]
    if (
        real is None
        or units is None
        or len(sampled) < len(stored)
        or len({len(rows) for rows in sampled}) != 1
    ):
        return []
    reference = ReferenceSet(real, units if kind == "style" else None)
    lines = []
    for ((near, row), ours), ((far, other), theirs) in combinations(zip(best, sampled, strict=True), 2):
        behind = reference.difference(theirs, ours)
        lines.append(
            f"{far} ({cell_label(other)}) is farther from real images than {near} ({cell_label(row)}) by "
            f"{behind.value:.2f} +- {behind.standard_error:.2f}, in pairs."
        )
    return lines


def cell_label(row: CellScores) -> str:
    """Format a cell as sampler and guidance scale: `DDIM 7.5`."""
    return f"{sampler_label(row['sampler'])} {row['guidance']:g}"


def features_in(file: Path) -> torch.Tensor | None:
    """Read the features (N, D) that an evaluation left in the cache; None if they are gone or damaged."""
    return torch.load(file, weights_only=True)["features"] if is_whole(file) else None


def write_models(folder: Path, trials: list[Trial]) -> Path | None:
    """Write models.png and return its path, None if no trained model can be drawn.

    It shows the sample prompts drawn by every evaluated model from the same start noise.
    """
    trained = [trial for trial, _ in evaluated(trials) if trial.settings.get("finetune") != "none"]
    found = [(trial, config) for trial in trained if (config := config_or_none(trial)) is not None]
    if not found:
        return None
    widest = max((config for _, config in found), key=lambda config: config.loss.own_guidance)
    sample, cells = widest.sample, cells_for(widest.sample, [config for _, config in found])
    labels = unique_names([trial for trial, _ in found], short_model_name, "\n")
    loaders = base_loaders([config for _, config in found])
    for label, (trial, config) in zip(labels, found, strict=True):
        loaders.append((label, partial(trained_base, trial.run, config)))
    rows = []
    with counted("drawing the sample prompts") as on_progress:
        for number, (label, load) in enumerate(loaders):
            rows.append((label, draw_cells(load(), sample, cells, widest.model.resolution)))
            on_progress(number + 1, len(loaders))
    title = f"{folder.name}\nsame start noise in every tile of a prompt"
    grid = compose_grid(rows, sample.prompts, [cell.label for cell in cells], title)
    file = folder / "models.png"
    write_atomically(file, lambda opened: grid.save(opened, format="PNG"))
    return file


def cells_for(sample: SampleConfig, configs: list[Config]) -> list[Cell]:
    """Return the cells of a grid with the scales of `sample` and the own scale of each of these trainings."""
    guided = sorted({config.loss.own_guidance for config in configs} - {1})
    scales = dict.fromkeys([*sample.guidance, *map(usual_guidance, guided)])
    return cells_of(replace(sample, guidance=list(scales)), 1)


def config_or_none(trial: Trial) -> Config | None:
    """Return a finished trial's settings; None, and a printed line, for any other."""
    try:
        return finished_config(trial.run)
    except UserError as error:
        logger.warning(f"models.png leaves one trial out: {error}")
        return None


def base_loaders(configs: list[Config]) -> list[tuple[str, Callable[[], BaseModel]]]:
    """Return (label, function that loads it) of every base that these trainings start from."""
    bases = {(c.model.path, c.model.adapter, c.model.adapter_scale): c for c in configs}
    labels = ["base"] if len(bases) == 1 else [f"base of\n{path}" for path, *_ in bases]
    return [
        (label, partial(starting_base, config)) for label, config in zip(labels, bases.values(), strict=True)
    ]
