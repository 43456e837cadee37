"""What `generate` and `restyle` are asked for, checked; imports no torch, so that a typo is told at once."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ghibli.config.checks import require, require_finite
from ghibli.config.registry import check_steps, sampler_name
from ghibli.models.prompt_syntax import parse_prompt
from ghibli.runtime.errors import UserError

LARGEST = 2048  # px, either side
CONTROLS = ("canny", "depth")  # what is computed of a photo for a ControlNet
WAYS = ("img2img", "inversion")  # of restyle: from random noise, or from the photo's own
KNEES = {"img2img": 0.5, "inversion": 0.65}  # strength of each: docs/restyle.md
LARGEST_FINAL = 4096  # px, either side after the second pass


@dataclass(frozen=True)
class ImageRequest:
    """What to generate and how; image i starts from the noise of seed + i, independent of the others."""

    prompts: list[str]
    sampler: str  # as sampler_name takes it; afterwards a name in SAMPLERS
    guidance: float  # 1 = off
    steps: int
    seed: int
    size: tuple[int, int]  # width and height in px
    negative: str = ""
    batch: int = 4  # images generated together
    scale: float = 1.0  # factor on the weights of all adapters
    hires: float = 1.0  # factor on both sides, for a second pass by image-to-image; 1 = none
    hires_strength: float = 0.5  # share of the denoising steps that the second pass runs

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the files in px, multiples of 8."""
        return round(self.size[0] * self.hires / 8) * 8, round(self.size[1] * self.hires / 8) * 8

    @property
    def hires_options(self) -> "RestyleOptions":
        """How the second pass redraws an image of the first one."""
        return RestyleOptions(
            self.hires_strength, self.sampler, self.guidance, self.steps, self.seed, self.negative,
            self.scale, min(self.final_size),
        )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", sampler_name(self.sampler, "--sampler"))
        for text in (*self.prompts, self.negative):
            check_text(text)
        if not self.prompts or not all(has_words(prompt) for prompt in self.prompts):
            raise UserError("an empty prompt: give --prompt TEXT")
        check_steps(self.sampler, self.steps, "--steps")
        check_seed(self.seed, len(self.prompts))
        check_guidance(self.guidance)
        require_finite("--scale", float(self.scale))
        require(self.batch >= 1, "--batch", self.batch, "at least 1")
        require(1 <= self.hires <= 4, "--hires", float(self.hires), "from 1 (off) to 4")
        for side in self.size:
            if side % 8 or not 64 <= side <= LARGEST:
                near = min(max(64, round(side / 8) * 8), LARGEST)
                raise UserError(
                    f"--size {side}: must be a multiple of 8 from 64 to {LARGEST}, such as {near}"
                )
        if max(self.final_size) > LARGEST_FINAL:
            raise UserError(
                f"--hires {self.hires:g} of {self.size[0]}x{self.size[1]} px: a side of more than "
                f"{LARGEST_FINAL} px; use a smaller --size or --hires"
            )
        if self.hires > 1:
            check_share("--hires-strength", self.hires_strength, self.steps)


AXES: dict[str, Callable[[str], Any]] = {  # settings that a grid can vary -> how a value is read
    "sampler": str, "guidance": float, "steps": int, "seed": int, "scale": float, "hires_strength": float,
}  # fmt: skip
MOST_IN_GRID = 100  # images of one prompt


@dataclass(frozen=True)
class Axis:
    """A setting that a grid varies, and its values in their order."""

    name: str  # of AXES
    values: list[Any]


def parse_axis(text: str, option: str = "--grid") -> Axis:
    """Read `guidance=3,5,7.5`.

    Raises:
        UserError: an unknown setting, or values that are none.
    """
    name, _, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in AXES:
        raise UserError(f"{option} {text[:60]}: choose one of {', '.join(AXES)}, as in guidance=3,5,7.5")
    words = [word.strip() for word in listed.split(",") if word.strip()]
    try:
        values = [AXES[name](word) for word in words]
    except ValueError:
        values = []
    if not values:
        raise UserError(f"{option} {text[:60]}: give values of {name}, separated by commas")
    return Axis(name, list(dict.fromkeys(values)))


def grid_requests(request: ImageRequest, axes: list[Axis]) -> list[list[ImageRequest]]:
    """Return the request of every cell, [row][column]; the first axis goes to the right, the second down.

    Raises:
        UserError: more than two axes or one twice, too many images, or a value that no request may have.
    """
    if not 1 <= len(axes) <= 2 or len({axis.name for axis in axes}) < len(axes):
        raise UserError(
            "--grid: give one setting or two different ones, such as guidance=3,7 and steps=10,20"
        )
    if request.hires == 1 and "hires_strength" in [axis.name for axis in axes]:
        raise UserError("--grid hires_strength is that of a second pass: give --hires FACTOR too")
    right, down = axes[0], (axes[1] if len(axes) > 1 else None)
    if len(right.values) * (len(down.values) if down else 1) > MOST_IN_GRID:
        raise UserError(f"--grid: at most {MOST_IN_GRID} images of a prompt")
    rows = [request] if down is None else [replace(request, **{down.name: value}) for value in down.values]
    return [[replace(row, **{right.name: value}) for value in right.values] for row in rows]


@dataclass(frozen=True)
class ControlOptions:
    """Which ControlNet steers, and what it sees."""

    source: str  # one of CONTROLS, or an image, or a folder of images named as the photos
    model: str  # hub id or folder of a ControlNet
    scale: float = 1.0  # factor on what it adds
    depth_model: str = "depth-anything/Depth-Anything-V2-Small-hf"  # hub id or folder, for depth

    def __post_init__(self) -> None:
        require_finite("--control-scale", float(self.scale))


def control_options(
    source: str | None, model: str | None, scale: float | None, depth_model: str | None
) -> ControlOptions | None:
    """Read the options of restyle that choose a ControlNet; None without any.

    Raises:
        UserError: one of them is missing, or is not used.
    """
    more = {"--control-model": model, "--control-scale": scale, "--depth-model": depth_model}
    unused = [name for name, value in more.items() if value is not None]
    if source is None:
        if unused:
            raise UserError(f"{unused[0]} is used with --control only: give --control canny, depth or FOLDER")
        return None
    if model is None:
        raise UserError(
            f"--control {source} needs --control-model: a ControlNet's folder or hub id, such as "
            "lllyasviel/control_v11p_sd15_canny for SD 1.5, or demo/control for the demo"
        )
    if depth_model is not None and source != "depth":
        raise UserError(f"--depth-model is used with --control depth only, not with {source}")
    given: dict[str, Any] = {"scale": scale, "depth_model": depth_model}
    return ControlOptions(source, model, **{name: v for name, v in given.items() if v is not None})


@dataclass(frozen=True)
class RestyleOptions:
    """How photos are redrawn."""

    strength: float  # share of the denoising steps that are run: 0 = the photo, 1 = all new
    sampler: str  # as sampler_name takes it; afterwards a name in SAMPLERS
    guidance: float  # 1 = off
    steps: int  # of a complete denoising, of which `strength` is the share that is run
    seed: int
    negative: str
    scale: float  # factor on the weights of all adapters
    resolution: int  # px; the result has about the area of a square of this side
    way: str = "img2img"  # one of WAYS
    control: ControlOptions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", sampler_name(self.sampler, "--sampler"))
        check_steps(self.sampler, self.steps, "--steps")
        check_seed(self.seed)
        check_guidance(self.guidance)
        check_text(self.negative)
        require_finite("--scale", float(self.scale))
        check_share("--strength", self.strength, self.steps)
        if self.way not in WAYS:
            raise UserError(f"--way {self.way} is unknown: choose one of {', '.join(WAYS)}")
        if self.way == "inversion" and self.sampler != "ddim":
            raise UserError(f"--way inversion walks DDIM backwards: use --sampler ddim, not {self.sampler}")


def default_way(sampler: str) -> str:
    """Return the way nearest to the photo (docs/restyle.md): inversion, which DDIM alone can walk."""
    return "inversion" if sampler_name(sampler, "--sampler") == "ddim" else "img2img"


def check_share(option: str, strength: float, steps: int) -> None:
    """Raise a UserError unless a strength is a share of the steps that is at least one."""
    require(0 < strength <= 1, option, float(strength), "more than 0 and at most 1")
    if int(steps * strength) < 1:
        raise UserError(f"{option} {strength:g} of {steps} steps is less than one: raise either")


def check_seed(seed: int, images: int = 1) -> None:
    """Raise a UserError unless torch accepts the seeds of all images: seed, seed + 1, ..."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    if seed + images > 2**32:
        raise UserError(f"--seed {seed}: with {images} images, must be from 0 to {2**32 - images}")


def check_guidance(guidance: float) -> None:
    """Raise a UserError for a guidance scale that is negative or not finite."""
    require(guidance >= 0, "--guidance", float(guidance), "0 (no prompt), 1 (off) or more")


def check_text(text: str) -> None:
    """Raise a UserError for a prompt with brackets that do not fit together, or that is not UTF-8.

    Python reads bytes that are not UTF-8 as lone surrogates.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        shown = text.encode("utf-8", "replace").decode()
        raise UserError(f"the prompt `{shown[:60]}` is not UTF-8: type it in a UTF-8 terminal or file")
    parse_prompt(text)


def has_words(prompt: str) -> bool:
    """Tell whether a prompt says anything, which `(:1.3)` and `[ ]` do not."""
    return any(text.strip() for text, _ in parse_prompt(prompt))


def unused_negative(negative: str, guidance: float) -> list[str]:
    """Say that a negative prompt is not used where guidance is off; empty where it is."""
    if guidance != 1 or not negative.strip():
        return []
    return ["the negative prompt is not used: at guidance 1 there is nothing to steer away from"]


def parse_size(text: str) -> tuple[int, int]:
    """Parse `512` or `640x384` to (width, height) in px.

    Raises:
        UserError: neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch(r"[0-9]{1,9}", side) for side in sides):
        raise UserError(f"--size {text[:40]}: must be a number of px, or WIDTHxHEIGHT")
    return int(sides[0]), int(sides[-1])


def read_prompts(file: Path) -> list[str]:
    """Read the prompts of a text file, one per line; empty lines are skipped.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # which makes every end of a line a newline
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file} cannot be read as UTF-8 text: {error}") from error
    return [line.strip() for line in text.split("\n") if line.strip()]
