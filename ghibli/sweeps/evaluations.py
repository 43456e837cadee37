"""The trials of a study whose evaluation can be compared, and what to call them."""

from collections.abc import Callable
from typing import Any

from ghibli.runs.settings import as_yaml
from ghibli.sweeps.trials import Trial, varied

NAMES = {"none": "untouched base", "full": "all weights"}


def evaluated(trials: list[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
    """The trials that were evaluated since they were trained, with their evaluation.json."""
    found = [(trial, trial.run.read_evaluation()) for trial in trials]
    return [(trial, result) for trial, result in found if is_usable(result)]


def is_usable(result: dict[str, Any]) -> bool:
    """True for the content of an evaluation.json in which all is there that the tables show."""
    try:
        rows = [row for own in (result["models"]["base"], *result["models"].values()) for row in own]
        pairs = [row["kernel"] for row in (*rows, *([result["real"]] if "real" in result else []))]
        words = [row["sampler"] for row in rows]
        words += [finding[part] for finding in result.get("findings", []) for part in ("name", "text")]
        numbers = [row["guidance"] for row in rows] + [number for pair in pairs for number in pair]
        whole = all(result["models"].values()) and all(len(pair) == 2 for pair in pairs)
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        whole
        and all(isinstance(word, str) for word in words)
        and all(isinstance(number, int | float) for number in numbers)
    )


def name_of(trial: Trial) -> str:
    """`LoRA, trained at guidance 7.5`."""
    kind = trial.settings.get("finetune")
    return NAMES.get(kind) or f"LoRA, trained at guidance {trial.settings.get('loss.guidance'):g}"


def short_name(trial: Trial) -> str:
    """`LoRA 7.5`, for beside an image."""
    kind = trial.settings.get("finetune")
    return NAMES.get(kind) or f"LoRA {trial.settings.get('loss.guidance'):g}"


def names_of(trials: list[Trial], name: Callable[[Trial], str] = name_of, separator: str = ", ") -> list[str]:
    """A name for each that tells it apart: models of one name say what varies among them, or their folder."""
    plain, names = [name(trial) for trial in trials], []
    for own, trial in zip(plain, trials, strict=True):
        same = [other for other, their in zip(trials, plain, strict=True) if their == own]
        words = [f"{key.split('.')[-1]} {as_yaml(trial.settings.get(key))}" for key in varied(same)]
        names.append(separator.join([own, *words]))
    for folder in (lambda trial: trial.run.path.name, lambda trial: str(trial.run.path)):
        names = [
            f"{own} ({folder(trial)})" if names.count(own) > 1 else own
            for own, trial in zip(names, trials, strict=True)
        ]
    return names
