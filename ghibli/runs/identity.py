"""What makes a run's result: hashes of its settings and of the code on the training path.

Both are kept in status.json, beside the hashes of base and images (see folder.check_unchanged).
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from ghibli.config.schema import CONFIG_VERSION, Config
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import relevant_settings
from ghibli.runtime.files import ROOT

TRAINING_PACKAGES = (  # all that train.py imports; tests/runs/test_identity.py compares with its imports
    "runtime", "config", "images", "models", "runs", "diffusion", "demo/scenes", "data", "adapters",
    "evaluation", "training", "prepare",
)  # fmt: skip


def settings_hash(config: Config) -> str:
    """Return the sha256 of the settings that can change the result, hex."""
    relevant = relevant_settings(asdict(config))
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()


def code_hash() -> str:
    """Return the sha256 of train.py and the packages it trains with, hex; other code does not count."""
    files = [ROOT / "train.py"]
    for package in TRAINING_PACKAGES:
        files += sorted((ROOT / "ghibli" / package).rglob("*.py"))
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def identity_fields(config: Config, run: RunDir) -> dict[str, Any]:
    """Return the entries of status.json that identify a run; the code is that of its first start."""
    return {
        "config_version": CONFIG_VERSION,
        "settings_hash": settings_hash(config),
        "code_hash": run.status.read().get("code_hash") or code_hash(),
    }


def result_checksum(status: dict[str, Any]) -> str:
    """Return the sha256 of the entries that a finished run's objective is trusted by, hex."""
    trusted = [status.get(key) for key in ("state", "objective", "settings_hash", "code_hash")]
    return hashlib.sha256(json.dumps(trusted).encode()).hexdigest()


def finished_objective(run: RunDir) -> float | None:
    """Read a finished run's objective from status.json; None when unfinished, or when a digit was changed."""
    status = run.status.read()
    is_trusted = status.get("state") == "finished" and status.get("seal") == result_checksum(status)
    return status["objective"] if is_trusted else None


def describe_commit(status: dict[str, Any]) -> str:
    """Describe the commit that a run was started from: `07578e1 with changes`."""
    commit = str(status.get("git_commit") or "unknown")[:7]
    return f"{commit} with changes" if status.get("git_dirty") else commit
