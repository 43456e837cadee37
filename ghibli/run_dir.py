"""The files of a run folder: their names, their states, and writing them whole or not at all."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from ghibli.mistakes import UserMistake

OUTPUTS = Path("outputs")
RANKS = ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")  # what launchers set
SEAL = b"sha256:"  # the digest follows
LIBRARIES = (
    "torch", "torchvision", "lightning", "diffusers", "transformers", "peft", "accelerate", "safetensors",
    "numpy", "pillow", "hydra-core", "wandb",
)  # fmt: skip

PLACE = (  # the entries of status.json that name code and machine; each start of a run notes them
    "code", "git_commit", "git_dirty", "versions",
    "machine", "processor", "threads", "device", "devices", "precision",
)  # fmt: skip


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a temporary file, flushes it to disk and renames it to `path`.

    A reader sees the old file or the new one, never a part. Nothing is left on failure.

    Raises:
        OSError: the disk is full, read-only and so on; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"  # a cache may be shared by machines with equal numbers
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk says so even where there is no such file
            temporary.unlink()
        trouble = error if isinstance(error, OSError) else error.__context__
        if isinstance(trouble, OSError):  # torch.save hides it behind an error of its own
            trouble.filename = str(path)
            raise trouble from None
        raise


class _Hashing:
    """A file that keeps the sha256 of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def write_sealed(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Like write_atomically, with the sha256 of all that `write` wrote in the last bytes of the file."""

    def sealed(file: BinaryIO) -> None:
        hashing = _Hashing(file)
        write(hashing)
        file.write(SEAL + hashing.sha256.digest())

    write_atomically(path, sealed)


def is_whole(path: Path) -> bool:
    """True for a file of write_sealed in which no byte has changed since."""
    length = len(SEAL) + 32
    try:
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - length
            file.seek(0)
            found = hashlib.sha256()
            while left > 0:
                part = file.read(min(left, 2**20))
                found.update(part)
                left -= len(part) or left
            return file.read() == SEAL + found.digest()
    except OSError:
        return False


def checksum_of(path: Path) -> str | None:
    """The sha256 with which a file of write_sealed ends, hex; None for any other. The rest is not read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - len(SEAL) - 32, 0))
            end = file.read()
    except OSError:
        return None
    return end.removeprefix(SEAL).hex() if end.startswith(SEAL) else None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class RunDir:
    """One run's folder, `outputs/train/DATE_TIME` or a trial of a sweep."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def no_result(self) -> Path:
        """Why the last `python sweep.py` that asked for this trial got no result; else not there."""
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
        """The last.ckpt before the present one, for when that is damaged."""
        return self.checkpoints / "previous.ckpt"

    def usable_checkpoint(self) -> Path | None:
        """Where to go on from: last.ckpt, else previous.ckpt; None when neither is whole."""
        both = (self.last_checkpoint, self.previous_checkpoint)
        return next((checkpoint for checkpoint in both if is_whole(checkpoint)), None)

    def checkpoint_to_resume(self) -> Path:
        """usable_checkpoint, without which going on would silently be a start from untrained weights.

        Raises:
            UserMistake: there is none.
        """
        found = self.usable_checkpoint()
        if found is None:
            raise UserMistake(
                f"resume={self.path}: {self.last_checkpoint} is damaged or cut off; start the run anew"
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
        """The adapter as training left it."""
        return self.path / "adapter_last"

    @property
    def unet(self) -> Path:
        """The whole UNet of a run with finetune=full, as a diffusers folder."""
        return self.path / "unet"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_pictures(self) -> Path:
        return self.path / "evaluation.png"

    @property
    def evaluation_nearest(self) -> Path:
        return self.path / "evaluation_nearest.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def read_status(self) -> dict[str, Any]:
        """The content of status.json; empty when there is none or it was damaged."""
        try:
            content = json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        checksum = content.pop("sha256", None)
        return content if checksum in (None, _checksum(content)) else {}

    @property
    def weights(self) -> str | None:
        """What tells the best epoch's weights from any others: the checksum of best.ckpt."""
        return checksum_of(self.best_checkpoint)

    def is_older(self, evaluation: dict[str, Any]) -> bool:
        """True for the content of an evaluation.json that measured weights which training has replaced."""
        measured, now = evaluation.get("weights"), self.weights
        return None not in (measured, now) and measured != now

    def read_evaluation(self) -> dict[str, Any]:
        """The content of evaluation.json; empty without one, or where it is damaged or older than the run."""
        try:
            content = json.loads(self.evaluation.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and not self.is_older(content) else {}

    @property
    def state(self) -> str:
        """running, finished, interrupted, failed; killed if it says running and no longer runs."""
        status = self.read_status()
        state = status.get("state", "unknown")
        return "killed" if state == "running" and not _is_alive(status.get("process")) else state

    def lock(self, key: str = "hydra.run.dir") -> BinaryIO:
        """Makes this run the only one that writes the folder, until the process ends or closes the result.

        Removes what a process that was killed left half written.

        Args:
            key: the setting that chooses another folder.

        Raises:
            UserMistake: another process is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / ".lock", "ab")  # noqa: SIM115
        if not is_first():
            return file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with us; loader processes have none
        except (BlockingIOError, PermissionError):
            file.close()
            raise UserMistake(
                f"another process is at work in {self.path}: wait for its end, or choose another folder "
                f"with {key}=DIR"
            ) from None
        for unfinished in self.unfinished():
            unfinished.unlink(missing_ok=True)
        return file

    def unfinished(self) -> Iterator[Path]:
        """What was left half written here; not below, where a folder with a lock of its own begins."""
        for folder, inner, names in os.walk(self.path):
            inner[:] = [name for name in inner if not Path(folder, name, ".lock").exists()]
            yield from (Path(folder, n) for n in names if n.startswith(".") and n.endswith(".tmp"))

    def as_it_was(self) -> Callable[[], None]:
        """A function that puts what a resume changes before its first step back to what it is now."""
        paths = (self.config, self.status, self.split)
        kept = {path: path.read_bytes() for path in paths if path.is_file()}

        def put_back() -> None:
            for path, content in kept.items():
                write_atomically(path, lambda file, content=content: file.write(content))

        return put_back

    def update_status(self, **changes: Any) -> None:
        """Writes status.json with these entries added or replaced, and a checksum."""
        content = self.read_status() | changes
        write_json(self.status, content | {"sha256": _checksum(content)})

    def note_start(self, **where: Any) -> None:
        """Adds to status.json where this process trains, and to `starts` from which step and by which code.

        A run that was resumed has several, which tells whether it moved on the way.
        """
        status = self.read_status() | where
        start = {key: status.get(key) for key in ("command", "step", *PLACE)}
        self.update_status(**where, starts=[*status.get("starts", []), {"at": now()} | start])


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a run goes on from with this checkpoint.

    status.json is written a moment before the checkpoint is, and may be ahead of it.
    """
    import torch  # takes seconds, and only who goes on needs it

    return torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["global_step"]


def is_first() -> bool:
    """True for the only process of a run, or the first of several: the one that writes and speaks."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANKS)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """The time as an ISO 8601 string in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def all_runs(root: Path = OUTPUTS) -> list[RunDir]:
    """Every run folder below `root`, oldest first by the time its status says it started."""
    runs = [RunDir(path.parent) for path in root.glob("**/status.json")]
    return sorted(runs, key=lambda run: (str(run.read_status().get("started", "")), str(run.path)))


def find_run(name: str, root: Path = OUTPUTS) -> RunDir:
    """The run folder called `name`, or the newest run with a checkpoint for `latest`.

    Raises:
        UserMistake: no such folder, or nothing in it to go on from.
    """
    if name == "latest":
        runs = [run for run in all_runs(root) if has_checkpoint(run)]
        if not runs:
            raise UserMistake(f"resume=latest: no run with a checkpoint below {root}/")
        run = runs[-1]
    else:
        run = RunDir(Path(name))
    if not run.path.is_dir():
        raise UserMistake(f"resume={name}: no such folder (`ghibli list` shows the runs)")
    if not has_checkpoint(run):
        raise UserMistake(
            f"resume={name}: this folder holds no checkpoints/last.ckpt to go on from; "
            "start the run anew (`ghibli list` shows the runs)"
        )
    if not run.config.exists():
        raise UserMistake(f"resume={run.path}: its config.yaml is gone: put it back, or start a new run")
    run.checkpoint_to_resume()
    return run


def has_checkpoint(run: RunDir) -> bool:
    """True where there is a checkpoint to go on from, whole or not."""
    return run.last_checkpoint.exists() or run.previous_checkpoint.exists()


def provenance() -> dict[str, Any]:
    """Git commit and whether the tree was changed, library versions, machine."""
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "processor": processor_name(),
    }


def processor_name() -> str:
    """The processor's model; rounding may depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _is_alive(process: int | None) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, TypeError, OverflowError):  # the last two: status.json is damaged
        return False
    except PermissionError:
        return True
    return True


def _git(*words: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_unchanged(run: RunDir, key: str, value: str, what: str) -> None:
    """Notes a hash in status.json, or refuses when a resumed run finds another one than it noted.

    Raises:
        UserMistake: `what` is not what the run was started with.
    """
    noted = run.read_status().get(key, value)
    if noted != value:
        raise UserMistake(
            f"resume={run.path}: {what} is not the same as when the run was started "
            f"({key} {value[:12]}, was {noted[:12]}); put it back, or start a new run"
        )
    run.update_status(**{key: value})
