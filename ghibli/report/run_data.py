"""What a run's folder tells, read with care: what is missing or damaged is named, never a traceback."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ghibli.config.files import read_settings
from ghibli.evaluation.gain import Gain
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import relevant_settings
from ghibli.runtime.files import read_rows
from ghibli.sweeps.trials import Trial, best_probe

Row = dict[str, float]
DAMAGED = (  # what broken files raise
    OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError,
    SafetensorError,
)  # fmt: skip
PROBE = tuple(f"probe/{part}_gain{end}" for part in ("val", "train") for end in ("", "_se"))


@dataclass
class RunData:
    """One run of the page, with the sentences about what could not be read."""

    trial: Trial
    problems: list[str] = field(default_factory=list)

    @property
    def run(self) -> RunDir:
        return self.trial.run

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @cached_property
    def state(self) -> str:
        return self.run.state

    @cached_property
    def probe(self) -> list[Row]:
        """The rows of probe.csv: the untouched model first, then one an epoch."""
        return self.table(self.run.probe, ("epoch", *PROBE), "the curves of the gain are left out")

    @cached_property
    def metrics(self) -> list[Row]:
        return self.table(self.run.metrics, ("step", "train/loss"), "the training loss is left out")

    @cached_property
    def distances(self) -> list[Row]:
        """The rows of distance.csv; most runs have none."""
        if not self.run.distances.exists():
            return []
        wanted = ("epoch", "evaluate/kernel_distance", "evaluate/kernel_distance_se")
        return self.table(self.run.distances, wanted, "the curve of the distance is left out")

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """The content of evaluation.json, of today's shape; None without one."""
        if not self.run.evaluation.exists():
            return None
        try:
            content = checked_evaluation(self.run.load_evaluation())
        except DAMAGED:
            again = f"`ghibli evaluate {self.run.path}` writes it anew"
            self.problems.append(f"evaluation.json is damaged or of an older version: {again}")
            return None
        if self.run.is_older(content):
            again = f"`ghibli evaluate {self.run.path}` measures what it has become"
            self.problems.append(f"evaluation.json is older than the run, which was trained on: {again}")
            return None
        return content

    @cached_property
    def best(self) -> Row | None:
        """The row of the epoch with the highest gain; None before the first epoch's end."""
        epochs = [row for row in self.probe if row["epoch"] > 0 and math.isfinite(row["probe/val_gain"])]
        return max(epochs, key=lambda row: row["probe/val_gain"], default=None)

    @cached_property
    def gain(self) -> Gain | None:
        """The held-out gain of the best epoch: by probe.csv, else by what was stored elsewhere."""
        if self.best is not None:
            return gain_of(self.best)
        if self.trial.best is not None:
            return self.trial.gain
        value, error = self.trial.status.get("gain"), self.trial.status.get("gain_se")
        trained = self.trial.settings.get("finetune") != "none" and self.trial.status.get("epoch")
        is_number = isinstance(value, float) and isinstance(error, float)
        return Gain(value, error) if is_number and trained else None

    @property
    def best_epoch(self) -> int | None:
        if self.best is not None:
            return int(self.best["epoch"])
        return self.trial.status.get("best_epoch")

    @property
    def findings(self) -> list[dict[str, str]]:
        """What the doctor said, in training and in the evaluation."""
        trained, measured = self.trial.status.get("findings"), (self.evaluation or {}).get("findings")
        found = [one for said in (trained, measured) if isinstance(said, list) for one in said]
        found = [one for one in found if isinstance(one, dict) and one.keys() >= {"name", "text"}]
        return list({(str(one["name"]), str(one["text"])): one for one in found}.values())

    def table(self, path: Path, wanted: tuple[str, ...], without: str) -> list[Row]:
        """A CSV file as numbers; empty, and a sentence, where it is missing, damaged or lacks a column."""
        if not path.exists():
            self.problems.append(f"there is no {path.name}: {without}")
            return []
        try:
            rows = [{key: number(value) for key, value in row.items()} for row in read_rows(path)]
        except DAMAGED:
            self.problems.append(f"{path.name} is damaged: {without}")
            return []
        if rows and not rows[0].keys() >= set(wanted):
            self.problems.append(f"{path.name} lacks columns (an older version wrote it): {without}")
            return []
        if not rows:
            self.problems.append(f"{path.name} holds no row: {without}")
        return rows


def number(text: str | None) -> float:
    """A cell of a CSV file; nan for an empty one, TypeError where a row is cut off."""
    return math.nan if text == "" else float(text)


def gain_of(row: Row, part: str = "val") -> Gain:
    """The gain on held-out (val) or training (train) images in a row of probe.csv."""
    return Gain(row[f"probe/{part}_gain"], row[f"probe/{part}_gain_se"])


def by_timestep(row: Row) -> dict[str, Gain]:
    """`0-249` -> the held-out gain at those timesteps."""
    start = "probe/val_gain_t"
    names = [key for key in row if key.startswith(start) and not key.endswith("_se")]
    return {key.removeprefix(start): Gain(row[key], row.get(f"{key}_se", math.nan)) for key in names}


def checked_evaluation(content: dict[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json; raises one of DAMAGED where it is not as evaluation.py writes it."""
    cells = [row for own in (content["models"]["base"], *content["models"].values()) for row in own]
    pairs = [pair for scan in content["scan"].values() for pair in scan.values()]
    for row in (*cells, content["real"]):
        optional = [row.get(key) for key in ("caption_fit", "kernel_minus_base")]
        pairs += [row["kernel"], *(pair for pair in optional if pair is not None)]
    numbers = [x for value, error in pairs for x in (value, error)]
    numbers += [row[key] for row in (*cells, content["real"]) for key in ("frechet", "recall")]
    numbers += [row["guidance"] for row in cells] + [content["training_guidance"]]
    numbers += [float(scale) for scan in content["scan"].values() for scale in scan]
    if not all(isinstance(x, int | float) for x in numbers):
        raise ValueError("not a number")
    if not all(isinstance(row["sampler"], str) for row in cells) or not isinstance(content["findings"], list):
        raise ValueError("not a word")
    return content


def attempt(read: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `read` gives, or `otherwise` where a file it needs is missing or damaged."""
    try:
        return read()
    except DAMAGED:
        return otherwise


def read_part(run: RunDir, with_scores: bool) -> RunData:
    """One run of the page.

    Args:
        with_scores: reads the best checkpoint too, which paired differences are computed from.
    """
    content = read_settings(run.config)
    known = content is not None
    settings = relevant_settings(content) if known else {}
    best = attempt(lambda: best_probe(run)) if with_scores else None
    problems = [] if known else ["config.yaml is missing or damaged: the settings are left out"]
    return RunData(Trial(run, settings, run.read_status(), best), problems)
