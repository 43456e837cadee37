"""A study's trials, read from their folders, and which settings matter."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ghibli.config.files import read_settings
from ghibli.evaluation.gain import Gain, Probe, best_epoch
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import relevant_settings
from ghibli.runtime.files import is_whole

REPEAT = "+seed="  # in the folder of a trial that was repeated with another seed


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    run: RunDir
    settings: dict[str, Any]  # dotted key -> value, all that can change a result
    status: dict[str, Any]
    best: Probe | None  # scores of the best epoch; None for one that has not finished, or was refused

    @property
    def gain(self) -> Gain | None:
        """How much better than the base its best epoch is."""
        return None if self.best is None else self.best.val_gain

    @property
    def verdict(self) -> str:
        """What became of it: the doctor's findings, or why it has no result."""
        if self.run.no_result.exists():
            return f"failed: {self.run.no_result.read_text()}"
        if self.run.state != "finished":
            reason = self.status.get("reason")
            return f"{self.run.state}: {reason}" if reason else self.run.state
        return ", ".join(finding["name"] for finding in self.status.get("findings", []))

    @property
    def repeats(self) -> bool:
        """True for one that repeats another trial with another seed."""
        return REPEAT in self.run.path.name

    @property
    def distance(self) -> tuple[float, float, str] | None:
        """(kernel distance, its standard error, `ddim 7.5`) of its best cell; None when not evaluated."""
        try:
            cells = self.run.read_evaluation()["models"]["run"]
            found = [(*cell["kernel"], f"{cell['sampler']} {cell['guidance']:g}") for cell in cells]
        except (KeyError, TypeError, ValueError):
            return None
        return min(found, default=None)

    @property
    def grid(self) -> Path | None:
        """The last image grid."""
        return max(self.run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime_ns, default=None)

    @property
    def minutes(self) -> float | None:
        """From start to end; None for a resumed trial, as nothing says how long it did not run."""
        times = self.status.get("started"), self.status.get("ended")
        if None in times or len(self.status.get("starts", [])) > 1:
            return None
        started, ended = map(datetime.fromisoformat, times)
        return (ended - started).total_seconds() / 60


def read_trials(folder: Path) -> list[Trial]:
    """Every trial below a study's folder, the best first, those without a gain last."""
    trials = [read_trial(RunDir(path.parent)) for path in sorted(folder.glob("*/status.json"))]
    found = [trial for trial in trials if trial is not None]
    return sorted(found, key=lambda trial: -(trial.gain.value if trial.gain else -float("inf")))


def read_trial(run: RunDir) -> Trial | None:
    """One trial; None where config.yaml cannot be read."""
    content = read_settings(run.config)
    if content is None:
        return None
    is_result = run.state == "finished" and not run.no_result.exists()  # nor is what a trial under way has
    best = best_probe(run) if is_result else None
    return Trial(run, relevant_settings(content), run.read_status(), best)


def best_probe(run: RunDir) -> Probe | None:
    """The scores of the best epoch, from best.ckpt; None without a whole one."""
    if not is_whole(run.best_checkpoint):
        return None
    stored = torch.load(run.best_checkpoint, weights_only=True, map_location="cpu")["probe"]
    history = [Probe(**probe) for probe in stored]
    return history[best_epoch(history)] if len(history) > 1 else None


def varied(trials: list[Trial]) -> list[str]:
    """The settings that are not the same in all trials, but for those that follow another one."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    several = [key for key in keys if len({str(trial.settings.get(key)) for trial in trials}) > 1]
    return [key for key in several if key != "lora.alpha" or not alpha_follows(trials)]


def alpha_follows(trials: list[Trial]) -> bool:
    """True where lora.alpha is the same multiple of lora.rank in all trials."""
    pairs = [(trial.settings.get("lora.alpha"), trial.settings.get("lora.rank")) for trial in trials]
    return None not in sum(pairs, ()) and len({round(alpha / rank, 9) for alpha, rank in pairs}) == 1


def levels(key: str, trials: list[Trial]) -> list[Any]:
    """The values of a setting, each once, in order."""
    values = {str(trial.settings.get(key)): trial.settings.get(key) for trial in trials}
    return sorted(values.values(), key=order)


def order(value: Any) -> tuple[bool, Any]:
    """Sorts numbers by size and puts words behind them."""
    is_word = not isinstance(value, int | float)
    return is_word, str(value) if is_word else value
