"""All that stands on a page, gathered from run folders; the template only lays it out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ghibli.report import charts, figures, images, text
from ghibli.report.charts import common_scale, interval, scale_ends
from ghibli.report.evaluation import evaluation
from ghibli.report.provenance import facts, shared_facts
from ghibli.report.run_data import RunData, attempt, gain_of
from ghibli.report.text import percent, verdict
from ghibli.runs.compose import look_at
from ghibli.runs.identity import differences, flat, shown, that_count
from ghibli.runs.launch import chosen_groups
from ghibli.sweeps.costs import COSTS, cost_rows
from ghibli.sweeps.effects import Effect, effects, number_of, seed_noise
from ghibli.sweeps.ranking import COLUMNS, visible_columns
from ghibli.sweeps.trials import varied

MOST_KEYS = 6  # in a run's short name
ALL_GRIDS = 4  # runs of which every one shows its grid; of more the best and the worst


def page_of_one(part: RunData) -> dict[str, Any]:
    """Everything about one run."""
    settings = part.trial.settings
    page = {
        "title": part.name,
        "kind": "run",
        "subtitle": part.trial.status.get("settings", ""),
        "verdict": text.verdict(part),
        "settings": attempt(lambda: not_default(part), []),
        "all_settings": [(key, shown(value)) for key, value in settings.items()],
        "costs": costs([(part.name, part)]),
        "figures": figures.of_one(part),
        "epochs": epoch_rows(part),
        "grids": images.grids(part),
        "evaluation": attempt(lambda: evaluation([part])),
        "evaluation_images": evaluation_images(part),
        "findings": findings([(part.name, part)]),
        "provenance": list(facts(part).items()),
    }
    return page | {"missing": missing(page, [("", part)])}


def not_default(part: RunData) -> list[tuple[str, str]]:
    """(key, its value and the default) of what differs from what this base and these images come with."""
    chosen = chosen_groups(part.run)
    groups = [f"{group}={chosen[group]}" for group in ("model", "data") if group in chosen]
    default, _, _ = look_at([*groups, "data.root=not set"])
    if default is None:
        return []
    settings = part.trial.settings
    return [
        (key, f"{shown(own)} (default {shown(usual)})")
        for key, usual, own in differences(that_count(flat(asdict(default))), settings)
        if key in settings
    ]


def page_of_many(title: str, parts: list[RunData], study: Path | None) -> dict[str, Any]:
    """Everything about several runs, the best first.

    Args:
        study: the folder they are trials of.
    """
    parts = sorted(parts, key=place_of)
    keys = varied([part.trial for part in parts])
    names = labels(parts, keys, study is not None)
    runs = list(zip(names, parts, strict=True))
    finished = [part.trial for part in parts if part.state == "finished"]
    found, noise = attempt(lambda: effects(finished), []), attempt(lambda: seed_noise(finished))
    common = shared_facts(parts)
    page = {
        "title": title,
        "kind": "study" if study else "comparison",
        "subtitle": number_of(len(parts), "run"),
        "unfinished": len(finished) < len(parts),
        "verdict": text.study_verdict(runs, found, noise),
        "keys": keys,
        "named": names != by_settings(parts, keys),
        "ranking": ranking(runs, keys),
        "effects": effect_rows(found),
        "effects_scale": scale_ends(*common_scale([effect.difference for effect in found], cut=False)),
        "noise": noise,
        "costs": costs(runs),
        "figures": [one for one in figures_of_all(runs) if one is not None],
        "grids": grids_of_many(runs),
        "evaluation": attempt(lambda: evaluation(parts)),
        "evaluation_images": models_image(study, parts),
        "findings": findings(runs),
        "provenance": list(common.items()),
        "runs": [one_of_many(place, label, part, common) for place, (label, part) in enumerate(runs, 1)],
    }
    return page | {"missing": missing(page, runs)}


def place_of(part: RunData) -> tuple[bool, float]:
    """Sorts by the gain; runs that are not finished stand behind, for theirs may still change."""
    gain = -part.gain.value if part.gain else float("inf")
    return part.state != "finished", gain


def one_of_many(place: int, label: str, part: RunData, common: dict[str, str]) -> dict[str, Any]:
    """One run of several, folded up on the page."""
    own = [(what, text) for what, text in facts(part).items() if common.get(what) != text]
    drawn = [figures.gain_curve(part), figures.steps(part)]
    return {
        "place": place, "label": label, "folder": str(part.run.path), "gain": percent(part.gain),
        "state": part.state, "verdict": verdict(part), "figures": [one for one in drawn if one],
        "findings": [(finding["name"], finding["text"], []) for finding in part.findings],
        "provenance": own,
    }  # fmt: skip


def by_settings(parts: list[RunData], keys: list[str]) -> list[str]:
    """The settings that vary as each run's name; the same for all where there are none or too many."""
    few = keys if len(keys) <= MOST_KEYS else []
    return [
        ", ".join(f"{key.split('.')[-1]} {shown(part.trial.settings.get(key))}" for key in few)
        for part in parts
    ]


def labels(parts: list[RunData], keys: list[str], is_study: bool) -> list[str]:
    """A short name for each run that tells it apart: a trial by its settings, another one by its folder."""
    settings, names = by_settings(parts, keys), [part.name for part in parts]
    paths = [str(part.run.path) for part in parts]
    order = (settings, names, paths) if is_study else (names, settings, paths)
    return next(found for found in order if len(set(found)) == len(parts))


def ranking(runs: figures.Labelled, keys: list[str]) -> dict[str, Any]:
    """The ranking table: its columns, and a row for each run with its gain drawn on a common scale."""
    low, high = common_scale([part.gain for _, part in runs if part.gain is not None])
    values = [ranked_values(part) for _, part in runs]
    columns = visible_columns(values)
    rows = [
        {
            "name": label,
            "settings": [shown(part.trial.settings.get(key)) for key in keys],
            "cells": [(column, column.text_of(own[column.name])) for column in columns],
            "interval": interval(part.gain, low, high) if part.gain else "",
        }
        for (label, part), own in zip(runs, values, strict=True)
    ]
    return {"columns": columns, "rows": rows, "scale": scale_ends(low, high)}


def ranked_values(part: RunData) -> dict[str, Any]:
    """The values of a run by the names of the ranking's columns; None where a file is missing or damaged.

    Gain and best epoch are those of probe.csv, which an unfinished run has too.
    """
    values = {column.name: attempt(lambda column=column: column.value(part.trial)) for column in COLUMNS}
    return values | {"gain": part.gain, "best_epoch": part.best_epoch}


def effect_rows(found: list[Effect]) -> list[dict[str, Any]]:
    """The forest plot: a row for each effect."""
    low, high = common_scale([effect.difference for effect in found], cut=False)
    return [
        {
            "key": effect.key, "change": f"{shown(effect.low)} \u2192 {shown(effect.high)}",
            "pairs": effect.pairs, "difference": text.points(effect.difference),
            "interval": interval(effect.difference, low, high), "matters": effect.matters,
        }
        for effect in found
    ]  # fmt: skip


def figures_of_all(runs: figures.Labelled) -> list[charts.Figure | None]:
    """The curves of all runs in common drawings, and the best one's gain by timestep."""
    curves = [figures.gains_of_all(runs), figures.distance_curve(runs), *figures.loss_curves(runs)]
    return [*curves, figures.steps(runs[0][1], " of the best run")]


def epoch_rows(part: RunData) -> list[tuple[int, str, str]]:
    """The gain of each epoch in numbers: held-out, training images."""
    return [
        (int(row["epoch"]), text.percent(gain_of(row)), text.percent(gain_of(row, "train")))
        for row in part.probe
    ]


def grids_of_many(runs: figures.Labelled) -> list[images.EmbeddedImage]:
    """The last grid of every run, or of the best and the worst that have one."""
    drawn = [(label, part) for label, part in runs if part.trial.grid is not None]
    drawn = [run for run in drawn if run[1].state == "finished"] or drawn
    chosen = list(zip([label for label, _ in drawn], drawn, strict=True))
    if len(drawn) > ALL_GRIDS:
        chosen = [(f"best: {drawn[0][0]}", drawn[0]), (f"worst: {drawn[-1][0]}", drawn[-1])]
    return [one for label, (_, part) in chosen if (one := images.last_grid(part, label)) is not None]


def evaluation_images(part: RunData) -> list[images.EmbeddedImage]:
    """evaluation.png, and evaluation_nearest.png where there is one."""
    shown_files = (
        (part.run.evaluation_images, "Prompts of held-out images in every cell", "base above, run below"),
        (part.run.path / "evaluation_nearest.png", "Samples beside their nearest training images", ""),
    )
    found = [
        images.embed(file, f"{label} {more}".strip(), part.problems, label)
        for file, label, more in shown_files
        if file.exists()
    ]
    return [one for one in found if one is not None]


def models_image(study: Path | None, parts: list[RunData]) -> list[images.EmbeddedImage]:
    """models.png of a study: the sample prompts drawn by every evaluated model."""
    if study is None or not (study / "models.png").exists():
        return []
    label = "The same prompts drawn by every evaluated model"
    found = images.embed(study / "models.png", label, parts[0].problems, label)
    return [] if found is None else [found]


def costs(runs: figures.Labelled) -> dict[str, Any] | None:
    """Trainable parameters, file, time and memory; a run whose files do not tell is left out."""
    rows = []
    for label, part in runs:
        found = attempt(lambda part=part: cost_rows([part.trial]), [])
        rows += [(label, values) for _, values in found if set(values) != {"-"}]
    return {"columns": COSTS, "rows": rows} if rows else None


def findings(runs: figures.Labelled) -> list[tuple[str, str, list[str]]]:
    """(name, text, of which runs) of all that the doctor found; the same text once."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, part in runs:
        for finding in part.findings:
            found.setdefault((str(finding["name"]), str(finding["text"])), []).append(label)
    return [(*said, where) for said, where in found.items()]


def missing(page: dict[str, Any], runs: figures.Labelled) -> list[str]:
    """What is not on the page, and why."""
    lines = []
    unmeasured = [part for _, part in runs if part.evaluation is None]
    if len(unmeasured) == len(runs) == 1:
        lines.append(f"no evaluation yet: `ghibli evaluate {runs[0][1].run.path}` measures its images")
    elif unmeasured:
        lines.append(f"{len(unmeasured)} of {len(runs)} runs have no evaluation yet (`ghibli evaluate RUN`)")
    undrawn = sum(part.trial.grid is None for _, part in runs)
    if undrawn:
        lines.append("no image grid (samples/ is empty)" + (f" of {undrawn} runs" if len(runs) > 1 else ""))
    if page["kind"] != "run" and not page["effects"]:
        lines.append("no effects: no two scored runs differ in one setting alone and share their images")
    for label, part in runs:
        lines += [f"{label}: {problem}" if label else problem for problem in dict.fromkeys(part.problems)]
    return lines
