"""The data of a run's folder. A missing or damaged file becomes a sentence on the page, not a traceback."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from safetensors import SafetensorError

from ghibli.config.files import read_settings
from ghibli.evaluation.gain import Gain
from ghibli.evaluation.influence import Influences, read_influences
from ghibli.evaluation.layer_map import LayerMap, read_map
from ghibli.evaluation.scores import best_probe
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import relevant_settings
from ghibli.runtime.commands import command_line
from ghibli.runtime.files import read_rows
from ghibli.sweeps.trials import Trial

CsvRow = dict[str, float]
READ_ERRORS = (  # raised by damaged files
    OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, IndexError,
    csv.Error, yaml.YAMLError, SafetensorError, UnpicklingError, EOFError, RuntimeError,
)  # fmt: skip
PROBE_COLUMNS = tuple(f"probe/{split}_gain{end}" for split in ("val", "train") for end in ("", "_se"))


@dataclass
class RunData:
    """One run of the page, with a sentence for each file that could not be read."""

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
        return self.run.status.state

    @cached_property
    def probe(self) -> list[CsvRow]:
        """The rows of probe.csv: the untouched model first, then one per epoch."""
        return self.read_table(self.run.probe, ("epoch", *PROBE_COLUMNS), "the gain curves are left out")

    @cached_property
    def metrics(self) -> list[CsvRow]:
        """The rows of metrics.csv."""
        return self.read_table(self.run.metrics, ("step", "train/loss"), "the training loss is left out")

    @cached_property
    def distances(self) -> list[CsvRow]:
        """The rows of distance.csv; most runs have none."""
        if not self.run.distances.exists():
            return []
        required = ("epoch", "evaluate/kernel_distance", "evaluate/kernel_distance_se")
        return self.read_table(self.run.distances, required, "the distance curve is left out")

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """The content of evaluation.json; None if it is missing, damaged, or older than the weights."""
        if not self.run.evaluation.exists():
            return None
        command = f"`{command_line('ghibli', 'evaluate', self.run.path)}`"
        try:
            content = check_evaluation(self.run.load_evaluation())
        except READ_ERRORS:
            self.problems.append(
                f"evaluation.json is damaged or of an older version: {command} writes it again"
            )
            return None
        if self.run.is_older(content):
            self.problems.append(
                f"evaluation.json is older than the run, which was trained further: {command} updates it"
            )
            return None
        return content

    @cached_property
    def layer_map(self) -> LayerMap | None:
        """The content of slim.json; None if it is missing, damaged, or older than the weights."""
        if not self.run.layer_map.exists():
            return None
        command = f"`{command_line('ghibli', 'slim', self.run.path)}`"
        try:
            content = read_map(self.run.layer_map)
        except READ_ERRORS:
            self.problems.append(f"slim.json is damaged: {command} writes it again")
            return None
        if None not in (content.weights, self.run.weights) and content.weights != self.run.weights:
            self.problems.append(
                f"slim.json is older than the run, which was trained further: {command} updates it"
            )
            return None
        return content

    @cached_property
    def influence(self) -> Influences | None:
        """The content of influence.json; None if it is missing, damaged, or older than the weights."""
        if not self.run.influence.exists():
            return None
        command = f"`{command_line('ghibli', 'influence', self.run.path)}`"
        try:
            content = read_influences(self.run.influence)
            measured = content.of["weights"][0]
        except READ_ERRORS:
            self.problems.append(f"influence.json is damaged: move it away, and {command} writes it again")
            return None
        if None not in (measured, self.run.weights) and measured != self.run.weights:
            self.problems.append(
                f"influence.json is older than the run, which was trained further: {command} updates it"
            )
            return None
        return content

    @cached_property
    def best(self) -> CsvRow | None:
        """The row of probe.csv with the highest gain; None before the end of the first epoch."""
        epochs = [row for row in self.probe if row["epoch"] > 0 and math.isfinite(row["probe/val_gain"])]
        return max(epochs, key=lambda row: row["probe/val_gain"], default=None)

    @cached_property
    def gain(self) -> Gain | None:
        """The held-out gain of the best epoch: from probe.csv, else from best.ckpt or status.json."""
        if self.best is not None:
            return gain_of(self.best)
        if self.trial.best is not None:
            return self.trial.gain
        value, error = self.trial.status.get("gain"), self.trial.status.get("gain_se")
        trained = self.trial.settings.get("finetune") != "none" and self.trial.status.get("epoch")
        if trained and isinstance(value, float) and isinstance(error, float):
            return Gain(value, error)
        return None

    @property
    def best_epoch(self) -> int | None:
        if self.best is not None:
            return int(self.best["epoch"])
        return self.trial.status.get("best_epoch")

    @property
    def findings(self) -> list[dict[str, str]]:
        """The findings of the run doctor, in training and in the evaluation."""
        sources = self.trial.status.get("findings"), (self.evaluation or {}).get("findings")
        found = [finding for source in sources if isinstance(source, list) for finding in source]
        found = [one for one in found if isinstance(one, dict) and one.keys() >= {"name", "text"}]
        return list({(str(one["name"]), str(one["text"])): one for one in found}.values())

    def read_table(self, path: Path, required: tuple[str, ...], consequence: str) -> list[CsvRow]:
        """Read a CSV file as numbers; note a problem and return no rows if it is missing or damaged.

        Args:
            required: columns it must have.
            consequence: what the page lacks without it.
        """
        if not path.exists():
            self.problems.append(f"{path.name} is missing: {consequence}")
            return []
        try:
            rows = [{key: parse_number(value) for key, value in row.items()} for row in read_rows(path)]
        except READ_ERRORS:
            self.problems.append(f"{path.name} is damaged: {consequence}")
            return []
        if rows and not rows[0].keys() >= set(required):
            self.problems.append(f"{path.name} lacks columns (an older version wrote it): {consequence}")
            return []
        if not rows:
            self.problems.append(f"{path.name} has no rows: {consequence}")
        return rows


def parse_number(text: str | None) -> float:
    """Parse a cell of a CSV file; NaN for an empty one.

    Raises:
        ValueError: not a number, or a row that is cut off (None).
    """
    if text is None:
        raise ValueError("a row is cut off")
    return math.nan if text == "" else float(text)


def gain_of(row: CsvRow, split: str = "val") -> Gain:
    """Return the gain in a row of probe.csv on held-out (val) or training (train) images."""
    return Gain(row[f"probe/{split}_gain"], row[f"probe/{split}_gain_se"], freedom=freedom_of(row, split))


def price_of(row: CsvRow) -> Gain | None:
    """Return the price in a row of probe.csv; None where it was not measured."""
    names = ("probe/price", "probe/price_se", "probe/price_groups")
    if not row.keys() >= set(names) or math.isnan(row[names[0]]):
        return None
    return Gain(row[names[0]], row[names[1]], freedom=row[names[2]] - 1)


def freedom_of(row: CsvRow, split: str = "val") -> float:
    """Return the degrees of freedom of a gain's error: images - 1; endless where an old run tells none."""
    return row.get(f"probe/{split}_images", math.inf) - 1


def timestep_gains(row: CsvRow) -> dict[str, Gain]:
    """Return the held-out gain in a row of probe.csv by range of timesteps, such as `0-249`."""
    start = "probe/val_gain_t"
    names = [key for key in row if key.startswith(start) and not key.endswith("_se")]
    freedom = freedom_of(row)
    return {
        key.removeprefix(start): Gain(row[key], row.get(f"{key}_se", math.nan), freedom=freedom)
        for key in names
    }


def check_evaluation(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of evaluation.json if it has the form that evaluation/evaluate.py writes.

    Raises:
        one of READ_ERRORS: it has not.
    """
    cells = [row for own in (content["models"]["base"], *content["models"].values()) for row in own]
    pairs = [pair for scan in content["scan"].values() for pair in scan.values()]
    for row in (*cells, content["real"]):
        optional = [row.get(key) for key in ("caption_fit", "kernel_minus_base", "layout")]
        pairs += [row["kernel"], *(pair for pair in optional if pair is not None)]
    numbers = [x for value, error in pairs for x in (value, error)]
    numbers += [row[key] for row in (*cells, content["real"]) for key in ("frechet", "recall")]
    numbers += [row["guidance"] for row in cells] + [content["training_guidance"]]
    numbers += [float(scale) for scan in content["scan"].values() for scale in scan]
    if not all(isinstance(x, int | float) for x in numbers):
        raise ValueError("not a number")
    if not all(isinstance(row["sampler"], str) for row in cells) or not isinstance(content["findings"], list):
        raise ValueError("not a string or not a list")
    return content


def try_read(read: Callable[[], Any], default: Any = None) -> Any:
    """Return the result of `read`, or the default if a file that it reads is missing or damaged."""
    try:
        return read()
    except READ_ERRORS:
        return default


def read_run(run: RunDir, with_scores: bool) -> RunData:
    """Read one run of the page.

    Args:
        with_scores: also read the best checkpoint, from which paired differences are computed.
    """
    content = read_settings(run.config)
    settings = {} if content is None else relevant_settings(content)
    best = try_read(lambda: best_probe(run)) if with_scores else None
    problems = ["config.yaml is missing or damaged: the settings are left out"] if content is None else []
    return RunData(Trial(run, settings, run.status.read(), best), problems)
