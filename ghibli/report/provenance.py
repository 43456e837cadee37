"""Provenance of runs for a report page: commit, versions, machine, hashes, commands."""

from ghibli.report.run_data import RunData, try_read
from ghibli.report.text import format_time
from ghibli.runs.compare import Side


def provenance_facts(data: RunData) -> dict[str, str]:
    """Return label -> text of everything the run's files say about its provenance."""
    status = data.trial.status
    starts = [start for start in status.get("starts") or [status] if isinstance(start, dict)]
    recorded = try_read(lambda: Side(data.run, status, data.trial.settings).facts, {})
    versions = [
        f"{key.removeprefix('versions.')} {value}"
        for key, value in recorded.items()
        if key[:9] == "versions."
    ]
    commands = dict.fromkeys(str(start.get("command")) for start in starts if start.get("command"))
    rows = {
        "folder": data.run.path, "state": data.state, "started": format_time(status.get("started")),
        "ended": format_time(status.get("ended")), "command": "; then ".join(commands),
        "seed": status.get("seed"), "git commit": recorded.get("git_commit"),
        "uncommitted changes": {"True": "yes", "False": "no"}.get(str(recorded.get("git_dirty"))),
        "code on the training path": recorded.get("code"), "versions": ", ".join(versions),
        "machine": recorded.get("machine"), "processor": recorded.get("processor"),
        "device": recorded.get("device"), "devices": recorded.get("devices"),
        "threads": recorded.get("threads"), "precision": recorded.get("precision"),
        "base (sha256)": status.get("base_hash"),
        "images (sha256)": status.get("data_hash"), "settings (sha256)": status.get("settings_hash"),
    }  # fmt: skip
    return {label: str(value) for label, value in rows.items() if value not in (None, "", "None")}


def shared_facts(runs: list[RunData]) -> dict[str, str]:
    """Return the facts that are the same for all runs."""
    every = [provenance_facts(data) for data in runs]
    return {
        label: text for label, text in every[0].items() if all(facts.get(label) == text for facts in every)
    }
