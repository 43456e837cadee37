"""What a person names to draw with: a run, adapter files, or nothing but the base -> a base that samples."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ghibli.adapters import apply
from ghibli.adapters.apply import load_adapters, scale
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.trained import for_sampling, starting_base, trained_base
from ghibli.config.schema import Config
from ghibli.diffusion.process import usual_guidance
from ghibli.models.base import BaseModel
from ghibli.runs.compose import compose_config
from ghibli.runs.find import finished_config, finished_run
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

WHAT = "adapter"  # as messages call it


@dataclass
class LoadedModel:
    """A base with adapters on it, each with a weight that may be changed."""

    base: BaseModel
    config: Config  # of the run, or of train.py without further words: base, style, resolution
    weights: list[float]  # of the adapters, in their order; none: the base alone, or a fine-tuned UNet
    names: list[str]  # of what was named

    def at(self, factor: float) -> BaseModel:
        """What draws with every adapter at `factor` times its own weight; at 0 the base, to the bit.

        Raises:
            UserError: all weights were trained and factor is neither 0 nor 1.
        """
        if self.weights:
            scale(self.base, [factor * weight for weight in self.weights])
        if self.weights or not self.names or factor == 1:
            return self.base
        if factor == 0:
            return self._untouched
        raise UserError(f"{self.names[0]} trained all weights: its scale is 1 or 0, nothing between")

    @cached_property
    def _untouched(self) -> BaseModel:
        """The base that a run started from which trained all weights."""
        return starting_base(self.config)

    @property
    def guidance(self) -> float:
        """The sampling scale that suits what was named."""
        trained = any(RunDir(Path(name)).config.is_file() for name in self.names)
        return usual_guidance(self.config.loss.guidance) if trained else 7.5


def load_model(sources: list[str], words: list[str]) -> LoadedModel:
    """Loads what was named.

    Args:
        sources: run folders, `latest`, adapter files or folders, each perhaps with :WEIGHT.
        words: settings of train.py that choose the base where no run does.

    Raises:
        UserError: nothing there, or adapters of several bases.
    """
    named = [weighted(source) for source in sources]
    runs = [RunDir(Path(name)) for name, _ in named if RunDir(Path(name)).config.is_file()]
    configs = [finished_config(run) for run in runs]
    if runs and words:
        raise UserError(f"{words[0]}: {runs[0].path} keeps its own base and settings; leave it out")
    config = configs[0] if configs else settings(words)
    other = next((c for c in configs if base_of(c) != base_of(config)), None)
    if other is not None:
        raise UserError(f"these runs have different bases: {config.model.path} and {other.model.path}")
    idle = [run for run, its in zip(runs, configs, strict=True) if its.finetune == "none"]
    if idle:
        raise UserError(f"{idle[0].path} only measured the base: name no run to draw with the base alone")
    whole = [run for run, its in zip(runs, configs, strict=True) if its.finetune == "full"]
    if whole and len(named) > 1:
        raise UserError(f"{whole[0].path} trained all weights: it cannot be combined with others")
    if whole:
        return LoadedModel(trained_base(whole[0], config), config, [], [named[0][0]])
    base = for_sampling(apply.load_base(config.model))
    adapters = [(adapter_of(name, base), weight) for name, weight in named]
    load_adapters(base, adapters)
    return LoadedModel(base, config, [weight for _, weight in adapters], [name for name, _ in named])


def base_of(config: Config) -> tuple[str, str | None, float]:
    """What tells one base from another."""
    return config.model.path, config.model.adapter, config.model.adapter_scale


def adapter_of(name: str, base: BaseModel) -> Adapter:
    """The adapter of a run or a file."""
    return read_adapter(name, base, WHAT)


def settings(words: list[str]) -> Config:
    """The settings of `train.py WORDS`."""
    return compose_config(words)


def weighted(source: str) -> tuple[str, float]:
    """`PATH:0.7` -> (PATH, 0.7); without a number the weight is 1; `latest` is the newest finished run."""
    path, colon, number = source.rpartition(":")
    try:
        name, weight = (path, float(number)) if colon and not Path(source).exists() else (source, 1.0)
    except ValueError:
        name, weight = source, 1.0
    return (str(finished_run(name).path) if name == "latest" else name), weight
