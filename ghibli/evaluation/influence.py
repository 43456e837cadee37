"""What each training image did to a run's gain: the formula, and the content of influence.json and .csv."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ghibli.evaluation.statistics import Estimate, jackknife
from ghibli.runs.folder import RunDir
from ghibli.runs.status import LARGEST
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_plain, write_json, write_rows

MADE_BY = "ghibli influence"
VERSION = 1  # to be raised when the items or the formula change: what was kept is then measured again
COLUMNS = (
    "place", "name", "influence", "influence_se", "low95", "high95", "agreement", "timesteps", "caption",
)  # fmt: skip
ODD = -3.5  # of a modified z-score, below which a value is an outlier (Iglewicz and Hoaglin 1993)
OUTPUTS = ("influence.csv", "influence.png", "influence_exclude.txt")  # beside influence.json


@dataclass(frozen=True)
class RankedImage:
    """A training image: what it did to the gain, and how well it agrees with held-out images."""

    name: str
    caption: str
    influence: Estimate  # 1 is the mean size; below 0 it lowers the gain
    agreement: float  # lowest modified z-score over the noise levels; far below 0: unlike the others
    level: int  # where that is, 0 = least noise
    copies: list[str] = field(default_factory=list)  # names of other training files with the same bytes

    @property
    def is_harmful(self) -> bool:
        """Whether its 95 % interval is below 0."""
        return self.influence.high < 0

    @property
    def is_odd(self) -> bool:
        """Whether it agrees with held-out images less than nearly all others do, at some noise level."""
        return self.agreement < ODD

    @property
    def text(self) -> str:
        """Format the influence: `+1.31 +- 0.20`."""
        error = self.influence.standard_error
        return f"{self.influence.value:+.2f}" + (f" +- {error:.2f}" if math.isfinite(error) else "")


@dataclass(frozen=True)
class Influences:
    """What was measured of a run so far: the content of influence.json."""

    of: dict[str, Any]  # what the parts depend on
    checkpoints: list[str]  # `best.ckpt (step 80)`
    preconditioned: bool  # by the optimiser's second moments
    held_out: int  # images
    images: int  # training images, of which `ranked` may hold some only
    base: list[float] = field(default_factory=list)  # (B,) loss of the base on each block of held-out images
    blocks: dict[str, list[float]] = field(default_factory=dict)  # key of a training image -> (B,)
    levels: dict[str, list[float]] = field(default_factory=dict)  # the same -> (K,) cosines
    ranked: list[RankedImage] = field(default_factory=list)  # the most helpful first
    left_out: list[str] = field(default_factory=list)  # names that the run was trained without
    listed: str = ""  # sha256 of influence_exclude.txt as it was written; empty where the user's stays
    # while that file is replaced: the old and the new, with a space between

    @property
    def is_whole(self) -> bool:
        return len(self.ranked) == self.images

    @property
    def by_agreement(self) -> list[RankedImage]:
        """The ranked images, those that agree least with held-out images first."""
        return sorted(self.ranked, key=lambda one: one.agreement)

    def worst(self, share: float) -> list[RankedImage]:
        """Return the share of the images that agree least, at least one, the least first."""
        return self.by_agreement[: max(1, round(share * len(self.ranked)))]

    def to_exclude(self, share: float) -> list[str]:
        """Return the names for data.exclude: what the run left out, then the worst with their copies."""
        worst = [name for one in self.worst(share) for name in (one.name, *one.copies)]
        return [*self.left_out, *worst]

    def timesteps(self, level: int) -> str:
        """Format the timesteps of a noise level: `500-749`."""
        items, count = int(self.of["items"]), int(self.of["timesteps"])
        return f"{level * count // items}-{(level + 1) * count // items - 1}"

    def ends(self, count: int) -> dict[str, list[RankedImage]]:
        """Return the most helpful and the most harmful images, and those that agree least, by a title."""
        count = min(count, (len(self.ranked) + 1) // 2)
        return {
            "Most helpful: they raise the gain on held-out images": self.ranked[:count],
            "Most harmful, or least helpful": self.ranked[: -count - 1 : -1],
            "Least in agreement with held-out images at some noise": self.by_agreement[:count],
        }


def influence_of(parts: torch.Tensor, base: torch.Tensor) -> Estimate:
    """Compute sum(parts) / sum(base): the change of the gain, to first order, that one image's steps made.

    TracIn at checkpoints (Pruthi et al. 2020, section 3.3): the loss on held-out images falls by the sum
    over checkpoints of rate x <gradient of the image's training loss, gradient of the held-out loss>. The
    gain is 1 - sum(losses) / sum(base), so it rises by the same over sum(base). The error leaves out a block
    of held-out images at a time (the delete-a-group jackknife, Kott 2001); it is NaN for one block.

    Args:
        parts: (B,) by how much the image lowers the loss on each block of held-out images.
        base: (B,) the base's loss on each block.
    """
    parts, base = parts.double(), base.double()
    value = (parts.sum() / base.sum()).item()
    if len(parts) < 2:
        return Estimate(value, math.nan, freedom=0)
    return jackknife(value, [(parts.sum() - parts) / (base.sum() - base)])


def agreements(cosines: torch.Tensor) -> torch.Tensor:
    """Return the modified z-score of each cosine among all images at its noise level, (N, K).

    0.6745 (c - median) / MAD (Iglewicz and Hoaglin 1993). The gain is mostly made at little noise, so an
    image that teaches the wrong thing elsewhere, such as a layout that its caption does not name, hardly
    shows in its influence; here every level counts alike.

    Args:
        cosines: (N, K) of the image's gradient with the held-out one, at each of K noise levels.
    """
    middle = cosines.median(0).values
    spread = (cosines - middle).abs().median(0).values
    return torch.where(spread > 0, 0.6745 * (cosines - middle) / spread, 0.0)


def in_mean_sizes(found: list[Estimate]) -> list[Estimate]:
    """Divide influences by the mean of their sizes, so that numbers of different runs can be read alike."""
    size = sum(abs(one.value) for one in found) / len(found) if found else 0.0
    size = size or 1.0
    return [Estimate(one.value / size, one.standard_error / size, freedom=one.freedom) for one in found]


def write_influences(run: RunDir, found: Influences) -> None:
    """Write influence.json, and influence.csv with a row for each image that is ranked."""
    ranked = [vars(one) | {"influence": asdict(one.influence)} for one in found.ranked]
    write_json(run.influence, {"made_by": MADE_BY} | asdict(found) | {"ranked": ranked})
    rows = [
        {
            "place": place, "name": one.name, "influence": one.influence.value,
            "influence_se": one.influence.standard_error, "low95": one.influence.low,
            "high95": one.influence.high, "agreement": one.agreement,
            "timesteps": found.timesteps(one.level), "caption": one.caption,
        }
        for place, one in enumerate(found.ranked, start=1)
    ]  # fmt: skip
    if rows:
        write_rows(run.path / "influence.csv", COLUMNS, rows)


def read_influences(file: Path) -> Influences:
    """Read influence.json.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, damaged, or of something else.
    """
    content = json.loads(read_plain(file, LARGEST).decode())
    if content["made_by"] != MADE_BY:
        raise ValueError("not written by ghibli influence")
    return Influences(
        of=dict(content["of"]), checkpoints=names(content["checkpoints"]),
        preconditioned=bool(content["preconditioned"]), held_out=int(content["held_out"]),
        images=int(content["images"]), base=numbers(content["base"]),
        blocks={str(key): numbers(values) for key, values in content["blocks"].items()},
        levels={str(key): numbers(values) for key, values in content["levels"].items()},
        ranked=[image_of(one) for one in content["ranked"]], listed=str(content.get("listed", "")),
        left_out=names(content.get("left_out", [])),
    )  # fmt: skip


def names(values: list[Any]) -> list[str]:
    """Return a list of names of influence.json."""
    return [str(value) for value in values]


def numbers(values: list[Any]) -> list[float]:
    """Return a list of numbers of influence.json."""
    return [float(value) for value in values]


def image_of(content: dict[str, Any]) -> RankedImage:
    """Return a ranked image of influence.json."""
    value, error, freedom = (
        float(content["influence"][key]) for key in ("value", "standard_error", "freedom")
    )
    return RankedImage(
        str(content["name"]), str(content["caption"]), Estimate(value, error, freedom=freedom),
        float(content["agreement"]), int(content["level"]), names(content.get("copies", [])),
    )  # fmt: skip


def kept_influences(run: RunDir) -> Influences | None:
    """Read what an earlier command kept; None without it.

    Raises:
        UserError: a file that would be replaced was made by something else.
    """
    try:
        return read_influences(run.influence)
    except FileNotFoundError:
        outputs: tuple[str, ...] = OUTPUTS
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        outputs = (run.influence.name, *OUTPUTS)
    foreign = next((run.path / name for name in outputs if (run.path / name).exists()), None)
    if foreign is not None:
        raise UserError(f"{foreign} was not written by ghibli influence and would be replaced: move it away")
    return None
