"""Find run folders: all of them, the one to resume, the finished ones. Reads no settings, and so no Hydra."""

import os
from collections.abc import Iterator
from pathlib import Path

from ghibli.config.paths import ADAPTER_FILE, NO_PICKLE, PICKLES, convert_command
from ghibli.runs.folder import RunDir
from ghibli.runtime.commands import command_here, list_hint
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded

OUTPUTS = Path("outputs")
NO_RUNS = (
    "checkpoints", "samples", "adapter", "adapter_last", "unet", "wandb", "tensorboard", ".hydra", "cache",
)  # fmt: skip


def all_runs(root: Path = OUTPUTS) -> list[RunDir]:
    """List the run folders below `root`, oldest first by the start time in their status.json."""
    runs = [RunDir(folder) for folder in folders_with("status.json", root)]
    return sorted(runs, key=lambda run: (str(run.status.read().get("started", "")), str(run.path)))


def folders_with(name: str, root: Path) -> Iterator[Path]:
    """Yield the folders below `root` that hold a file of this name; links are followed, each folder once.

    Not those in a run folder: whoever made it may have linked to all of this disk.
    """
    seen: set[Path] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        own = Path(folder).resolve()
        found = own not in seen and (name in names or Path(folder, name).is_dir())
        below = [
            each for each in inner if each not in NO_RUNS and not (found and Path(folder, each).is_symlink())
        ]
        inner[:] = [] if own in seen else sorted(below)
        if found:
            yield Path(folder)
        seen.add(own)


def run_to_resume(name: str, root: Path = OUTPUTS) -> RunDir:
    """Return the run folder `name`; for `latest`, the newest run with a checkpoint.

    Raises:
        UserError: no such folder, or nothing in it to resume from.
    """
    if name == "latest":
        runs = [run for run in all_runs(root) if has_checkpoint(run)]
        if not runs:
            raise UserError(f"resume=latest: no run with a checkpoint below {root}/")
        run = runs[-1]
    else:
        run = RunDir(Path(name))
    if not run.path.is_dir():
        raise UserError(f"resume={name}: no such folder {list_hint()}")
    if not has_checkpoint(run):
        raise UserError(
            f"resume={name}: this folder has no checkpoints/last.ckpt to resume from; "
            f"start the run again {list_hint()}"
        )
    if not run.config.exists():
        raise UserError(
            f"resume={run.path}: its config.yaml is missing: restore the file, or start a new run"
        )
    run.checkpoint_to_resume()
    return run


def has_checkpoint(run: RunDir) -> bool:
    """Return whether the run has a checkpoint to resume from, intact or not."""
    return run.last_checkpoint.exists() or run.previous_checkpoint.exists()


def run_named(name: str, root: Path = OUTPUTS) -> RunDir:
    """Return the run folder `name`; for `latest`, the newest run, whatever its state.

    Raises:
        UserError: `latest`, and there is none.
    """
    if name != "latest":
        return RunDir(Path(name))
    runs = all_runs(root)
    if not runs:
        raise UserError(f"latest: no run below {root}/ yet: {command_here('python', 'train.py')} makes one")
    return runs[-1]


def finished_run(name: str) -> RunDir:
    """Return the run folder `name`; for `latest`, the newest finished run that trained something.

    Raises:
        UserError: `latest`, and there is none.
    """
    if name != "latest":
        return RunDir(Path(name))
    finished = runs_with_weights()
    if not finished:
        command = command_here("python", "train.py")
        raise UserError(f"latest: no finished run below {OUTPUTS}/ yet: {command} makes one")
    return finished[-1]


def path_named(name: str | Path) -> Path:
    """Return a path as it is; for `latest`, that of the newest finished run that trained something.

    Raises:
        UserError: `latest`, and there is none.
    """
    return finished_run("latest").path if str(name) == "latest" else Path(name)


def require_there(folder: Path) -> None:
    """Raise a UserError unless a folder that was named as a run or a study exists."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder {list_hint()}")


def adapter_named(path: str | Path, what: str) -> Path:
    """Return an adapter file: the path itself, the only one in a folder, or the one of a run.

    Args:
        what: the key or flag that named it, for messages.

    Raises:
        UserError: nothing there, several files, or a pickle.
    """
    place = expanded(path)
    if RunDir(place).config.is_file():
        place = RunDir(place).adapter
    if place.is_dir():
        found = sorted(place.glob("*.safetensors"))
        named = [file for file in found if file.name == ADAPTER_FILE]
        if not found or (len(found) > 1 and not named):
            there = (
                f"several: {', '.join(file.name for file in found[:4])}; name one of them"
                if found
                else "none"
            )
            raise UserError(f"{what} {path}: which .safetensors file? there are {there}")
        place = (named or found)[0]
    if not place.is_file():
        raise UserError(f"{what} {path}: no such file or run {list_hint()}")
    if place.suffix in PICKLES:
        raise UserError(f"{what} {path}: {NO_PICKLE}; {convert_command([place])}")
    return place


def runs_with_weights() -> list[RunDir]:
    """List the finished runs below outputs/ that trained something, oldest first."""
    return [run for run in all_runs() if run.status.state == "finished" and run.has_weights]
