"""What a user names to generate with: runs, adapter files or, without any, the base. Found without torch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ghibli.adapters.request import find_file
from ghibli.config.schema import Config
from ghibli.runs.compose import base_config
from ghibli.runs.find import finished_run
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import exists, expanded

WEIGHT = re.compile(
    r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE
)


@dataclass(frozen=True)
class FoundSources:
    """Runs and adapter files that fit together, as far as that can be told without loading them."""

    named: list[tuple[str, float]]  # name and weight of each, in the user's order
    runs: list[RunDir]  # those among them
    configs: list[Config]  # of the runs
    config: Config  # of the first run, or of train.py with the overrides: base, style, resolution

    @property
    def is_tuned(self) -> bool:
        """Whether this is one run that trained all weights."""
        return bool(self.runs) and self.config.finetune == "full"


def find_sources(sources: list[str], overrides: list[str]) -> FoundSources:
    """Find what is named, and the settings of the base that fits it.

    Args:
        sources: run folders, `latest`, adapter files or folders, each optionally with :WEIGHT.
        overrides: of train.py, which choose the base where no run does.

    Raises:
        UserError: nothing there, or sources that cannot be combined.
    """
    named = [split_weight(source) for source in sources]
    runs = [RunDir(Path(name)) for name, _ in named if RunDir(Path(name)).config.is_file()]
    if runs and overrides:
        raise UserError(f"{overrides[0]}: {runs[0].path} has its own base and settings; leave it out")
    configs = [finished_config(run) for run in runs]
    found = FoundSources(named, runs, configs, configs[0] if configs else base_config(overrides))
    check_combination(runs, configs, len(named))
    if not found.is_tuned:
        reject_duplicates([(name, weight, find_file(name, "adapter")) for name, weight in named])
    return found


def check_combination(runs: list[RunDir], configs: list[Config], sources: int) -> None:
    """Raise a UserError for runs that cannot be loaded together.

    Args:
        sources: number of runs and adapter files in all.
    """
    for run, config in zip(runs, configs, strict=True):
        if base_identity(config) != base_identity(configs[0]):
            bases = f"{configs[0].model.path} and {config.model.path}"
            raise UserError(f"these runs have different bases: {bases}")
        if config.finetune == "none":
            raise UserError(f"{run.path} only measured the base: name no run to generate with the base alone")
        if config.finetune == "full" and sources > 1:
            raise UserError(f"{run.path} trained all weights: it cannot be combined with others")


def base_identity(config: Config) -> tuple[str, str | None, float]:
    """Return what tells one starting base from another."""
    return config.model.path, config.model.adapter, config.model.adapter_scale


def reject_duplicates(sources: list[tuple[str, float, Path]]) -> None:
    """Raise a UserError for an adapter that is named twice, whatever the names.

    Args:
        sources: (name, weight, file) of each.
    """
    first: dict[Path, tuple[str, float]] = {}
    for name, weight, file in sources:
        if file.resolve() in first:
            other, its_weight = first[file.resolve()]
            same = name if name == other else f"{other} and {name} are the same adapter: {name}"
            raise UserError(
                f"{same} is named twice: name it once, with its weight, {name}:{weight + its_weight:g}"
            )
        first[file.resolve()] = name, weight


def split_weight(source: str) -> tuple[str, float]:
    """Split `PATH:0.7` into (PATH, 0.7); the default weight is 1; `latest` is the newest finished run.

    A path that exists is taken as it is, colons and all.

    Raises:
        UserError: a weight such as `nan`.
    """
    path, colon, number = source.rpartition(":")
    name, weight = source, 1.0
    if colon and path and not exists(expanded(source)) and WEIGHT.fullmatch(number):
        name, weight = path, float(number)
        if not math.isfinite(weight):
            raise UserError(f"{source}: the weight must be a finite number, such as {path}:0.7")
    return (str(finished_run(name).path) if name == "latest" else name), weight
