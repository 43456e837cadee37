"""What `ghibli evaluate` measured: models x cells, the guidance scan, copies."""

from dataclasses import dataclass
from typing import Any

from ghibli.diffusion.samplers import Cell
from ghibli.evaluation.features import distance_names
from ghibli.report.charts import COLOURS, Figure, Series, curves
from ghibli.report.run_data import RunData, attempt
from ghibli.report.text import Scan, copies, rule_holds
from ghibli.runs.identity import differences
from ghibli.sweeps.comparison import (
    cells_in,
    in_cells,
    kernel_text,
    models_of,
    paired_comparisons,
    unguided_cell_notes,
)
from ghibli.sweeps.evaluations import model_name

MOST_SENTENCES = 4


@dataclass(frozen=True)
class Model:
    """One evaluated training, under the name that the tables give it."""

    name: str
    part: RunData

    @property
    def guidance(self) -> float:
        return self.part.evaluation["training_guidance"]

    @property
    def scan(self) -> Scan:
        """(scale / training guidance, distance, error), ascending."""
        return over(self.part.evaluation["scan"].get("run", {}), self.guidance)


def over(scan: dict[str, list[float]], guidance: float) -> Scan:
    """One model's scan with the scale divided by its training guidance."""
    return sorted((float(scale) / guidance, *pair) for scale, pair in scan.items())


def evaluation(parts: list[RunData]) -> dict[str, Any] | None:
    """All that the page shows of evaluations; None when no run has one."""
    usable = [part for part in parts if part.evaluation and attempt(lambda part=part: model_name(part.trial))]
    if not usable:
        return None
    trials, part_of = [part.trial for part in usable], {id(part.trial): part for part in usable}
    lines = models_of(trials)
    cells = cells_in(lines)
    rows = [(line.name, in_cells(line, cells)) for line in lines]
    trained = [(line, own) for line, (_, own) in zip(lines, rows, strict=True) if line.trial is not None]
    models = [Model(line.name, part_of[id(line.trial)]) for line, _ in trained]
    scanned = next((part for part in usable if part.evaluation["scan"].get("base")), usable[0])
    real, kinds = usable[0].evaluation["real"], [part.evaluation.get("features") for part in usable]
    return {
        "columns": [f"{cell.sampler.upper()} {cell.guidance:g}" for cell in cells],
        "rows": [(name, [cell_text(row, own) for row in own]) for name, own in rows],
        "real": cell_text(real, []),
        "sizes": sizes(usable),
        "names": [name.replace("Frechet", "Fr\u00e9chet") for name in distance_names(kinds[0])],
        "copies": [(line.name, said) for line, own in trained if (said := copying(own, rows[0][1], cells))],
        "notes": [*unguided_cell_notes(trials), *paired_comparisons(trials)],
        "scan": scan_figure(scanned, models),
        "scan_words": scan_words(models),
    }


def sizes(parts: list[RunData]) -> str:
    """How much was drawn and measured, and whether that is the same for all."""
    keys = ("samples", "reference_images", "num_inference_steps", "features")
    found = dict.fromkeys(tuple(part.evaluation.get(key) for key in keys) for part in parts)
    (samples, images, steps, features), *others = found
    words = f"{samples} samples a cell, {images} real images, {steps} steps, {features} features."
    floor = parts[0].evaluation.get("floor_images")
    words += f" The floor is that of {floor} training images." if floor else ""
    return words + (" Not all runs were measured in this way, so they compare badly." if others else "")


def cell_text(row: dict[str, Any] | None, own: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One cell of the table in words; `best` marks the lowest distance in a row of cells."""
    if row is None:
        return None
    captions, below = row.get("caption_fit"), row.get("kernel_minus_base")
    return {
        "kernel": kernel_text(row),
        "frechet": f"{row['frechet']:.1f}",
        "captions": None if captions is None else f"{captions[0]:.1f} +- {captions[1]:.1f}",
        "precision": f"{100 * row['precision']:.0f} %" if "precision" in row else None,
        "recall": f"{100 * row['recall']:.0f} %",
        "below": None if below is None else f"{-below[0]:+.2f} +- {below[1]:.2f}",
        "best": row is lowest(own),
    }


def lowest(own: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The row with the lowest kernel distance."""
    return min((row for row in own if row is not None), key=lambda row: row["kernel"][0], default=None)


def copying(own: list[dict | None], base: list[dict | None], cells: list[Cell]) -> str | None:
    """What the best cell says about copies of training images; None where it was not measured."""
    best = lowest(own)
    if best is None or not isinstance(best.get("copying"), float):
        return None
    column = next(k for k, row in enumerate(own) if row is best)
    beside = (base[column] or {}).get("copying")
    return f"{cells[column].label}: {copies(best['copying'], beside)}."


def scan_figure(scanned: RunData, models: list[Model]) -> Figure | None:
    """Distance over scale / training guidance for all trainings, on one logarithmic axis."""
    base = Series("untouched base", over(scanned.evaluation["scan"].get("base", {}), 1.0), "c5", dashed=True)
    few, kernel = len(models) < COLOURS, distance_names(scanned.evaluation.get("features"))[0]
    colours = [f"c{k}" if few else "c0" if model.guidance == 1 else "c1" for k, model in enumerate(models)]
    names = [model.name if few else f"all trained at guidance {model.guidance:g}" for model in models]
    series = [
        Series(name, model.scan, colour, dashed=model.guidance != 1)
        for name, model, colour in zip(names, models, colours, strict=True)
        if model.scan
    ]
    caption = "The sampling scale s over the training guidance w. Whiskers are 95 % intervals."
    figure = curves(
        "Distance over the scale", [*series, base], "s / w", f"{kernel} to real images",
        caption=caption, log=True, zero=True,
    )  # fmt: skip
    if figure is None or few:
        return figure
    return Figure(figure.title, figure.svg, figure.caption, list(dict.fromkeys(figure.legend)))


def scan_words(models: list[Model]) -> list[str]:
    """What the rule would look like, whether it holds, and which scale is best."""
    scanned = [model for model in models if model.scan]
    if not scanned:
        return []
    lines = [
        "If a training at guidance w, sampled at s, were an ordinary training sampled at s / w, an ordinary "
        "curve and a guided one would lie on each other here."
    ]
    ordinary = [model for model in scanned if model.guidance == 1]
    found = [(model, verdict_on(model, ordinary)) for model in scanned if model.guidance != 1]
    told = [(model, *verdict) for model, verdict in found if verdict is not None]
    if not told:
        why = "this page has no ordinary and no guided training whose scans overlap"
        return [*lines, f"Whether they do cannot be said: {why}.", *best_scales(scanned)]
    broken = [text for _, holds, text in told if not holds]
    if len(told) > MOST_SENTENCES:
        lines.append(f"In {len(broken)} of {len(told)} comparisons the rule does not hold.")
        told = [one for one in told if not one[1]][:1]
    lines += [f"{model.name}: {text}." for model, _, text in told]
    return lines + best_scales(scanned)


def verdict_on(guided: Model, ordinary: list[Model]) -> tuple[bool, str] | None:
    """Whether the rule holds beside the ordinary training that differs in the fewest settings."""
    own = guided.part.trial.settings
    nearest = min(
        ordinary, key=lambda model: sum(1 for _ in differences(own, model.part.trial.settings)), default=None
    )
    return None if nearest is None else rule_holds(nearest.scan, guided.scan)


def best_scales(models: list[Model]) -> list[str]:
    """At which scale each training is nearest to real images."""
    if len(models) > MOST_SENTENCES:
        return []
    lines = []
    for model in models:
        ratio, value, error = min(model.scan, key=lambda point: point[1])
        scale = f"{ratio * model.guidance:.3g}"
        lines.append(f"{model.name} is nearest to real images at scale {scale}: {value:.2f} +- {error:.2f}.")
    return lines
