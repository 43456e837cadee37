"""Loading what a user names to generate with: a run, adapter files or, without any, the base."""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ghibli.adapters.apply import load_adapters, load_base, set_weights
from ghibli.adapters.files import read_adapter
from ghibli.adapters.trained import for_sampling, run_base, starting_base, trained_base
from ghibli.config.checks import require_finite
from ghibli.config.schema import Config
from ghibli.diffusion.process import usual_guidance
from ghibli.inference.sources import FoundSources, find_sources
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)


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

    Args, Raises:
        as find_sources.
    """
    return load_found(find_sources(sources, overrides))


def load_found(found: FoundSources) -> LoadedModel:
    """Load the base of what was found, with the adapters on it.

    Raises:
        UserError: a base or an adapter that cannot be read.
    """
    config, runs, names = found.config, found.runs, [name for name, _ in found.named]
    if found.is_tuned:
        return LoadedModel(trained_base(runs[0], config), config, [], names)
    base = for_sampling(run_base(runs[0], config) if runs else load_base(config.model))
    adapters = [(read_adapter(name, base, "adapter"), weight) for name, weight in found.named]
    load_adapters(base, adapters)
    for adapter, _ in adapters:
        wanted = adapter.metadata.get("ss_clip_skip", "None")
        if wanted.isdecimal() and int(wanted) != base.clip_skip:
            logger.warning(
                f"{adapter.file.name} was trained at clip skip {wanted}, and this draws at {base.clip_skip}: "
                f"model.clip_skip={wanted} changes that for an adapter file"
            )
    note_frozen_bits(runs, found.configs)
    return LoadedModel(base, config, [weight for _, weight in adapters], names)


def note_frozen_bits(runs: list[RunDir], configs: list[Config]) -> None:
    """Say, where runs were trained on a base in 8 or 4 bits, that the base is the full one."""
    bits = [config.model.frozen_bits for config in configs]
    if any(bits):
        each = ", ".join(f"{run.path} in {b or 'full'}" for run, b in zip(runs, bits, strict=True))
        logger.info(f"trained on a base of other bits ({each}); it is loaded in full precision for all")
