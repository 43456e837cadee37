"""The files of a run folder and their names; its lock."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from ghibli.runs import lock
from ghibli.runs.status import RunStatus, read_json
from ghibli.runtime.commands import path_setting
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import (
    TEMPORARY,
    checksum_of,
    is_whole,
    read_plain,
    require_stored,
    write_atomically,
)
from ghibli.runtime.rank import is_first

FOLDERS = (  # that a run writes into
    "checkpoints", "samples", "adapter", "adapter_last", "unet", "export", "slim",
)  # fmt: skip
FILES = (
    "config.yaml", "status.json", "no_result.txt", "split.json", "metrics.csv", "probe.csv", "distance.csv",
    "evaluation.json", "evaluation.png", "evaluation_nearest.png", "slim.json", "slim.csv", "influence.json",
    "influence.csv", "influence.png", "influence_exclude.txt", "report.html", ".lock",
)  # fmt: skip
CHECKPOINTS = ("last.ckpt", "previous.ckpt", "best.ckpt")
BY_LIBRARIES = (".hydra", "wandb", ".wandb", "tensorboard")  # folders that Hydra and dashboards write into
LARGEST_LIST = 2**26  # bytes of a list for data.exclude; a million names are a third of that
EVALUATION_NAMES = {"reference_pictures": "reference_images", "floor_pictures": "floor_images"}


@dataclass(frozen=True)
class RunDir:
    """One run's folder, `outputs/train/DATE_TIME` or a trial of a sweep."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status(self) -> RunStatus:
        return RunStatus(self.path / "status.json")

    @property
    def no_result(self) -> Path:
        """Why the last `python sweep.py` that asked for this trial got no result; missing otherwise."""
        return self.path / "no_result.txt"

    @property
    def split(self) -> Path:
        return self.path / "split.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def probe(self) -> Path:
        return self.path / "probe.csv"

    @property
    def distances(self) -> Path:
        return self.path / "distance.csv"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The last.ckpt before the current one, in case that is damaged."""
        return self.checkpoints / "previous.ckpt"

    def usable_checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from: last.ckpt, else previous.ckpt; None when both are damaged."""
        both = (self.last_checkpoint, self.previous_checkpoint)
        return next((checkpoint for checkpoint in both if is_whole(checkpoint)), None)

    def checkpoint_to_resume(self) -> Path:
        """Return usable_checkpoint; resuming without one would silently start from untrained weights.

        Raises:
            UserError: there is none.
        """
        found = self.usable_checkpoint()
        if found is None:
            raise UserError(
                f"{path_setting('resume', self.path)}: {self.last_checkpoint} is damaged or cut off; "
                "start the run anew"
            )
        return found

    @property
    def best_checkpoint(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def adapter(self) -> Path:
        """The adapter of the best epoch."""
        return self.path / "adapter"

    @property
    def last_adapter(self) -> Path:
        """The adapter of the last epoch."""
        return self.path / "adapter_last"

    @property
    def unet(self) -> Path:
        """The whole UNet of a run with finetune=full, as a diffusers folder."""
        return self.path / "unet"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_images(self) -> Path:
        return self.path / "evaluation.png"

    @property
    def evaluation_nearest(self) -> Path:
        return self.path / "evaluation_nearest.png"

    @property
    def layer_map(self) -> Path:
        """Which layers carry the gain, as `ghibli slim` measured it."""
        return self.path / "slim.json"

    @property
    def influence(self) -> Path:
        """What each training image did to the gain, as `ghibli influence` measured it."""
        return self.path / "influence.json"

    @property
    def exclude_list(self) -> Path:
        """The images that `ghibli influence` advises to leave out: a list for data.exclude."""
        return self.path / "influence_exclude.txt"

    def is_list_edited(self, wanted: str = "") -> bool:
        """Return whether exclude_list is the user's: no longer as `ghibli influence` wrote it.

        Args:
            wanted: sha256, hex, of a list that would be written: one with the same words is not the user's.
        """
        try:
            found = hashlib.sha256(read_plain(self.exclude_list, LARGEST_LIST)).hexdigest()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        content = read_json(self.influence)
        listed = content.get("listed") if isinstance(content, dict) else None
        return found not in (wanted, *str(listed).split())

    @property
    def has_weights(self) -> bool:
        """Whether training left something to sample with: an adapter or a whole UNet."""
        return self.adapter.is_dir() or self.unet.is_dir()

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def weights(self) -> str | None:
        """The checksum of best.ckpt, which identifies the best epoch's weights."""
        return checksum_of(self.best_checkpoint)

    def is_older(self, evaluation: dict[str, Any]) -> bool:
        """Return whether the content of an evaluation.json is of weights that training has since replaced."""
        measured, now = evaluation.get("weights"), self.weights
        return None not in (measured, now) and measured != now

    def read_evaluation(self) -> dict[str, Any]:
        """Read evaluation.json; empty when it is missing, damaged or older than the weights."""
        try:
            content = self.load_evaluation()
        except ValueError:
            return {}
        return content if not self.is_older(content) else {}

    def load_evaluation(self) -> dict[str, Any]:
        """Read evaluation.json, whatever the object holds; entries of older versions get their present names.

        Raises:
            ValueError: it is missing or damaged.
        """
        content = read_json(self.evaluation)
        if not isinstance(content, dict):
            raise ValueError(f"{self.evaluation} is no JSON object")
        return {EVALUATION_NAMES.get(str(key), str(key)): value for key, value in content.items()}

    def lock(self, key: str = "hydra.run.dir") -> lock.Lock:
        """Make this process the folder's only writer, until it ends or closes the result.

        Removes half-written files of a process that was killed.

        Args:
            key: the setting that chooses another folder.

        Raises:
            UserError: another process is at work here, the folder cannot be made or locked, or a link leads
                out of it.
        """
        self.refuse_links()
        if not is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            return lock.Lock(open(self.path / ".lock", "ab", opener=lock.open_no_link).close)
        taken = lock.take(self.path / ".lock", key)
        for unfinished in self.unfinished():
            unfinished.unlink(missing_ok=True)
        return taken

    def refuse_links(self) -> None:
        """Check that nothing a run writes into is a link out of its folder, as in a run from elsewhere.

        The folder itself may be one: the user named it.

        Raises:
            UserError: a file or folder of the run is a link that leads elsewhere.
        """
        home = self.path.resolve()
        for path in self.own_files():
            leads_out = path.is_symlink() and not path.resolve().is_relative_to(home)
            if leads_out or (path.name == ".lock" and path.is_symlink()):
                raise UserError(
                    f"{path} is a link to {os.readlink(path)}, and a run writes only into its own folder: "
                    "replace the link by what it names"
                )

    def own_files(self) -> Iterator[Path]:
        """Yield what a run writes, and all in the folders it writes into; links are not followed."""
        yield from (self.path / name for name in FILES)
        for name in (*FOLDERS, *BY_LIBRARIES):
            yield self.path / name
            if (self.path / name).is_symlink():
                continue
            for folder, inner, names in os.walk(self.path / name):
                yield from (Path(folder, each) for each in [*inner, *names])

    def unfinished(self) -> Iterator[Path]:
        """Yield half-written files of ours in this folder and in those a run writes into, and no others."""
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            if folder.is_dir() and (folder == self.path or not folder.is_symlink()):
                yield from (path for path in folder.iterdir() if is_unfinished(path))

    def as_it_was(self) -> Callable[[], None]:
        """Return a function that restores what a resume changes before its first step."""
        paths = (self.config, self.status.path, self.split)
        kept = {path: path.read_bytes() for path in paths if path.is_file()}

        def put_back() -> None:
            for path, content in kept.items():
                write_atomically(path, methodcaller("write", content))

        return put_back


def is_unfinished(path: Path) -> bool:
    """Return whether this is a temporary file of ours, or one that an older version made of a run's file."""
    name = re.fullmatch(r"\.(?P<of>.+\.(ckpt|csv|json|yaml|png))\.\d+(-[0-9a-f]{8})?\.tmp", path.name)
    is_of_run = name is not None and name["of"] in (*FILES, *CHECKPOINTS)
    return (is_of_run or TEMPORARY.fullmatch(path.name) is not None) and not path.is_symlink()


def read_checkpoint(checkpoint: Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint as data: tensors, numbers, text and containers of them.

    Args:
        options: of torch.load.

    Raises:
        UserError: the file holds anything else, as a pickle that would run code does, or is damaged.
    """
    import torch  # takes seconds to import, and only a resume needs it

    try:
        require_stored(checkpoint)
        content = torch.load(checkpoint, weights_only=True, map_location="cpu", **options)
    except FileNotFoundError:
        raise UserError(f"{checkpoint} is missing") from None
    except (OSError, UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError,
            AttributeError, OverflowError) as error:  # fmt: skip
        raise UserError(f"{checkpoint} is not a checkpoint of this program: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{checkpoint} is not a checkpoint of this program")
    return content


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint; status.json is written just before it and may be ahead."""
    step = read_checkpoint(checkpoint, mmap=True).get("global_step")
    if not isinstance(step, int):
        raise UserError(f"{checkpoint} is not a checkpoint of this program: it has no step")
    return step


def check_unchanged(run: RunDir, key: str, value: str, what: str) -> None:
    """Store a hash in status.json, or compare it with the one stored when the run was started.

    Raises:
        UserError: `what` is not what the run was started with.
    """
    noted = run.status.read().get(key, value)
    if noted != value:
        raise UserError(
            f"resume={run.path}: {what} is not the same as when the run was started "
            f"({key} {value[:12]}, was {noted[:12]}); put it back, or start a new run"
        )
    run.status.update(**{key: value})
