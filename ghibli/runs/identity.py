"""Which settings and which code make a result: a trial asked for again goes on, or is finished already.

A folder's status.json holds two hashes: of the settings that can change a result, and of the code
that lies on the training path. Base and images have hashes of their own (run_dir.check_unchanged).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ghibli.config.files import read_settings
from ghibli.config.schema import CONFIG_VERSION, Config
from ghibli.runs.folder import RunDir, step_of
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import ROOT
from ghibli.runtime.rank import is_first

CODE = (  # what train.py trains with, by package; tests/runs/test_identity.py compares with the imports
    "runtime", "config", "images", "models", "runs", "diffusion", "demo/scenes", "data", "adapters",
    "evaluation", "training", "prepare",
)  # fmt: skip
FREE = (  # change no result
    "resume", "cache_dir", "local", "wandb", "checkpoint", "evaluate", "model.clip", "data.workers",
    "data.reference", "data.reference_draw", "data.grid_epochs",
)  # fmt: skip
FOLLOWED = ("data.epochs", "data.accumulate", "model.lr")  # defaults of keys that do count
Difference = tuple[str, Any, Any]  # dotted key, the one value, the other


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted key -> value; lists are values."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def is_free(key: str) -> bool:
    """True for a key that can change no result."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def that_count(settings: dict[str, Any]) -> dict[str, Any]:
    """The flat settings that can change a result. The folder of images drawn by seed is not one."""
    drawn = any(key.startswith("data.draw.") for key in settings)
    return {
        key: value
        for key, value in settings.items()
        if not is_free(key) and key not in FOLLOWED and not (drawn and key == "data.root")
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    """Every key whose value differs between flat settings; `not set` where one has no such key."""
    for key in dict.fromkeys([*one, *other]):
        pair = one.get(key, "not set"), other.get(key, "not set")
        if pair[0] != pair[1]:
            yield key, *pair


def listed(found: list[Difference], where: str) -> str:
    """`lora.rank is 32 in this run, 16 asked for; ...` for (key, there, asked)."""
    lines = (f"{key} is {shown(there)} {where}, {shown(asked)} asked for" for key, there, asked in found)
    return "; ".join(lines)


def shown(value: Any) -> str:
    """A value as one types it in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def settings_hash(config: Config) -> str:
    """sha256 of the settings that can change a result."""
    counting = that_count(flat(asdict(config)))
    return hashlib.sha256(json.dumps(counting, sort_keys=True, default=str).encode()).hexdigest()


def code_hash() -> str:
    """sha256 of train.py and the modules it trains with, so an edit elsewhere does not count."""
    files = [ROOT / "train.py"]
    for package in CODE:
        files += sorted((ROOT / "ghibli" / package).rglob("*.py"))
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def seal(status: dict[str, Any]) -> str:
    """A checksum over what a finished trial is believed for, so that no flipped digit is."""
    kept = [status.get(key) for key in ("state", "objective", "settings_hash", "code_hash")]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def finished_objective(run: RunDir) -> float | None:
    """The objective in a finished run's status.json; None when it is not finished, or damaged."""
    status = run.read_status()
    is_finished = status.get("state") == "finished" and status.get("seal") == seal(status)
    return status["objective"] if is_finished else None


def has_something_to_lose(run: RunDir) -> bool:
    """True for a folder with weights or with a result."""
    weights = (run.last_checkpoint, run.previous_checkpoint, run.best_checkpoint)
    return any(path.exists() for path in weights) or run.read_status().get("state") == "finished"


def require_same(config: Config, run: RunDir) -> None:
    """Lets a run go into a folder that is free or holds this very trial.

    Whether it is being trained is for the folder's lock to say, not for a process number that may be
    another one's by now.

    Raises:
        UserError: it holds another trial.
    """
    status = run.read_status()
    if not is_first() or not has_something_to_lose(run):
        return
    choose = f"go on with it by resume={run.path}, or choose another folder"
    if "settings_hash" not in status:
        raise UserError(f"{run.path} already holds a run, and its status.json does not say which: {choose}")
    if status["settings_hash"] != settings_hash(config):
        found = list(differences(stored_settings(run), that_count(flat(asdict(config)))))
        what = listed(found, "there") or "its config.yaml does not say which"
        raise UserError(f"{run.path} already holds a run with other settings: {what}; {choose}")
    require_this_code(run, choose)
    if status.get("grown"):
        raise UserError(
            f"{run.path} already holds a run that was planned for fewer epochs and grew, which may give "
            f"another result than one planned so: {choose}"
        )


def require_same_but_epochs(config: Config, run: RunDir) -> None:
    """Lets a trial of halving go into a folder that is free or holds it, for however many epochs.

    Raises:
        UserError: it holds other settings, or other code's result.
    """
    if not has_something_to_lose(run):
        return
    choose = "choose another folder with hydra.sweep.dir=DIR"
    both = differences(stored_settings(run), that_count(flat(asdict(config))))
    found = [difference for difference in both if difference[0] != "trainer.max_epochs"]
    if found:
        what = listed(found, "there")
        raise UserError(f"{run.path} already holds a run with other settings: {what}; {choose}")
    require_this_code(run, choose)


def require_this_code(run: RunDir, choose: str) -> None:
    """Raises a UserError, which ends in what to do, for a run that was made by other code than this."""
    status = run.read_status()
    if status.get("code_hash") != code_hash():
        raise UserError(
            f"{run.path} already holds this run, made by other code (commit {commit(status)}), so its result "
            f"may not be what the code gives now: {choose}"
        )


def stored_settings(run: RunDir) -> dict[str, Any]:
    """The settings in config.yaml that count; empty when the file cannot be read."""
    content = read_settings(run.config)
    return {} if content is None else that_count(flat(content))


def commit(status: dict[str, Any]) -> str:
    """`07578e1 with changes`: the commit a run was started from."""
    words = str(status.get("git_commit") or "unknown")[:7]
    return f"{words} with changes" if status.get("git_dirty") else words


def take_up(config: Config, run: RunDir) -> tuple[float | None, bool]:
    """What is left to do for a trial whose folder may have seen it before: (objective, resumes).

    A finished one has its objective; a half-done one resumes; anything else is cleared away.

    Raises:
        UserError: the folder holds another trial.
    """
    require_same(config, run)
    objective = finished_objective(run)
    if objective is not None:
        console.print(f"{os.path.relpath(run.path)} is finished: its objective was {objective:.4f}")
        return objective, False
    status, checkpoint = run.read_status(), run.usable_checkpoint()
    folder = os.path.relpath(run.path)
    if status.get("state") == "failed":
        console.print(f"{folder} failed before: {status.get('reason')}", style="yellow")
    if checkpoint is not None:
        console.print(f"{folder} is half done: going on from step {step_of(checkpoint)}")
        return None, True
    if has_something_to_lose(run):
        console.print(f"{folder} holds no whole checkpoint: starting anew", style="yellow")
    if run.status.exists():
        start_afresh(run)
    return None, False


def start_afresh(run: RunDir) -> None:
    """Removes what an earlier attempt noted, the checkpoints first."""
    weights = (run.last_checkpoint, run.previous_checkpoint, run.best_checkpoint)
    for path in (*weights, run.metrics, run.probe, run.distances, run.split, run.status):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def say_what_changed(run: RunDir) -> None:
    """A line for each thing about a run that is resumed by hand and may make its end another one."""
    status = run.read_status()
    if not status:
        console.print(
            "status.json is damaged or gone: earlier starts are forgotten, the dashboard has a new run",
            style="yellow",
        )
        return
    version = status.get("config_version", 0)
    if version != CONFIG_VERSION:
        console.print(
            f"this run has settings of version {version}, this code of version {CONFIG_VERSION}: "
            "they were read as they are",
            style="yellow",
        )
    if status.get("code_hash", code_hash()) != code_hash():
        console.print(
            f"the code has changed since this run was started (commit {commit(status)}): it may end "
            "differently from a run that was never stopped",
            style="yellow",
        )


def marks(config: Config, run: RunDir) -> dict[str, Any]:
    """The entries of status.json by which a trial is known again; the code is that of its first start."""
    return {
        "config_version": CONFIG_VERSION,
        "settings_hash": settings_hash(config),
        "code_hash": run.read_status().get("code_hash") or code_hash(),
    }
