"""Loading what a user names to generate with: a run, adapter files or, without any, the base."""

import logging
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ghibli.adapters.apply import load_adapters, load_base, set_weights
from ghibli.adapters.files import read_adapter
from ghibli.adapters.trained import for_sampling, run_base, starting_base, trained_base
from ghibli.config.checks import require_finite
from ghibli.config.schema import Config
from ghibli.diffusion.process import usual_guidance
from ghibli.models.base import BaseModel
from ghibli.runs.compose import base_config
from ghibli.runs.find import finished_run
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import exists, expanded

logger = logging.getLogger(__name__)

WEIGHT = re.compile(
    r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE
)


@dataclass
class LoadedModel:
    """A base with adapters on it, whose scale can be changed."""

    base: BaseModel
    config: Config  # of the run, or of train.py with the given overrides: base, style, resolution
    weights: list[float]  # of the adapters, in their order; empty = the base alone, or a fine-tuned UNet
    names: list[str]  # of the sources, as the user named them

    def at(self, scale: float) -> BaseModel:
        """Return the base with every adapter at `scale` times its own weight; at 0 the base, bit for bit.

        Raises:
            UserError: not finite, or neither 0 nor 1 where no adapter is loaded that could be scaled.
        """
        require_finite("--scale", float(scale))
        if self.weights:
            set_weights(self.base, [scale * weight for weight in self.weights])
        if self.weights or scale == 1 or (scale == 0 and not self.names):
            return self.base
        if not self.names:
            raise UserError(f"--scale {scale:g} is a factor on adapters, and none is loaded: leave it out")
        if scale == 0:
            return self._starting_base
        raise UserError(f"{self.names[0]} trained all weights: its scale is either 1 or 0")

    @cached_property
    def _starting_base(self) -> BaseModel:
        """The base that a run which trained all weights started from."""
        return starting_base(self.config)

    @property
    def guidance(self) -> float:
        """The guidance scale that suits the training: of a guided one that of its scan, if it was scanned."""
        runs = [run for name in self.names if (run := RunDir(Path(name))).config.is_file()]
        if not runs:
            return 7.5
        own = self.config.loss.own_guidance
        scanned = None if own == 1 else scanned_scale(runs[0])
        return usual_guidance(own) if scanned is None else scanned


def scanned_scale(run: RunDir) -> float | None:
    """Return the scale whose images are nearest to real ones in the scan of `ghibli evaluate`.

    None for a run that was not scanned, or trained on since.
    """
    try:
        scan = run.read_evaluation()["scan"]["run"]
        found = float(min(scan, key=lambda scale: float(scan[scale][0])))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return found if math.isfinite(found) and found >= 1 else None


def load_model(sources: list[str], overrides: list[str]) -> LoadedModel:
    """Load the base that fits the sources, with their adapters on it.

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
    config = configs[0] if configs else base_config(overrides)
    check_combination(runs, configs, len(named))
    if runs and config.finetune == "full":
        return LoadedModel(trained_base(runs[0], config), config, [], [named[0][0]])
    base = for_sampling(run_base(runs[0], config) if runs else load_base(config.model))
    adapters = [(read_adapter(name, base, "adapter"), weight) for name, weight in named]
    files = [adapter.file for adapter, _ in adapters]
    reject_duplicates([(*source, file) for source, file in zip(named, files, strict=True)])
    load_adapters(base, adapters)
    for adapter, _ in adapters:
        wanted = adapter.metadata.get("ss_clip_skip", "None")
        if wanted.isdecimal() and int(wanted) != base.clip_skip:
            logger.warning(
                f"{adapter.file.name} was trained at clip skip {wanted}, and this draws at {base.clip_skip}: "
                f"model.clip_skip={wanted} changes that for an adapter file"
            )
    note_frozen_bits(runs, configs)
    return LoadedModel(base, config, [weight for _, weight in adapters], [name for name, _ in named])


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


def note_frozen_bits(runs: list[RunDir], configs: list[Config]) -> None:
    """Say, where runs were trained on a base in 8 or 4 bits, that the base is the full one."""
    bits = [config.model.frozen_bits for config in configs]
    if any(bits):
        each = ", ".join(f"{run.path} in {b or 'full'}" for run, b in zip(runs, bits, strict=True))
        logger.info(f"trained on a base of other bits ({each}); it is loaded in full precision for all")


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
