"""The content of a report page, gathered from run folders; the template only lays it out."""

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ghibli.report.charts import Figure, common_scale, interval_chart, scale_labels
from ghibli.report.evaluation import evaluation_section
from ghibli.report.figures import (
    LabelledRuns,
    distance_curves,
    gain_curve,
    gain_curves,
    loss_curves,
    price_curves,
    run_figures,
    timestep_chart,
)
from ghibli.report.images import EmbeddedImage, embed, embed_grids, embed_last_grid
from ghibli.report.influence import influence_section
from ghibli.report.layers import layer_section
from ghibli.report.provenance import provenance_facts, shared_facts
from ghibli.report.run_data import RunData, gain_of, price_of, try_read
from ghibli.report.text import (
    difference_points,
    gain_percent,
    noise_sentence,
    run_verdict,
    seed_sentences,
    study_verdict,
    winner_sentences,
)
from ghibli.runs.compose import check_overrides
from ghibli.runs.resume import chosen_groups
from ghibli.runs.settings import as_yaml, differences, relevant_settings
from ghibli.runtime.commands import command_line
from ghibli.runtime.wording import number_of
from ghibli.sweeps.costs import COSTS, cost_rows
from ghibli.sweeps.effects import Effect, effects, seed_noise
from ghibli.sweeps.ranking import COLUMNS, visible_columns
from ghibli.sweeps.trials import varied

TIME = re.compile(r"\d{4}-\d\d-\d\d_")  # how a folder begins that is named after the time
MAX_KEYS = 6  # settings in the short name of a run
MAX_ALL_GRIDS = 4  # runs up to which each shows its grid; of more, only the best and the worst do


def run_page(data: RunData) -> dict[str, Any]:
    """Gather everything about one run."""
    settings = data.trial.settings
    page = {
        "title": title_of(data),
        "kind": "run",
        "subtitle": subtitle_of(data),
        "verdict": run_verdict(data),
        "settings": try_read(lambda: changed_settings(data), []),
        "all_settings": [(key, as_yaml(value)) for key, value in settings.items()],
        "costs": cost_section([(data.name, data)]),
        "figures": run_figures(data),
        "epochs": epoch_rows(data),
        "has_price": any(price_of(row) is not None for row in data.probe),
        "grids": embed_grids(data),
        "evaluation": try_read(lambda: evaluation_section([data])),
        "evaluation_images": evaluation_images(data),
        "layers": try_read(lambda: layer_section(data)),
        "influence": try_read(lambda: influence_section(data)),
        "findings": merged_findings([(data.name, data)]),
        "provenance": list(provenance_facts(data).items()),
    }
    return page | {"missing": missing_sentences(page, [("", data)])}


def title_of(data: RunData) -> str:
    """Return the name of a run; of one that is named after the time, what was trained."""
    return str(data.trial.status.get("settings") or data.name) if TIME.match(data.name) else data.name


def subtitle_of(data: RunData) -> str:
    """Return what the title leaves open: what was trained, from and on what, and the folder."""
    status = data.trial.status
    facts = {"settings": "", "base": "base ", "images": "images "}
    parts = [f"{before}{status[key]}" for key, before in facts.items() if status.get(key)]
    title = title_of(data)
    return ", ".join(part for part in (*parts, data.name) if part != title)


def changed_settings(data: RunData) -> list[tuple[str, str]]:
    """Return (key, `value (default X)`) of the settings that are not the default of this base and data."""
    chosen = chosen_groups(data.run)
    groups = [f"{group}={chosen[group]}" for group in ("model", "data") if group in chosen]
    default, _, _ = check_overrides([*groups, "data.root=not set"])
    if default is None:
        return []
    settings = data.trial.settings
    return [
        (key, f"{as_yaml(own)} (default {as_yaml(usual)})")
        for key, usual, own in differences(relevant_settings(asdict(default)), settings)
        if key in settings
    ]


def comparison_page(title: str, runs: list[RunData], study: Path | None) -> dict[str, Any]:
    """Gather everything about several runs, best first.

    Args:
        study: the folder of which they are the trials; None for separate runs.
    """
    runs = sorted(runs, key=rank_key)
    keys = varied([data.trial for data in runs])
    names = unique_labels(runs, keys, study is not None)
    labelled = list(zip(names, runs, strict=True))
    finished = [data.trial for data in runs if data.state == "finished"]
    found, noise = try_read(lambda: effects(finished), []), try_read(lambda: seed_noise(finished))
    common = shared_facts(runs)
    page = {
        "title": title,
        "kind": "study" if study else "comparison",
        "subtitle": number_of(len(runs), "run"),
        "unfinished": len(finished) < len(runs),
        "verdict": [
            *study_verdict(labelled, found, noise),
            *try_read(lambda: seed_sentences(finished), []),
            *winner_sentences(finished, is_study=study is not None),
        ],
        "keys": keys,
        "named": names != settings_labels(runs, keys),
        "ranking": ranking_section(labelled, keys),
        "effects": effect_rows(found),
        "effects_scale": scale_labels(*common_scale([effect.difference for effect in found], cut=False)),
        "noise": noise and noise_sentence(noise),
        "costs": cost_section(labelled),
        "figures": comparison_figures(labelled),
        "grids": comparison_grids(labelled),
        "evaluation": try_read(lambda: evaluation_section(runs)),
        "evaluation_images": study_images(study, runs),
        "findings": merged_findings(labelled),
        "provenance": list(common.items()),
        "runs": [
            run_details(place, label, data, common) for place, (label, data) in enumerate(labelled, start=1)
        ],
    }
    return page | {"missing": missing_sentences(page, labelled)}


def rank_key(data: RunData) -> tuple[bool, float]:
    """Sort by gain, with unfinished runs last, as their gain may still change."""
    return data.state != "finished", -data.gain.value if data.gain else float("inf")


def run_details(place: int, label: str, data: RunData, common: dict[str, str]) -> dict[str, Any]:
    """Gather what the page of several runs shows about each, collapsed.

    Args:
        common: facts that all runs share; they are left out.
    """
    facts = [(what, text) for what, text in provenance_facts(data).items() if common.get(what) != text]
    figures = [gain_curve(data), timestep_chart(data)]
    return {
        "place": place, "label": label, "folder": str(data.run.path), "gain": gain_percent(data.gain),
        "state": data.state, "verdict": run_verdict(data), "figures": [one for one in figures if one],
        "findings": [(finding["name"], finding["text"], []) for finding in data.findings],
        "provenance": facts,
    }  # fmt: skip


def settings_labels(runs: list[RunData], keys: list[str]) -> list[str]:
    """Label each run by the settings that vary; all labels are empty if none or more than MAX_KEYS vary."""
    few = keys if len(keys) <= MAX_KEYS else []
    return [
        ", ".join(f"{key.split('.')[-1]} {as_yaml(data.trial.settings.get(key))}" for key in few)
        for data in runs
    ]


def unique_labels(runs: list[RunData], keys: list[str], is_study: bool) -> list[str]:
    """Return the first unique labels: settings first for the trials of a study, else folder names first."""
    settings, names = settings_labels(runs, keys), [data.name for data in runs]
    paths = [str(data.run.path) for data in runs]
    order = (settings, names, paths) if is_study else (names, settings, paths)
    return next(labels for labels in order if len(set(labels)) == len(runs))


def ranking_section(runs: LabelledRuns, keys: list[str]) -> dict[str, Any]:
    """Return the columns of the ranking, and a row per run with its gain drawn on a common scale."""
    low, high = common_scale([data.gain for _, data in runs if data.gain is not None])
    values = [ranked_values(data) for _, data in runs]
    columns = visible_columns(values)
    rows = [
        {
            "name": label,
            "settings": [as_yaml(data.trial.settings.get(key)) for key in keys],
            "cells": [(column, column.text_of(own[column.name])) for column in columns],
            "interval": interval_chart(data.gain, low, high) if data.gain else "",
        }
        for (label, data), own in zip(runs, values, strict=True)
    ]
    return {"columns": columns, "rows": rows, "scale": scale_labels(low, high)}


def ranked_values(data: RunData) -> dict[str, Any]:
    """Return the value of each column of the ranking; None where a file is missing or damaged.

    Gain and best epoch are those of probe.csv, which an unfinished run has too.
    """
    values = {column.name: try_read(partial(column.value, data.trial)) for column in COLUMNS}
    return values | {"gain": data.gain, "best_epoch": data.best_epoch}


def effect_rows(found: list[Effect]) -> list[dict[str, Any]]:
    """Return the rows of the forest plot of effects."""
    low, high = common_scale([effect.difference for effect in found], cut=False)
    return [
        {
            "key": effect.key, "change": f"{as_yaml(effect.low)} \u2192 {as_yaml(effect.high)}",
            "pairs": effect.pairs, "difference": difference_points(effect.difference),
            "interval": interval_chart(effect.difference, low, high), "matters": effect.matters,
        }
        for effect in found
    ]  # fmt: skip


def comparison_figures(runs: LabelledRuns) -> list[Figure]:
    """Draw the curves of all runs in common charts, and the best run's gain by timestep."""
    figures = [
        gain_curves(runs),
        price_curves(runs),
        distance_curves(runs),
        *loss_curves(runs),
        timestep_chart(runs[0][1], " of the best run"),
    ]
    return [figure for figure in figures if figure is not None]


def epoch_rows(data: RunData) -> list[tuple[int, str, str, str]]:
    """Return (epoch, gain on held-out images, gain on training images, price) of every epoch."""
    return [
        (
            int(row["epoch"]), gain_percent(gain_of(row)), gain_percent(gain_of(row, "train")),
            gain_percent(price_of(row)),
        )
        for row in data.probe
    ]  # fmt: skip


def comparison_grids(runs: LabelledRuns) -> list[EmbeddedImage]:
    """Embed the last grid of every run, or of the best and the worst if there are many."""
    with_grid = [(label, data) for label, data in runs if data.trial.grid is not None]
    with_grid = [run for run in with_grid if run[1].state == "finished"] or with_grid
    if len(with_grid) > MAX_ALL_GRIDS:
        (best, best_data), (worst, worst_data) = with_grid[0], with_grid[-1]
        with_grid = [(f"best: {best}", best_data), (f"worst: {worst}", worst_data)]
    return [one for label, data in with_grid if (one := embed_last_grid(data, label)) is not None]


def evaluation_images(data: RunData) -> list[EmbeddedImage]:
    """Embed evaluation.png and evaluation_nearest.png, if they exist."""
    files = (
        (data.run.evaluation_images, "Prompts of held-out images in every cell", "base above, run below"),
        (data.run.path / "evaluation_nearest.png", "Samples beside their nearest training images", ""),
    )
    found = [
        embed(file, f"{label} {more}".strip(), data.problems, label)
        for file, label, more in files
        if file.exists()
    ]
    return [one for one in found if one is not None]


def study_images(study: Path | None, runs: list[RunData]) -> list[EmbeddedImage]:
    """Embed models.png of a study: the sample prompts drawn by every evaluated model."""
    if study is None or not (study / "models.png").exists():
        return []
    label = "The same prompts drawn by every evaluated model"
    found = embed(study / "models.png", label, runs[0].problems, label)
    return [] if found is None else [found]


def cost_section(runs: LabelledRuns) -> dict[str, Any] | None:
    """Return trainable parameters, file size, time and memory; runs without such data are left out."""
    rows = []
    for label, data in runs:
        found = try_read(partial(cost_rows, [data.trial]), [])
        rows += [(label, values) for _, values in found if set(values) != {"-"}]
    return {"columns": COSTS, "rows": rows} if rows else None


def merged_findings(runs: LabelledRuns) -> list[tuple[str, str, list[str]]]:
    """Return (name, text, labels of the runs) of every finding of the run doctor, the same text once."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, data in runs:
        for finding in data.findings:
            found.setdefault((str(finding["name"]), str(finding["text"])), []).append(label)
    return [(*finding, labels) for finding, labels in found.items()]


def missing_sentences(page: dict[str, Any], runs: LabelledRuns) -> list[str]:
    """Say what is not on the page, and why."""
    sentences = []
    unmeasured = [data for _, data in runs if data.evaluation is None]
    if len(unmeasured) == len(runs) == 1:
        command = command_line("ghibli", "evaluate", runs[0][1].run.path)
        sentences.append(f"no evaluation yet: `{command}` measures its images")
    elif unmeasured:
        count = f"{len(unmeasured)} of {len(runs)} runs"
        sentences.append(f"{count} have no evaluation yet (`ghibli evaluate RUN`)")
    without_grid = sum(data.trial.grid is None for _, data in runs)
    if without_grid:
        of_runs = f" for {without_grid} of {len(runs)} runs" if len(runs) > 1 else ""
        sentences.append(f"no image grid{of_runs} (samples/ is empty)")
    if page["kind"] != "run" and not page["effects"]:
        sentences.append("no effects: no two scored runs differ in one setting alone and share their images")
    for label, data in runs:
        problems = dict.fromkeys(data.problems)
        sentences += [f"{label}: {problem}" if label else problem for problem in problems]
    return sentences
