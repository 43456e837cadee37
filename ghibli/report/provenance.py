"""Where runs come from: commit, versions, machine, hashes, commands; of several what they share."""

from ghibli.report.run_data import RunData, attempt
from ghibli.report.text import moment
from ghibli.runs.compare import Side


def facts(part: RunData) -> dict[str, str]:
    """Where the run comes from: commit, versions, machine, hashes, commands."""
    status = part.trial.status
    starts = [start for start in status.get("starts") or [status] if isinstance(start, dict)]
    noted = attempt(lambda: Side(part.run, status, part.trial.settings).facts, {})
    versions = [
        f"{key.removeprefix('versions.')} {value}" for key, value in noted.items() if key[:9] == "versions."
    ]
    commands = dict.fromkeys(str(start.get("command")) for start in starts if start.get("command"))
    rows = {
        "folder": part.run.path, "state": part.state, "started": moment(status.get("started")),
        "ended": moment(status.get("ended")), "command": "; then ".join(commands), "seed": status.get("seed"),
        "git commit": noted.get("git_commit"),
        "uncommitted changes": {"True": "yes", "False": "no"}.get(str(noted.get("git_dirty"))),
        "code on the training path": noted.get("code"), "versions": ", ".join(versions),
        "machine": noted.get("machine"), "processor": noted.get("processor"),
        "device": noted.get("device"), "devices": noted.get("devices"), "threads": noted.get("threads"),
        "precision": noted.get("precision"), "base (sha256)": status.get("base_hash"),
        "images (sha256)": status.get("data_hash"), "settings (sha256)": status.get("settings_hash"),
    }  # fmt: skip
    return {what: str(value) for what, value in rows.items() if value not in (None, "", "None")}


def shared_facts(parts: list[RunData]) -> dict[str, str]:
    """What is the same for all runs."""
    every = [facts(part) for part in parts]
    return {what: text for what, text in every[0].items() if all(own.get(what) == text for own in every)}
