"""The trials of a study whose evaluations can be compared, and names that tell them apart."""

from collections.abc import Callable
from typing import Any

from ghibli.config.schema import guidance_text
from ghibli.runs.settings import as_yaml
from ghibli.sweeps.trials import Trial, varied

UNGUIDED_NAMES = {"none": "untouched base", "full": "all weights"}  # setting finetune -> name


def evaluated(trials: list[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
    """Return the trials that were evaluated since they were trained, with their evaluation.json."""
    found = [(trial, trial.run.read_evaluation()) for trial in trials]
    return [(trial, result) for trial, result in found if is_complete(result)]


def is_complete(result: dict[str, Any]) -> bool:
    """Return True if the content of an evaluation.json has everything that the tables show."""
    try:
        rows = [row for own in (result["models"]["base"], *result["models"].values()) for row in own]
        pairs = [row["kernel"] for row in (*rows, *([result["real"]] if "real" in result else []))]
        texts = [row["sampler"] for row in rows]
        texts += [finding[part] for finding in result.get("findings", []) for part in ("name", "text")]
        numbers = [row["guidance"] for row in rows] + [number for pair in pairs for number in pair]
        no_gaps = all(result["models"].values()) and all(len(pair) == 2 for pair in pairs)
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        no_gaps
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int | float) for number in numbers)
    )


def model_name(trial: Trial) -> str:
    """Name a trial's model: `LoRA, trained at guidance 7.5`, or `... guidance target 7.5`."""
    kind = str(trial.settings.get("finetune"))
    return UNGUIDED_NAMES.get(kind) or f"LoRA, trained at {guidance_of(trial)}"


def short_model_name(trial: Trial) -> str:
    """Return a short name of a trial's model, to stand beside an image: `LoRA 7.5`."""
    kind = str(trial.settings.get("finetune"))
    return UNGUIDED_NAMES.get(kind) or f"LoRA {guidance_of(trial).removeprefix('guidance ')}"


def guidance_of(trial: Trial) -> str:
    """Say the guidance of a trial's training, as guidance_text does."""
    return guidance_text(trial.settings["loss.guidance"], trial.settings.get("loss.guidance_target"))


def unique_names(
    trials: list[Trial], name: Callable[[Trial], str] = model_name, separator: str = ", "
) -> list[str]:
    """Give each trial a unique name: the model's, then the settings that vary, then the folder if needed."""
    plain, names = [name(trial) for trial in trials], []
    for own, trial in zip(plain, trials, strict=True):
        namesakes = [other for other, their in zip(trials, plain, strict=True) if their == own]
        settings = [f"{key.split('.')[-1]} {as_yaml(trial.settings.get(key))}" for key in varied(namesakes)]
        names.append(separator.join([own, *settings]))
    for folder in (lambda trial: trial.run.path.name, lambda trial: str(trial.run.path)):
        names = [
            f"{own} ({folder(trial)})" if names.count(own) > 1 else own
            for own, trial in zip(names, trials, strict=True)
        ]
    return names
