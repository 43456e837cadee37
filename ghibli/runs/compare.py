"""Why two runs differ: settings, code, versions, machine, images, base; and whether they do. No torch."""

import csv
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ghibli.config.files import read_settings
from ghibli.config.keys import affects_result
from ghibli.runs.folder import PLACE, RunDir
from ghibli.runs.identity import FOLLOWED, differences, flat, shown
from ghibli.runtime.errors import UserError

WEIGHTS = ("adapter/pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors")
HASHES = {"base_hash": "base", "data_hash": "images"}
TOLD_OTHERWISE = ("data.root", "model.path", *FOLLOWED)  # by the hashes, and by the keys that follow them
KINDS = {"code": "code", "versions": "versions"}  # of the keys of status.json; the others: machine


@dataclass(frozen=True)
class Side:
    """One run as its folder tells it."""

    run: RunDir
    status: dict[str, Any]
    settings: dict[str, Any]  # dotted keys

    @property
    def facts(self) -> dict[str, Any]:
        """What status.json says about code and machine, `A, then B` where a resume changed it."""
        starts = self.status.get("starts") or [self.status]
        found: dict[str, Any] = {}
        for key in PLACE:
            values = dict.fromkeys(str(short(start.get(key))) for start in starts)
            found[key] = ", then ".join(values)
        versions = [start.get("versions") or {} for start in starts]
        for name in dict.fromkeys(name for one in versions for name in one):
            found[f"versions.{name}"] = ", then ".join(dict.fromkeys(str(one.get(name)) for one in versions))
        del found["versions"]
        return found | {key: self.status.get(key) for key in HASHES}


def short(value: Any) -> Any:
    """A commit or a hash as one can read it aloud; anything else as it is."""
    return value[:7] if isinstance(value, str) and len(value) in (40, 64) else value


def read_side(folder: str) -> Side:
    """Raises a UserError for a folder that is not there, is no run or is damaged."""
    run = RunDir(Path(folder))
    if not run.path.is_dir():
        raise UserError(f"{folder}: no such folder (`ghibli list` shows the runs)")
    if not run.status.exists() or not run.config.exists():
        raise UserError(
            f"{folder} is no run: it has no status.json and config.yaml (`ghibli list` shows them)"
        )
    status = run.read_status()
    if not status:
        raise UserError(f"{run.status} is damaged: this run cannot be compared")
    settings = read_settings(run.config)
    if settings is None:
        raise UserError(f"{run.config} is damaged: this run cannot be compared")
    return Side(run, status, flat(settings))


def compare(one: Side, other: Side) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]], str]:
    """(what differs, the results, one closing sentence); rows are (what, of the one, of the other)."""
    found = [*differences(one.settings, other.settings), *differences(one.facts, other.facts)]
    rows = [(key, cell(left), cell(right)) for key, left, right in found]
    return rows, results(one, other), verdict(one, other, [key for key, _, _ in found])


def cell(value: Any) -> str:
    """A value as a table shows it; hashes cut."""
    text = shown(value)
    return text[:12] if len(text) == 64 and " " not in text else text


def results(one: Side, other: Side) -> list[tuple[str, str, str]]:
    """State, epochs and gain side by side."""
    rows = []
    for side in (one, other):
        gain, error = side.status.get("gain"), side.status.get("gain_se")
        words = "-" if gain is None else f"{100 * gain:.1f} %"
        words += f" +- {100 * error:.1f} %" if gain is not None and error is not None else ""
        rows.append((side.run.state, str(side.status.get("epoch", "-")), words))
    return [
        (name, *pair) for name, pair in zip(("state", "epochs", "gain"), zip(*rows, strict=True), strict=True)
    ]


def kinds_of(keys: list[str], one: Side, other: Side) -> list[str]:
    """The kinds of difference that can change a result: settings, code, versions, machine, base, images.

    A commit is no cause by itself: the hash of the code on the training path is.
    """
    kinds: list[str] = []
    for key in keys:
        if key in HASHES or key.split(".")[0] in KINDS:
            kind = HASHES.get(key) or KINDS[key.split(".")[0]]
        elif key in ("git_commit", "git_dirty"):
            continue
        else:
            kind = "machine" if key in PLACE else "settings"
        if kind != "settings" or (affects_result(key) and key not in TOLD_OTHERWISE):
            kinds.append(kind)
    if one.status.get("grown") != other.status.get("grown"):
        kinds.append("epochs added on the way")
    return list(dict.fromkeys(kinds))


def verdict(one: Side, other: Side, keys: list[str]) -> str:
    """What must hold between the two, and whether it does."""
    kinds = kinds_of(keys, one, other)
    if {one.status.get("state"), other.status.get("state")} != {"finished"}:
        what = f"they differ in {', '.join(kinds)}" if kinds else "nothing that matters differs so far"
        return f"{what}; results can be compared once both are finished"
    first = first_unequal(one.run, other.run)
    if kinds:
        causes = f"{', '.join(kinds)}: {'this' if len(kinds) == 1 else 'each'} can change the result"
        return f"they differ in {causes}" + (
            "; yet the results are equal to the bit" if first is None else ""
        )
    same = "same settings, code, versions, data and machine: results must be equal to the bit"
    if first is None:
        return f"{same}, and they are"
    if not all(str(side.facts["device"]).startswith("cpu") for side in (one, other)):
        return f"{same.split(':')[0]}; {first}, as sums on a GPU may round differently"
    return f"{same}, but {first}: that is a fault, please report it"


def first_unequal(one: RunDir, other: RunDir) -> str | None:
    """Where two finished runs' results first differ, in words; None when they are equal to the bit."""
    for left, right in ((one.metrics, other.metrics), (one.probe, other.probe)):
        for a, b in zip_longest(untimed_rows(left), untimed_rows(right)):
            if a != b:
                return f"{left.name} differs at step {(a or b).get('step', '?')}"
    for name in WEIGHTS:
        if content(one.path / name) != content(other.path / name):
            return f"{name} differs"
    return None


def untimed_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file without the columns that measure time; none when there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:  # a damaged byte is a difference as well
        return [
            {k: v for k, v in row.items() if not str(k).startswith("time/")} for row in csv.DictReader(file)
        ]


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
