"""The trials of a study, read from their folders, and the settings that vary among them."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ghibli.config.files import read_settings
from ghibli.evaluation.gain import Gain, Probe
from ghibli.evaluation.scores import best_probe
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import first_of
from ghibli.runs.settings import relevant_settings
from ghibli.runtime.files import read_plain

LONGEST_REASON = 2**16  # bytes of a no_result.txt


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    run: RunDir
    settings: dict[str, Any]  # dotted key -> value, all that can change a result
    status: dict[str, Any]
    best: Probe | None  # scores of the best epoch; None for a trial that has not finished, or was refused

    @property
    def scores(self) -> Probe:
        """The scores of the best epoch of a trial that has a gain, the only kind that is compared."""
        assert self.best is not None, "trials without a gain are left out before"
        return self.best

    @property
    def gain(self) -> Gain | None:
        """The gain over the base of the best epoch."""
        return None if self.best is None else self.best.val_gain

    @property
    def price(self) -> Gain | None:
        """What the best epoch has forgotten of what the base was made for; None where it was not measured."""
        return None if self.best is None else self.best.forgotten

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the lowest held-out loss."""
        return self.status.get("best_epoch")

    @property
    def verdict(self) -> str:
        """The names of the doctor's findings, or why there is no result."""
        if self.run.no_result.exists():
            return f"failed: {self.why_no_result}"
        if self.run.status.state != "finished":
            reason = self.status.get("reason")
            return f"{self.run.status.state}: {reason}" if reason else self.run.status.state
        return ", ".join(finding["name"] for finding in self.status.get("findings", []))

    @property
    def why_no_result(self) -> str:
        """The text of no_result.txt."""
        try:
            return read_plain(self.run.no_result, LONGEST_REASON).decode(errors="backslashreplace")
        except OSError as error:
            return f"{self.run.no_result.name} cannot be read: {error.strerror}"

    @property
    def repeats(self) -> bool:
        """True for a trial that repeats another one, which is there, with a new seed."""
        return first_of(self.run) is not self.run

    @property
    def distance(self) -> tuple[float, float, str] | None:
        """(kernel distance, its standard error, `ddim 7.5`) in the best cell; None when not evaluated."""
        try:
            cells = self.run.read_evaluation()["models"]["run"]
            found = [(*cell["kernel"], f"{cell['sampler']} {cell['guidance']:g}") for cell in cells]
        except (KeyError, TypeError, ValueError):
            return None
        return min(found, default=None)

    @property
    def grid(self) -> Path | None:
        """The newest image grid."""
        return max(self.run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime_ns, default=None)

    @property
    def minutes(self) -> float | None:
        """Minutes from start to end; None for a resumed trial, whose pauses are not recorded."""
        started, ended = self.status.get("started"), self.status.get("ended")
        if started is None or ended is None or len(self.status.get("starts", [])) > 1:
            return None
        try:
            return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds() / 60
        except (TypeError, ValueError):  # no times, or one of them without a zone
            return None


def read_trials(folder: Path) -> list[Trial]:
    """Read every trial in a study's folder, the best first, those without a gain last."""
    trials = [read_trial(RunDir(path.parent)) for path in sorted(folder.glob("*/status.json"))]
    found = [trial for trial in trials if trial is not None]
    return sorted(found, key=lambda trial: -(trial.gain.value if trial.gain else -float("inf")))


def read_trial(run: RunDir) -> Trial | None:
    """Read one trial; None if its config.yaml cannot be read."""
    content = read_settings(run.config)
    if content is None:
        return None
    has_result = (
        run.status.state == "finished" and not run.no_result.exists()
    )  # a running trial's may still change
    best = best_probe(run) if has_result else None
    return Trial(run, relevant_settings(content), run.status.read(), best)


def varied(trials: list[Trial]) -> list[str]:
    """Return the settings that differ between trials, except those that follow from another one."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    several = [key for key in keys if len({str(trial.settings.get(key)) for trial in trials}) > 1]
    return [key for key in several if key != "lora.alpha" or not alpha_follows(trials)]


def alpha_follows(trials: list[Trial]) -> bool:
    """Return True if lora.alpha follows from variant and rank in all trials, as its default does.

    That is one value for all rslora trials, and one multiple of lora.rank for all others.
    """
    found: dict[bool, set[float]] = {True: set(), False: set()}
    for trial in trials:
        alpha, rank = trial.settings.get("lora.alpha"), trial.settings.get("lora.rank")
        if not isinstance(alpha, int | float) or not isinstance(rank, int | float) or not rank:
            return False
        is_fixed = trial.settings.get("lora.variant") == "rslora"
        found[is_fixed].add(round(alpha / (1 if is_fixed else rank), 9))
    return all(len(values) <= 1 for values in found.values())


def setting_values(key: str, trials: list[Trial]) -> list[Any]:
    """Return the values of a setting among the trials, each once, sorted."""
    values = {str(trial.settings.get(key)): trial.settings.get(key) for trial in trials}
    return sorted(values.values(), key=numbers_first)


def numbers_first(value: Any) -> tuple[bool, Any]:
    """Return a sort key: numbers by size, then everything else as text."""
    is_text = not isinstance(value, int | float)
    return is_text, str(value) if is_text else value
