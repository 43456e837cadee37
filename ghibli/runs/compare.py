"""Compare two runs: settings, code, versions, machine, images, base, and results. Imports no torch."""

import csv
import filecmp
import io
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ghibli.config.files import read_settings
from ghibli.config.keys import affects_result
from ghibli.runs.find import require_there
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import DEFAULTS_OF_OTHER_KEYS, as_yaml, differences, flatten
from ghibli.runs.status import PLACE
from ghibli.runtime.commands import list_hint
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import LARGEST_TABLE, read_plain

WEIGHTS = ("adapter/pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors")
HASHES = {"base_hash": "base", "data_hash": "images"}
COVERED = ("data.root", "model.path", *DEFAULTS_OF_OTHER_KEYS)  # by HASHES, and by the keys set from them
NAMES = ("name", "wandb.name", "wandb.group")  # of a run, which are no difference to explain
KINDS = {"code": "code", "versions": "versions"}  # kind of a key of status.json; all others: machine
Row = tuple[str, str, str]  # what, value of the first run, value of the second


@dataclass(frozen=True)
class Side:
    """One of two compared runs, read from its folder."""

    run: RunDir
    status: dict[str, Any]
    settings: dict[str, Any]  # full key -> value

    @property
    def facts(self) -> dict[str, Any]:
        """Code, versions and machine from status.json; `A, then B` where they changed on a resume."""
        starts = self.status.get("starts") or [self.status]
        facts: dict[str, Any] = {}
        for key in PLACE:
            values = dict.fromkeys(str(abbreviate(start.get(key))) for start in starts)
            facts[key] = ", then ".join(values)
        versions = [start.get("versions") or {} for start in starts]
        for name in dict.fromkeys(name for one in versions for name in one):
            facts[f"versions.{name}"] = ", then ".join(dict.fromkeys(str(one.get(name)) for one in versions))
        del facts["versions"]
        return facts | {key: self.status.get(key) for key in HASHES}


def abbreviate(value: Any) -> Any:
    """Cut a commit or a sha256 to 7 digits; return anything else unchanged."""
    return value[:7] if isinstance(value, str) and len(value) in (40, 64) else value


def read_side(folder: str) -> Side:
    """Read a run to compare.

    Raises:
        UserError: the folder does not exist, is no run, or is damaged.
    """
    run = RunDir(Path(folder))
    require_there(run.path)
    if not run.status.path.exists() or not run.config.exists():
        raise UserError(f"{folder} is not a run: it has no status.json and config.yaml {list_hint()}")
    status = run.status.read()
    if not status:
        raise UserError(f"{run.status.path} is damaged: this run cannot be compared")
    settings = read_settings(run.config)
    if settings is None:
        raise UserError(f"{run.config} is damaged: this run cannot be compared")
    return Side(run, status, flatten(settings))


def compare(first: Side, second: Side) -> tuple[list[Row], list[Row], str]:
    """Compare two runs: (what differs, their results, a concluding sentence)."""
    found = [*differences(first.settings, second.settings), *differences(first.facts, second.facts)]
    rows = [(key, table_cell(left), table_cell(right)) for key, left, right in found if key not in NAMES]
    return rows, result_rows(first, second), conclusion(first, second, [key for key, _, _ in found])


def table_cell(value: Any) -> str:
    """Format a value for the table; a sha256 is cut to 12 digits."""
    text = as_yaml(value)
    return text[:12] if len(text) == 64 and " " not in text else text


def result_rows(first: Side, second: Side) -> list[Row]:
    """Return the rows of state, epochs, gain and, where one was measured, price."""
    names = ("gain", "price") if "price" in first.status | second.status else ("gain",)
    columns = [
        (
            side.run.status.state, str(side.status.get("epoch", "-")),
            *(share_text(side.status.get(name), side.status.get(f"{name}_se")) for name in names),
        )
        for side in (first, second)
    ]  # fmt: skip
    return list(zip(("state", "epochs", *names), *columns, strict=True))


def share_text(value: float | None, error: float | None) -> str:
    """Format a share with its standard error, in percent; a dash for None."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" + (f" +- {100 * error:.1f} %" if error is not None else "")


def relevant_kinds(keys: list[str], first: Side, second: Side) -> list[str]:
    """List the kinds of difference that can change a result: settings, code, versions, machine, base, images.

    A commit is not one: the hash of the code on the training path is.
    """
    kinds: list[str] = []
    for key in keys:
        if key in HASHES or key.split(".")[0] in KINDS:
            kind = HASHES.get(key) or KINDS[key.split(".")[0]]
        elif key in ("git_commit", "git_dirty"):
            continue
        else:
            kind = "machine" if key in PLACE else "settings"
        if kind != "settings" or (affects_result(key) and key not in COVERED):
            kinds.append(kind)
    if first.status.get("grown") != second.status.get("grown"):
        kinds.append("epochs added on resume")
    return list(dict.fromkeys(kinds))


def conclusion(first: Side, second: Side, keys: list[str]) -> str:
    """Say what must hold between two runs that differ in these keys, and whether it does."""
    kinds = relevant_kinds(keys, first, second)
    if {first.status.get("state"), second.status.get("state")} != {"finished"}:
        what = f"they differ in {', '.join(kinds)}" if kinds else "they differ in nothing relevant so far"
        return f"{what}; results can be compared once both are finished"
    difference = first_difference(first.run, second.run)
    if kinds:
        causes = f"{', '.join(kinds)}: {'this' if len(kinds) == 1 else 'each'} can change the result"
        return f"they differ in {causes}" + ("; yet the results are bit-identical" if not difference else "")
    same = "same settings, code, versions, data and machine"
    if difference is None:
        return f"{same}: results must be bit-identical, and they are"
    if not all(str(side.facts["device"]).startswith("cpu") for side in (first, second)):
        return f"{same}; {difference}, as sums on a GPU may round differently"
    return f"{same}: results must be bit-identical, but {difference}: this is a bug, please report it"


def first_difference(first: RunDir, second: RunDir) -> str | None:
    """Describe where the results of two finished runs first differ; None when they are bit-identical."""
    for left, right in ((first.metrics, second.metrics), (first.probe, second.probe)):
        for a, b in zip_longest(rows_without_times(left), rows_without_times(right)):
            if a != b:
                return f"{left.name} differs at step {(a or b).get('step', '?')}"
    for name in WEIGHTS:
        if not same_content(first.path / name, second.path / name):
            return f"{name} differs"
    return None


def rows_without_times(path: Path) -> list[dict[str, str]]:
    """Read a CSV file without the columns of measured times; no rows when there is no file.

    Raises:
        UserError: it is no plain file, or too large to be a run's.
    """
    if not path.exists():
        return []
    try:
        text = read_plain(path, LARGEST_TABLE).decode(errors="replace")  # a damaged byte is a difference too
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [{k: v for k, v in row.items() if not str(k).startswith("time/")} for row in rows]


def same_content(left: Path, right: Path) -> bool:
    """Return whether two plain files have the same bytes, or both are missing."""
    if not (left.exists() and right.exists()):
        return left.exists() == right.exists()
    return filecmp.cmp(left, right, shallow=False)
