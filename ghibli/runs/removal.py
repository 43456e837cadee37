"""Delete a run: the files that a run writes, and no others."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ghibli.runs.find import require_there
from ghibli.runs.folder import BY_LIBRARIES, FILES, FOLDERS, RunDir
from ghibli.runtime.commands import list_hint
from ghibli.runtime.errors import UserError
from ghibli.runtime.wording import number_of


@dataclass(frozen=True)
class Removal:
    """What would be deleted of one run."""

    run: RunDir
    files: list[Path]  # files and links; a link itself goes, never what it names
    folders: list[Path]  # the deepest first
    others: list[Path]  # in the run's folder, made by nobody here: they stay
    size: int  # bytes

    def summary(self, done: bool) -> str:
        """Say in one line what goes, or went, and what stays."""
        verb = "deleted" if done else "would delete"
        text = f"{verb} {self.run.path}: {number_of(len(self.files), 'file')}, {self.size / 1e6:.1f} MB"
        if self.others:
            names = ", ".join(path.name for path in self.others[:3])
            text += f"; what no run writes stays: {names}{' ...' if len(self.others) > 3 else ''}"
        return text


def plan_removal(run: RunDir) -> Removal:
    """List what deleting a run deletes.

    Raises:
        UserError: no such folder, no run in it, or a process trains there.
    """
    require_there(run.path)
    if not run.status.path.is_file():
        raise UserError(f"{run.path} is no run: it has no status.json {list_hint()}")
    if run.status.state == "running":
        raise UserError(f"{run.path} is running: stop it first")
    own = {*FILES, *FOLDERS, *BY_LIBRARIES}
    if run.is_list_edited():
        own.remove(run.exclude_list.name)
    files, folders = [], []
    others = sorted(path for path in run.path.iterdir() if path.name not in own)
    for path in sorted(path for path in run.path.iterdir() if path.name in own):
        if path.is_symlink() or not path.is_dir():
            files.append(path)
            continue
        for folder, inner, names in os.walk(path, topdown=False):
            links = [name for name in inner if Path(folder, name).is_symlink()]
            files += [Path(folder, name) for name in (*names, *links)]
            folders.append(Path(folder))
    return Removal(run, files, folders, others, sum(path.lstat().st_size for path in files))


def remove(plan: Removal) -> None:
    """Delete what was listed, and the run's folder if nothing else is left in it.

    Raises:
        UserError: a process trains there, or something cannot be deleted, such as a folder with a new file.
    """
    last = [plan.run.status.path, plan.run.path / ".lock"]  # until these go, the rest can be deleted again
    try:
        with plan.run.lock():
            for path in [file for file in plan.files if file not in last]:
                path.unlink(missing_ok=True)
            for folder in plan.folders:
                with suppress(FileNotFoundError):  # another `ghibli rm` was first
                    folder.rmdir()
            for path in last:
                path.unlink(missing_ok=True)
        if not any(plan.run.path.iterdir()):
            plan.run.path.rmdir()
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be deleted ({error.strerror}): what is left of {plan.run.path} can be "
            "deleted by the same command"
        ) from error
