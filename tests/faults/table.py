"""What the harness saw, kept as JSON beside the docs, and as the table in docs/reliability.md."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .runs import REPO

RECORD = Path("docs/reliability/faults.json")
PAGE = Path("docs/reliability.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def record(verb: str, result: dict[str, Any]) -> None:
    """Puts one verb's result into the record, with commit, date and machine; then writes the table."""
    file = REPO / RECORD
    content = json.loads(file.read_text()) if file.exists() else {}
    if verb == "fuzz":  # a part of them may be repeated
        new = {one["what"]: one for one in result["tests"]}
        before = content.get(verb, {}).get("tests", [])
        result = result | {"tests": [*({one["what"]: one for one in before} | new).values()]}
    content[verb] = result | made() | {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n")
    write()


def made() -> dict[str, str]:
    """The commit and the date of now."""
    return {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}


def commit() -> str:
    """The commit of the code, and whether it was changed since; the record and its page do not count."""
    git = ["git", "-C", str(REPO)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", f":!{RECORD.parent}", f":!{PAGE}"],
        capture_output=True, text=True,
    )  # fmt: skip
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def write() -> None:
    """Writes the table between the two marks of docs/reliability.md."""
    page, content = REPO / PAGE, json.loads((REPO / RECORD).read_text())
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(content)}{END}{after}")


def table(content: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| what was done | how often | what happened | commit, date |", "|---|---|---|---|"]
    of_verb = {"kill": kill_rows, "corrupt": corrupt_rows, "machine": machine_rows, "fuzz": fuzz_rows}
    for verb, rows in of_verb.items():
        if verb in content:
            for what, often, end, *own in rows(content[verb]):
                when = own[0] if own else content[verb]
                lines.append(f"| {what} | {often} | {end} | {when['commit']}, {when['date']} |")
    return "\n".join(lines) + "\n"


def kill_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    places = ", ".join(f"{count} {place}" for place, count in found["where"].items())
    return [
        (
            f"SIGKILL at a random moment between a run's command and its end, {found['twice']} of the runs "
            f"once more after they had been resumed ({places})",
            f"{found['kills']} times in {found['runs']} runs",
            f"**{found['equal']} of {found['runs']} bit-equal**",
        )
    ]


def corrupt_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for pattern, outcomes in found["files"].items():
        if outcomes:
            ends = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            rows.append((f"random damage to `{pattern}`", str(sum(outcomes.values())), ends))
    total = f"**{found['sound']} of {found['damages']} detected or harmless**"
    return [*rows, ("random damage to any file, in all", str(found["damages"]), total)]


def machine_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (one["fault"], "1", f"{one['outcome']}: {one['detail'].replace('|', '/')}") for one in found["faults"]
    ]


def fuzz_rows(found: dict[str, Any]) -> list[tuple[str, str, str, dict[str, str]]]:
    sound = "read, or refused in one line; no file outside"
    rows = []
    for one in found["tests"]:
        time = f" ({one['seconds']} s)" if one["seconds"] is not None else ""  # none on a busy machine
        end = f"{sound}{time}" if one["passed"] else "**failed**"
        rows.append((f"random input: {one['what']}", f"{found['inputs']:,}", end, one.get("made", found)))
    return rows
