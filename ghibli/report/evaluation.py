"""The evaluation section of a report page: models x cells, the guidance scan, copies of training images."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from ghibli.diffusion.samplers import Cell
from ghibli.evaluation.evaluate import steps_text
from ghibli.evaluation.features import distance_names
from ghibli.report.charts import COLOUR_COUNT, ChartAxes, Figure, Series, line_chart
from ghibli.report.run_data import RunData, try_read
from ghibli.report.text import Scan, copies_sentence, counted_copies, scale_rule_verdict
from ghibli.runs.settings import differences
from ghibli.sweeps.comparison import (
    CellScores,
    cells_in,
    in_cells,
    kernel_text,
    models_of,
    paired_comparisons,
    unguided_cell_notes,
)
from ghibli.sweeps.evaluations import model_name
from ghibli.sweeps.trials import Trial

MAX_SENTENCES = 4  # of one kind about the scan

EvaluationResult = dict[str, Any]  # the content of evaluation.json


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluated run that trained something, under its name in the tables."""

    name: str
    trial: Trial
    result: EvaluationResult

    @property
    def guidance(self) -> float:
        """The guidance scale of the training."""
        return self.result["training_guidance"]

    @property
    def scan(self) -> Scan:
        """The guidance scan of the trained model, ascending."""
        return relative_scan(self.result["scan"].get("run", {}), self.guidance)


def relative_scan(scan: dict[str, list[float]], guidance: float) -> Scan:
    """Return (sampling scale / training guidance, distance, error) of a scan of evaluation.json, sorted."""
    return sorted((float(scale) / guidance, distance, error) for scale, (distance, error) in scan.items())


def evaluation_section(runs: list[RunData]) -> dict[str, Any] | None:
    """Return what the page shows of evaluations; None if no run has one."""
    usable = [
        (data.trial, data.evaluation)
        for data in runs
        if data.evaluation and try_read(partial(model_name, data.trial))
    ]
    if not usable:
        return None
    trials, results = [trial for trial, _ in usable], [result for _, result in usable]
    result_of = {id(trial): result for trial, result in usable}
    models = models_of(trials)
    cells = cells_in(models)
    rows = [(model.name, in_cells(model, cells)) for model in models]
    trained = [(model, own) for model, (_, own) in zip(models, rows, strict=True) if model.trial is not None]
    evaluated = [
        EvaluatedRun(model.name, model.trial, result_of[id(model.trial)])
        for model in models
        if model.trial is not None
    ]
    with_base_scan = next((result for result in results if result["scan"].get("base")), results[0])
    copies = [(model.name, copies_in_best_cell(own, rows[0][1], cells)) for model, own in trained]
    return {
        "columns": [cell.short_label for cell in cells],
        "rows": [(name, [format_cell(row, own) for row in own]) for name, own in rows],
        "real": format_cell(results[0]["real"], []),
        "counts": sample_counts(results),
        "names": [
            name.replace("Frechet", "Fr\u00e9chet") for name in distance_names(results[0].get("features"))
        ],
        "copies": [(name, sentence) for name, sentence in copies if sentence],
        "notes": [*unguided_cell_notes(trials), *paired_comparisons(trials)],
        "scan": scan_chart(with_base_scan, evaluated),
        "scan_sentences": scan_sentences(evaluated),
    }


def sample_counts(results: list[EvaluationResult]) -> str:
    """Say how much was sampled and measured, and whether that is the same for all runs."""
    keys = ("samples", "reference_images", "features")
    found = dict.fromkeys((*(result.get(key) for key in keys), steps_text(result)) for result in results)
    (samples, images, features, steps), *others = found
    text = f"{samples} samples per cell, {images} real images, {steps}, {features} features."
    floor = results[0].get("floor_images")
    text += f" The floor is that of {floor} training images." if floor else ""
    return text + (" Not all runs were measured this way, so they compare badly." if others else "")


def format_cell(row: CellScores | None, own: list[CellScores | None]) -> dict[str, Any] | None:
    """Format one cell of the table; `best` marks the lowest kernel distance among the model's own cells."""
    if row is None:
        return None
    captions, minus_base, layout = (row.get(key) for key in ("caption_fit", "kernel_minus_base", "layout"))
    return {
        "kernel": kernel_text(row),
        "layout": None if layout is None else f"{layout[0]:.2f} +- {layout[1]:.2f}",
        "frechet": f"{row['frechet']:.1f}",
        "captions": None if captions is None else f"{captions[0]:.1f} +- {captions[1]:.1f}",
        "precision": f"{100 * row['precision']:.0f} %" if "precision" in row else None,
        "recall": f"{100 * row['recall']:.0f} %",
        "below": None if minus_base is None else f"{-minus_base[0]:+.2f} +- {minus_base[1]:.2f}",
        "best": row is best_cell(own),
    }


def best_cell(own: list[CellScores | None]) -> CellScores | None:
    """Return the scores with the lowest kernel distance."""
    return min((row for row in own if row is not None), key=lambda row: row["kernel"][0], default=None)


def copies_in_best_cell(
    own: list[CellScores | None], base: list[CellScores | None], cells: list[Cell]
) -> str | None:
    """Say whether a model's best cell shows copies of training images; None if it was not measured."""
    best = best_cell(own)
    if best is None or not isinstance(best.get("copying"), float):
        return None
    column = next(k for k, row in enumerate(own) if row is best)
    of_base = (base[column] or {}).get("copying")
    found = best.get("copies")
    if isinstance(found, dict):
        return f"{cells[column].label}: {counted_copies(found)}."
    return f"{cells[column].label}: {copies_sentence(best['copying'], of_base)}."


def scan_chart(with_base_scan: EvaluationResult, runs: list[EvaluatedRun]) -> Figure | None:
    """Draw distance over scale / training guidance for all runs, on one logarithmic axis.

    Args:
        with_base_scan: the result whose scan of the untouched base is drawn.
    """
    base = relative_scan(with_base_scan["scan"].get("base", {}), 1.0)
    few, kernel = len(runs) < COLOUR_COUNT, distance_names(with_base_scan.get("features"))[0]
    colours = [f"c{k}" if few else "c0" if run.guidance == 1 else "c1" for k, run in enumerate(runs)]
    names = [run.name if few else f"all trained at guidance {run.guidance:g}" for run in runs]
    series = [
        Series(name, run.scan, colour, dashed=run.guidance != 1)
        for name, run, colour in zip(names, runs, colours, strict=True)
        if run.scan
    ]
    figure = line_chart(
        "Distance over the scale",
        [*series, Series("untouched base", base, "c5", dashed=True)],
        ChartAxes("s / w", f"{kernel} to real images", log=True, zero=True),
        "The sampling scale s over the training guidance w. Whiskers are 95 % intervals.",
    )
    if figure is None or few:
        return figure
    return Figure(figure.title, figure.svg, figure.caption, list(dict.fromkeys(figure.legend)))


def scan_sentences(runs: list[EvaluatedRun]) -> list[str]:
    """Say what the rule would look like, whether it holds, and which scale is best."""
    scanned = [run for run in runs if run.scan]
    if not scanned:
        return []
    sentences = [
        "If a run trained at guidance w and sampled at s behaved like an ordinary run sampled at s / w, "
        "ordinary and guided curves would coincide here."
    ]
    ordinary = [run for run in scanned if run.guidance == 1]
    found = [(run, compare_with_ordinary(run, ordinary)) for run in scanned if run.guidance != 1]
    verdicts = [(run, *verdict) for run, verdict in found if verdict is not None]
    if not verdicts:
        reason = "this page has no ordinary and no guided run whose scans overlap"
        return [*sentences, f"Whether they do is unknown: {reason}.", *best_scale_sentences(scanned)]
    broken = [run for run, holds, _ in verdicts if not holds]
    if len(verdicts) > MAX_SENTENCES:
        sentences.append(f"In {len(broken)} of {len(verdicts)} comparisons the rule does not hold.")
        verdicts = [one for one in verdicts if not one[1]][:1]
    sentences += [f"{run.name}: {text}." for run, _, text in verdicts]
    return sentences + best_scale_sentences(scanned)


def compare_with_ordinary(guided: EvaluatedRun, ordinary: list[EvaluatedRun]) -> tuple[bool, str] | None:
    """Test the rule against the ordinary run that differs in the fewest settings; None without one."""
    own = guided.trial.settings
    nearest = min(
        ordinary, key=lambda run: sum(1 for _ in differences(own, run.trial.settings)), default=None
    )
    return None if nearest is None else scale_rule_verdict(nearest.scan, guided.scan)


def best_scale_sentences(runs: list[EvaluatedRun]) -> list[str]:
    """Say at which scale each run is closest to real images; nothing if there are many."""
    if len(runs) > MAX_SENTENCES:
        return []
    sentences = []
    for run in runs:
        ratio, distance, error = min(run.scan, key=lambda point: point[1])
        scale = f"{ratio * run.guidance:.3g}"
        sentences.append(
            f"{run.name} is closest to real images at scale {scale}: {distance:.2f} +- {error:.2f}."
        )
    return sentences
