"""What a command names: adapter files to read and to write, and how much to keep; without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghibli.config.paths import check_base_path
from ghibli.models.safetensors import check_whole
from ghibli.runs.find import adapter_named
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.home import expanded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Size:
    """How much of an update to keep: a rank, or the smallest rank with a share of its squared norm."""

    rank: int | None = None
    keep: float | None = None  # 0 .. 1

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.keep is None):
            raise UserError("give one of --rank N and --keep SHARE, such as --keep 0.95")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank} must be at least 1")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"--keep {self.keep} must be above 0 and at most 1")

    def rank_of(self, values: "torch.Tensor") -> int:
        """Return how many of the singular values, largest first, are kept; at least 1."""
        if self.rank is not None:
            return min(self.rank, len(values))
        energy, keep = values.square().cumsum(0), self.keep or 1.0
        return min(int((energy < keep * energy[-1] * (1 - 1e-12)).sum()) + 1, len(values))


def find_file(path: str | Path, what: str) -> Path:
    """Find an adapter file: the path itself, the only one in a folder, or the one of a run.

    Args:
        what: the key or flag that named it, for messages.

    Raises:
        UserError: as adapter_named, or a file that is cut off.
    """
    file = adapter_named(path, what)
    check_whole(file, what)
    return file


def check_tuned(path: str) -> None:
    """Check that a path can be a fine-tuned model: a run, a complete model, or the folder of a UNet.

    Raises:
        UserError: nothing of the kind there.
    """
    place = expanded(path)
    if not RunDir(place).config.is_file() and not (place / "config.json").is_file():
        check_base_path(path)


def new_file(to: Path | None, default: Path) -> Path:
    """Return where to write; a file that is there is never replaced.

    Raises:
        UserError: it exists, or does not end in .safetensors.
    """
    target = default if to is None else expanded(to)
    if target.suffix != ".safetensors":
        raise UserError(f"--to {target}: the name must end in .safetensors")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already: move it away, or choose another name with --to FILE")
    return target
