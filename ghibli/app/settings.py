"""The values of the page's settings: checked, turned into requests, and read back from a PNG file."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from ghibli.images.read import open_file
from ghibli.inference.generate import a1111_parameters, model_metadata
from ghibli.inference.load import LoadedModel
from ghibli.inference.request import ControlOptions, ImageRequest, RestyleOptions
from ghibli.runtime.errors import UserError

PROMPT_LIMIT = 4000  # characters
RANGES = {"guidance": (1, 30), "steps": (1, 100), "scale": (0, 1.5), "hires": (1, 2)}  # of the sliders


@dataclass(frozen=True)
class Settings:
    """The values of the page's settings, in the order in which it lists their components."""

    runs: list[str]
    prompt: str
    negative: str
    sampler: str
    guidance: float
    steps: float
    seed: float | None  # None = the field is empty
    scale: float
    safe: bool  # apply the safety checker
    hires: float = 1.0  # factor of a second pass; 1 = none. Restyling has none

    def __post_init__(self) -> None:
        """Check what the browser would not send but another program can.

        Raises:
            UserError: a prompt that is too long, or a number that is none.
        """
        for text in (self.prompt, self.negative, self.sampler):
            check_prompt(text)
        numbers = {
            "guidance": self.guidance,
            "steps": self.steps,
            "seed": self.seed or 0,
            "scale": self.scale,
            "hires": self.hires,
        }
        for name, value in numbers.items():
            check_number(name, value)

    def request(self, side: int) -> ImageRequest:
        """Ask for one image of side x side px."""
        return ImageRequest(
            [self.prompt], self.sampler, self.guidance, int(self.steps), int(self.seed or 0),
            (side, side), self.negative, scale=self.scale, hires=self.hires,
        )  # fmt: skip

    def restyle_options(
        self, strength: float, resolution: int, way: str, control: ControlOptions | None = None
    ) -> RestyleOptions:
        """Ask for a photo to be redrawn at about resolution squared px."""
        return RestyleOptions(
            strength, self.sampler, self.guidance, int(self.steps), int(self.seed or 0), self.negative,
            self.scale, resolution, way, control,
        )  # fmt: skip


SETTINGS = tuple(field.name for field in fields(Settings))  # in their order on the page


def check_prompt(text: Any) -> None:
    """Raise a UserError for what is no text, or longer than the page's fields allow."""
    if not isinstance(text, str):
        raise UserError("a prompt must be text")
    if len(text) > PROMPT_LIMIT:
        raise UserError(f"a prompt of {len(text)} characters: at most {PROMPT_LIMIT}")


def check_number(name: str, value: Any) -> None:
    """Raise a UserError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a number")


def text_of(request: ImageRequest, model: LoadedModel) -> dict[str, str]:
    """Return what a PNG file of `ghibli generate` says about an image, for the browser's copy of it."""
    return {
        "ghibli": json.dumps(asdict(request) | model_metadata(model), ensure_ascii=False),
        "parameters": a1111_parameters(request, model),
    }


def text_of_restyled(prompt: str, photo: Path, options: RestyleOptions, model: LoadedModel) -> dict[str, str]:
    """Return what a PNG file of `ghibli restyle` says about an image."""
    settings = asdict(options) | {"prompt": prompt, "photo": photo.name} | model_metadata(model)
    return {"ghibli": json.dumps(settings, ensure_ascii=False)}


def stored_settings(file: Path) -> dict[str, Any]:
    """Read what generate, restyle or this page stored in a PNG file, by the names of Settings.

    Raises:
        UserError: nothing is stored there.
    """
    try:
        with open_file(file) as opened:
            text = opened.info.get("ghibli")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        text = None
    return parsed_settings(text)


def parsed_settings(text: Any) -> dict[str, Any]:
    """Read the text that an image carries under `ghibli`, as stored_settings does.

    Raises:
        UserError: it is none of ours.
    """
    try:
        stored = json.loads(text) if isinstance(text, str) and len(text) < 2**16 else None
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError("that file holds no settings: it takes PNG files of `ghibli generate` or this page")
    if isinstance(stored.get("prompts"), list) and stored["prompts"]:
        stored["prompt"] = stored["prompts"][0]
    adapters = stored.get("adapters", [])
    if not (isinstance(adapters, list) and all(isinstance(name, str) for name in adapters)):
        del stored["adapters"]
    return stored
