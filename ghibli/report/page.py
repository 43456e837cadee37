"""Writes a report: one self-contained HTML page for a run or a study."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ghibli.report.content import page_of_many, page_of_one
from ghibli.report.run_data import RunData, read_part
from ghibli.report.text import prose, typeset
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text

NAME = "report.html"


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Writes the page about these run or study folders and returns its file.

    Args:
        out: the file; by default report.html in the first folder.

    Raises:
        UserError: a folder that is no run and no study, an `out` that cannot be written.
    """
    file = out if out is not None else folders[0] / NAME
    if file.is_dir():
        raise UserError(f"--out {file}: that is a folder; name a file in it, such as {file / NAME}")
    page = page_of(folders)
    write_text(file, environment().get_template("page.html.jinja").render(page=page))
    return file


def page_of(folders: list[Path]) -> dict:
    """The content of the page."""
    runs = list({run.path.resolve(): run for folder in folders for run in runs_in(folder)}.values())
    if len(runs) == 1 and is_run(folders[0]):
        return page_of_one(read_part(runs[0], with_scores=False))
    parts: list[RunData] = [read_part(run, with_scores=True) for run in runs]
    study = folders[0] if len(folders) == 1 else None
    title = study.resolve().name if study else f"{folders[0].resolve().name} and {len(runs) - 1} more"
    return page_of_many(title, parts, study)


def is_run(folder: Path) -> bool:
    run = RunDir(folder)
    return any(path.exists() for path in (run.status, run.config, run.probe))


def runs_in(folder: Path) -> list[RunDir]:
    """The run in a folder, or the trials of a study's folder.

    Raises:
        UserError: it is neither.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (`ghibli list` shows the runs)")
    if is_run(folder):
        return [RunDir(folder)]
    trials = [RunDir(path) for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
    if not trials:
        raise UserError(
            f"{folder} is no run and no study: neither it nor a folder in it has a status.json "
            "(`ghibli list` shows the runs)"
        )
    return trials


def environment() -> Environment:
    """Jinja with everything escaped, and the two filters for words."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"typeset": typeset, "prose": prose}
    return made
