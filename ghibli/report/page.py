"""Write a report: one self-contained HTML page about a run, a study, or several runs."""

import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ghibli.report.content import TIME, comparison_page, run_page
from ghibli.report.run_data import read_run
from ghibli.report.text import prose, typeset
from ghibli.runs.find import require_there
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import list_hint
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text

REPORT_FILE = "report.html"
MARK = '<meta name="generator" content="ghibli report">'  # near the top of a page of ours
OLDER = "<title>[^<]* report</title>"  # what pages of before have near theirs
NEAR = 2**12  # bytes


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page about run or study folders and return its file.

    Args:
        out: the file; None writes report.html into the first folder.

    Raises:
        UserError: a folder is neither run nor study, or `out` is a folder or a file that is no report.
    """
    file = out if out is not None else folders[0] / REPORT_FILE
    if file.is_dir():
        raise UserError(f"--out {file}: that is a folder; name a file in it, such as {file / REPORT_FILE}")
    refuse_foreign(file)
    page = page_content(folders)
    text = jinja_environment().get_template("page.html.jinja").render(page=page)
    write_text(file, text.encode("utf-8", "backslashreplace").decode())  # of names that are no UTF-8
    return file


def refuse_foreign(file: Path) -> None:
    """Check that a page replaces nothing but a page of ours.

    Raises:
        UserError: the file is something else.
    """
    if not os.path.lexists(file):
        return
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            begin = opened.read(NEAR)
    except OSError:
        begin = ""
    if MARK not in begin and not (begin.startswith("<!doctype html>") and re.search(OLDER, begin)):
        raise UserError(
            f"{file} is there already and is no report: move it away, or name another with --out FILE"
        )


def page_content(folders: list[Path]) -> dict[str, Any]:
    """Gather the content of the page: that of one run, or of several.

    Raises:
        UserError: a link leads out of a run folder.
    """
    runs = list({run.path.resolve(): run for folder in folders for run in runs_in(folder)}.values())
    for run in runs:
        run.refuse_links()  # the page is for showing around, and embeds images of the run
    if len(runs) == 1 and is_run(folders[0]):
        return run_page(read_run(runs[0], with_scores=False))
    study = folders[0] if len(folders) == 1 else None
    title = study.resolve().name if study else title_of_several([folder.resolve().name for folder in folders])
    return comparison_page(title, [read_run(run, with_scores=True) for run in runs], study)


def title_of_several(names: list[str]) -> str:
    """Name a page about several folders, by one that is not named after the time if there is one."""
    name = next((name for name in names if not TIME.match(name)), None)
    return f"{len(names)} runs compared" if name is None else f"{name} and {len(names) - 1} more"


def is_run(folder: Path) -> bool:
    """Return whether the folder holds a run, perhaps with some of its files missing."""
    run = RunDir(folder)
    return any(path.exists() for path in (run.status.path, run.config, run.probe))


def runs_in(folder: Path) -> list[RunDir]:
    """Return the run in a folder, or the trials in a study folder.

    Raises:
        UserError: the folder is missing, or neither run nor study.
    """
    require_there(folder)
    if is_run(folder):
        return [RunDir(folder)]
    trials = [RunDir(path) for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
    if not trials:
        raise UserError(
            f"{folder} is neither a run nor a study: neither it nor a folder in it has a status.json "
            f"{list_hint()}"
        )
    return trials


def jinja_environment() -> Environment:
    """Create the Jinja environment: all is escaped, two filters typeset text, `mark` tells a page of ours."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"typeset": typeset, "prose": prose}
    environment.globals |= {"mark": MARK}
    return environment
