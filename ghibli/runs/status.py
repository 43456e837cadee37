"""status.json of a run: its state, where it was trained, what it was trained from."""

import hashlib
import json
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import psutil

from ghibli.runs import lock
from ghibli.runtime.files import read_plain, write_json
from ghibli.runtime.provenance import now

PLACE = (  # the entries that name code and machine; every start of a run notes them
    "code", "git_commit", "git_dirty", "versions",
    "machine", "processor", "threads", "device", "devices", "precision",
)  # fmt: skip


LARGEST = 2**24  # bytes of a status.json; ours have some kilobytes
NUMBERS = ("gain", "gain_se", "price", "price_se", "objective")
WHOLE_NUMBERS = (
    "epoch", "step", "best_epoch", "seed", "process", "threads", "devices", "peak_memory", "config_version",
)  # fmt: skip
TEXTS = (
    "state", "reason", "started", "ended", "updated", "settings", "command", "git_commit", "code",
    "code_hash", "settings_hash", "base_hash", "configs_hash", "data_hash", "init_hash",
    "regularization_hash", "machine",
    "processor", "device", "precision", "wandb_id", "trackio_name", "seal", "base", "images",
)  # fmt: skip


@dataclass(frozen=True)
class RunStatus:
    """The status.json of one run folder; it carries a checksum of its own."""

    path: Path

    def read(self) -> dict[str, Any]:
        """Return the content, every entry of its own type; empty when the file is missing or damaged."""
        content = read_json(self.path)
        if not isinstance(content, dict):
            return {}
        stored = content.pop("sha256", None)
        is_whole = stored in (None, checksum(content)) and is_well_typed(content)
        return content if is_whole else {}

    def update(self, **changes: Any) -> None:
        """Write the file with these entries added or replaced."""
        content = self.read() | changes
        write_json(self.path, content | {"sha256": checksum(content)})

    def note_start(self, **where: Any) -> None:
        """Note where this process trains, and append the step and the code it starts from to `starts`.

        A resumed run has several entries there, which tell whether it moved between them.
        """
        status = self.read() | where
        start = {key: status.get(key) for key in ("command", "step", *PLACE)}
        self.update(**where, starts=[*status.get("starts", []), {"at": now()} | start])

    @property
    def is_damaged(self) -> bool:
        """Whether there is a file that cannot be read."""
        return self.path.exists() and not self.read()

    @property
    def state(self) -> str:
        """running, finished, interrupted or failed; killed if it says running and no process is at work."""
        return self.state_of(self.read())

    def state_of(self, status: dict[str, Any]) -> str:
        """Return `state`, given the content that was read."""
        state = status.get("state", "unknown")
        return "killed" if state == "running" and not self.is_at_work(status) else state

    def is_at_work(self, status: dict[str, Any]) -> bool:
        """Return whether a process trains in the folder: it holds the lock; without one, it is alive."""
        is_locked = lock.is_held(self.path.with_name(".lock"))
        return is_alive(status.get("process")) if is_locked is None else is_locked


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; None when it is missing, damaged, too deep, too large or no plain file."""
    try:
        return json.loads(read_plain(path, LARGEST).decode())
    except (OSError, ValueError, RecursionError):
        return None


def is_well_typed(status: dict[str, Any]) -> bool:
    """Return whether the entries of a status.json, as far as they are known, have the types we write."""

    def every(names: tuple[str, ...], kinds: type | tuple[type, ...]) -> bool:
        values = [status[name] for name in names if status.get(name) is not None]
        return all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)

    def is_drawable(number: float) -> bool:
        return number != number or abs(number) == inf or abs(number) < 2**63

    findings, starts = status.get("findings") or [], status.get("starts") or []
    return (
        every(NUMBERS, (int, float))
        and every(WHOLE_NUMBERS, int)
        and every(TEXTS, str)
        and every(("versions",), dict)
        and all(is_drawable(status.get(name) or 0) for name in (*NUMBERS, *WHOLE_NUMBERS))
        and is_list_of_objects(findings)
        and all(isinstance(one.get(part), str) for one in findings for part in ("name", "text"))
        and is_list_of_objects(starts)
        and all(isinstance(one.get("versions") or {}, dict) for one in starts)
    )


def is_list_of_objects(value: Any) -> bool:
    """Return whether a value of a JSON file is a list of objects."""
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def checksum(content: dict[str, Any]) -> str:
    """Return sha256 of the entries, hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_alive(process: Any) -> bool:
    """Return whether a process with this id runs; False for what is no id, as in a damaged file."""
    try:
        return psutil.pid_exists(process)  # os.kill(process, 0) would end it on Windows
    except (TypeError, ValueError, OverflowError):
        return False
