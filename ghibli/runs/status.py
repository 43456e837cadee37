"""status.json of a run: its state, where it was trained, what it was trained from."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghibli.runtime.files import write_json
from ghibli.runtime.provenance import now

PLACE = (  # the entries that name code and machine; every start of a run notes them
    "code", "git_commit", "git_dirty", "versions",
    "machine", "processor", "threads", "device", "devices", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class RunStatus:
    """The status.json of one run folder; it carries a checksum of its own."""

    path: Path

    def read(self) -> dict[str, Any]:
        """Return the content; empty when the file is missing or damaged."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict):
            return {}
        stored = content.pop("sha256", None)
        return content if stored in (None, checksum(content)) else {}

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
    def state(self) -> str:
        """running, finished, interrupted or failed; killed if it says running and the process is gone."""
        status = self.read()
        state = status.get("state", "unknown")
        return "killed" if state == "running" and not is_alive(status.get("process")) else state


def checksum(content: dict[str, Any]) -> str:
    """Return sha256 of the entries, hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_alive(process: Any) -> bool:
    """Return whether a process with this id runs; False for what is no id, as in a damaged file."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
