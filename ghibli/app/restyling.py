"""The handlers that redraw a photo: with base and adapter, inside a mask, along a ControlNet's image."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ghibli.app.answers import errors_in_words, errors_on_page
from ghibli.app.commands import restyle_command
from ghibli.app.drawing import status_line
from ghibli.app.images import checked, read_small
from ghibli.app.session import PROGRESS, AppSession
from ghibli.app.settings import Settings, check_number, check_prompt, text_of_restyled
from ghibli.inference.control import ControlOf
from ghibli.inference.load import LoadedModel
from ghibli.inference.photos import SAME_SHAPE
from ghibli.inference.request import (
    CONTROLS,
    ControlOptions,
    RestyleOptions,
    control_options,
    unused_negative,
)
from ghibli.inference.restyle import restyle_photo
from ghibli.models.prompt_syntax import escaped
from ghibli.runtime.errors import UserError

CONTROLNETS = ("demo/control", "lllyasviel/control_v11p_sd15_canny", "lllyasviel/control_v11f1p_sd15_depth")
OWN_IMAGE = "image"  # the choice of a control image that the visitor gives


@dataclass(frozen=True)
class Structure:
    """What is kept of a photo: the values of the restyle tab's fields, in their order."""

    strength: float
    way: str
    mask: str | None  # file
    control: str  # empty, one of CONTROLS, or OWN_IMAGE
    control_model: str | None
    control_scale: float
    control_image: str | None  # file

    def __post_init__(self) -> None:
        """Check what the browser would not send but another program can.

        Raises:
            UserError: a number that is none, or a text that is none.
        """
        check_number("strength", self.strength)
        check_number("the ControlNet's scale", self.control_scale)
        for text in (self.way, self.control, self.control_model or ""):
            check_prompt(text)

    @property
    def controlled_by(self) -> Path | None:
        """The control image that the visitor gave, if it is to be used."""
        used = self.control == OWN_IMAGE and self.control_image is not None
        return Path(str(self.control_image)) if used else None

    def options(self) -> ControlOptions | None:
        """Return what steers; None without a ControlNet.

        Raises:
            UserError: its weights or its image are missing.
        """
        if not self.control:
            return None
        source = self.control
        if source not in (*CONTROLS, OWN_IMAGE):
            raise UserError(f"{source[:60]} is unknown: choose one of {', '.join(CONTROLS)}, or an image")
        if source == OWN_IMAGE:
            if self.control_image is None:
                raise UserError("give the image that the ControlNet is to see, or choose canny or depth")
            source = Path(self.control_image).name
        return control_options(source, (self.control_model or "").strip() or None, self.control_scale, None)


@dataclass(frozen=True)
class Restyling:
    """The handlers, which share a session."""

    session: AppSession

    @errors_on_page
    def preview(self, photo: str | None) -> Image.Image | None:
        """Return the uploaded photo, reduced."""
        return None if photo is None else read_small(Path(photo))

    @errors_in_words(frames=3, commands=2)
    def restyle(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """Redraw a photo with base and adapter; return photo, both images, a status line and both commands.

        Args:
            values: those of Settings with the photo's path after the runs, then those of Structure.
        """
        start = time.monotonic()
        runs, photo, *others = values
        settings, structure = Settings(runs, *others[:8]), Structure(*others[8:])
        if photo is None:
            raise UserError("choose a photo first")
        if not settings.prompt.strip():
            raise UserError("describe what is on the photo")
        control = self.allowed(structure.options())
        before = read_small(Path(photo))
        mask = belonging(structure.mask, before, "mask", exactly=True)
        steering = structure.control_image if structure.controlled_by else None
        given = belonging(steering, before, "control image")
        with self.session.turn(str(request.session_hash), progress) as count:
            model = self.session.model_of(runs)
            options = settings.restyle_options(
                structure.strength, model.config.model.resolution, structure.way, control
            )
            steers = None
            if control is not None:
                steers = self.session.control_of(control, given, model)
            asked = Asked(before, settings.prompt + escaped(model.config.data.style), mask, steers)
            afters = [restyle_counted(model, asked, replace(options, scale=0.0), count("base"))]
            afters.append(
                restyle_counted(model, asked, options, count("trained")) if runs else afters[0].copy()
            )
            afters, notes = checked(afters, model, settings.safe)
            notes += unused_negative(options.negative, options.guidance)
        name, sources = Path(Path(photo).name), self.session.sources(settings, model)
        files = {
            "mask": None if structure.mask is None else Path(Path(structure.mask).name),
            "control_image": None if structure.controlled_by is None else Path(structure.controlled_by.name),
        }
        drawn = []
        for label, image, scale in zip(("base", "trained"), afters, (0.0, settings.scale), strict=True):
            own = replace(options, scale=scale)
            command = restyle_command(replace(settings, scale=scale), name, own, sources, **files)
            image.info.update(text_of_restyled(asked.prompt, name, own, model))
            drawn.append((image, f"{label}: {name}", command))
        self.session.history.add(str(request.session_hash), drawn if runs else drawn[:1])
        return [before, *afters, status_line(notes, start), *(command for *_, command in drawn)]

    def allowed(self, control: ControlOptions | None) -> ControlOptions | None:
        """Return what steers, unless a visitor from elsewhere names weights that the page does not offer.

        Raises:
            UserError: such a visitor does.
        """
        if control is not None and not self.session.is_private and control.model not in CONTROLNETS:
            raise UserError(
                f"on a page that others can reach, the ControlNet is one of {', '.join(CONTROLNETS)}"
            )
        return control


@dataclass(frozen=True)
class Asked:
    """A photo and what is to become of it."""

    photo: Image.Image
    prompt: str
    mask: Image.Image | None
    control: ControlOf | None


def belonging(file: str | None, photo: Image.Image, what: str, exactly: bool = False) -> Image.Image | None:
    """Read an image that belongs to a photo, both reduced; None without one.

    Args:
        exactly: it has the photo's size; else only its shape.

    Raises:
        UserError: it has not.
    """
    if file is None:
        return None
    image = read_small(Path(file), what)
    ratio = image.width * photo.height / (image.height * photo.width)
    if image.size != photo.size if exactly else abs(ratio - 1) > SAME_SHAPE:
        raise UserError(
            f"the {what} has {image.width}x{image.height} px and the photo {photo.width}x{photo.height}: a "
            f"{what} has its photo's {'size' if exactly else 'shape'}"
        )
    return image


def restyle_counted(model: LoadedModel, asked: Asked, options: RestyleOptions, counting: Any) -> Image.Image:
    """Redraw a photo and count the steps.

    Args:
        counting: context manager of a progress bar.
    """
    there_and_back = 2 if options.way == "inversion" else 1
    total, steps = int(options.steps * options.strength) * there_and_back, 0
    with counting as on_progress:

        def on_step() -> None:
            nonlocal steps
            steps += 1
            on_progress(steps, total)

        return restyle_photo(model, asked.photo, asked.prompt, options, on_step, asked.mask, asked.control)
