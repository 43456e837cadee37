"""`ghibli restyle`: photos -> the same scenes in the trained look, by diffusers' img2img pipeline.

Meng et al. 2022, "SDEdit": the photo's latents get the noise of a middle timestep and are denoised.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ghibli.config.registry import SAMPLERS
from ghibli.data.folder import list_images, read_beside
from ghibli.data.layouts import SUBFOLDERS
from ghibli.diffusion.samplers import make_scheduler
from ghibli.images.read import IMAGE_ENDINGS, Unusable, read_image
from ghibli.inference.generate import check_seed, enough_memory, write_png
from ghibli.inference.load import LoadedModel
from ghibli.models.load import quiet
from ghibli.runtime.console import console, counted
from ghibli.runtime.errors import UserError

SHOWN = 12  # pairs on the sheet
SHEET = "before_after.png"


@dataclass(frozen=True)
class RestyleOptions:
    """How far and in which way a photo is redrawn."""

    strength: float  # share of the denoising steps: 0 = the photo, 1 = all new
    sampler: str  # a name in SAMPLERS
    guidance: float
    steps: int  # of a whole denoising
    seed: int
    negative: str
    scale: float  # of all adapters
    resolution: int  # px; the result has about the area of this square

    def __post_init__(self) -> None:
        SAMPLERS.require(self.sampler, "--sampler")
        if not 1 <= self.steps <= 999:  # at 1000 the pipeline would count from a timestep that is none
            raise UserError(f"--steps {self.steps}: from 1 to 999")
        check_seed(self.seed)
        if int(self.steps * self.strength) < 1:
            raise UserError(f"--strength {self.strength:g} of {self.steps} steps is none: raise either")


@dataclass(frozen=True)
class Photo:
    """A file and what is on it."""

    path: Path
    prompt: str


def photos_of(paths: Iterable[Path], prompt: str | None, style: str) -> list[Photo]:
    """The photos of files and folders, with their prompts.

    Args:
        prompt: for all of them; None: the captions that lie with them.
        style: added to every prompt.

    Raises:
        UserError: no such file or folder, no photo, or one that nothing says what is on it.
    """
    found = [named for path in paths for named in with_words(path.expanduser(), captions=prompt is None)]
    if not found:
        raise UserError("no images there: name files, or a folder that holds some")
    silent = [path for path, words in found if not (prompt or words)]
    if silent:
        raise UserError(
            f"what is on {silent[0].name}? --prompt TEXT, or `ghibli caption {silent[0].parent}` first"
        )
    return [Photo(path, f"{prompt or words}{style}") for path, words in found]


def with_words(path: Path, *, captions: bool) -> list[tuple[Path, str | None]]:
    """(file, caption or None) of one file, whose caption is looked for if wanted, or of a folder."""
    if path.is_dir():
        return [(file, words or beside(file)) for _, file, words in list_images(path, "photo")]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() not in IMAGE_ENDINGS:
        raise UserError(f"{path.name} is no image: {', '.join(sorted(IMAGE_ENDINGS))} are read")
    if not captions:
        return [(path, None)]
    inside = path.resolve().parent
    root = inside.parent if inside.name in SUBFOLDERS else inside
    named = {file.resolve(): words for _, file, words in list_images(root, "photo")}
    return [(path, named.get(path.resolve()) or beside(path))]


def beside(file: Path) -> str | None:
    """The caption in a .txt beside a photo, if it can be read."""
    try:
        return read_beside(file)
    except Unusable:
        return None


def size_like(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) of the same shape and about `resolution` squared px, multiples of 8, at least 64."""
    factor = resolution / (size[0] * size[1]) ** 0.5
    return tuple(max(64, round(side * factor / 8) * 8) for side in size)


def restyle(
    loaded: LoadedModel,
    photo: Image.Image,
    prompt: str,
    how: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
) -> Image.Image:
    """One photo redrawn, of about how.resolution squared px and the photo's shape.

    Args:
        on_step: called after every denoising step.

    Raises:
        UserError: no memory for it.
    """

    def after_step(*args: Any) -> dict[str, Any]:
        on_step()
        return {}

    base = loaded.at(how.scale)
    pipeline = StableDiffusionImg2ImgPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet, make_scheduler(how.sampler, base),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    small = photo.resize(size_like(photo.size, how.resolution), Image.Resampling.LANCZOS)
    with enough_memory(), quiet("diffusers"), torch.inference_mode():
        return pipeline(
            prompt, image=small, strength=how.strength, guidance_scale=how.guidance,
            negative_prompt=how.negative or None, num_inference_steps=how.steps,
            generator=torch.Generator().manual_seed(how.seed), callback_on_step_end=after_step,
        ).images[0]  # fmt: skip


def restyle_all(
    loaded: LoadedModel, photos: list[Photo], how: RestyleOptions, folder: Path
) -> tuple[int, list[tuple[Image.Image, Image.Image]]]:
    """Writes a PNG for each photo; one that cannot be read is named and left out.

    Returns:
        How many were written, and (before, after) of the first SHOWN.

    Raises:
        UserError: a PNG would be written over a photo, or no photo could be read.
    """
    written, pairs = 0, []
    files = targets([photo.path for photo in photos], folder)
    with counted("restyling") as on_progress:
        for done, (photo, file) in enumerate(zip(photos, files, strict=True), start=1):
            try:
                before = read_image(photo.path)[0]
            except (Unusable, OSError) as reason:
                console.print(f"{photo.path.name} is left out: {reason}", style="yellow", markup=False)
                continue
            after = restyle(loaded, before, photo.prompt, how)
            note = PngInfo()
            note.add_text(
                "ghibli", json.dumps(asdict(how) | {"prompt": photo.prompt, "photo": photo.path.name})
            )
            write_png(file, after, note)
            written += 1
            if len(pairs) < SHOWN:
                pairs.append((before.resize(after.size, Image.Resampling.LANCZOS), after))
            on_progress(done, len(photos))
    if not pairs:
        raise UserError("none of the photos could be read")
    return written, pairs


def targets(photos: list[Path], folder: Path) -> list[Path]:
    """For each photo the PNG to write: called like it; where two would be one, with ending, or numbered.

    Raises:
        UserError: one of them is a photo.
    """
    names = [photo.stem for photo in photos]
    if repeated(names):
        names = [photo.name for photo in photos]
    if repeated(names):
        names = [f"{number:04d}-{name}" for number, name in enumerate(names)]
    files = [folder / f"{name}.png" for name in names]
    originals = {photo.resolve() for photo in photos}
    for file in [*files, folder / SHEET]:
        if file.resolve() in originals:
            raise UserError(f"--to {folder}: {file.name} there is one of the photos; name another folder")
    return files


def repeated(names: list[str]) -> bool:
    """Would two of these files be one, or one be the sheet?"""
    return len({name.casefold() for name in [*names, Path(SHEET).stem]}) <= len(names)
