"""The checker that comes with Stable Diffusion 1.5: images that it takes for unsafe become black.

It compares an image with some concepts by CLIP and errs both ways (Rando et al. 2022, "Red-Teaming the
Stable Diffusion Safety Filter").
"""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from ghibli.models.base import resolve_path
from ghibli.models.load import quiet
from ghibli.runtime.errors import UserError, first_line

FOLDER = "safety_checker"  # in the base's folder; feature_extractor/ prepares its images


def has_checker(base: str) -> bool:
    """Whether the folder of a base, as `model.path` names it, holds a checker."""
    return (resolve_path(base) / FOLDER / "config.json").is_file()


class SafetyChecker:
    """Loaded from the folder of a base."""

    def __init__(self, base: str) -> None:
        """
        Raises:
            UserError: the base has no checker, or a damaged one.
        """
        folder = resolve_path(base)
        if not has_checker(base):
            raise UserError(f"{base} has no {FOLDER}/ folder: copy it there, or turn the checker off")
        try:
            with quiet("transformers", "diffusers"):
                self._prepare = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
                self._judge = StableDiffusionSafetyChecker.from_pretrained(
                    folder / FOLDER, use_safetensors=True
                )
        except Exception as error:  # the libraries raise many types; each means the same to the user
            raise UserError(f"the safety checker of {base} does not load: {first_line(error)}") from error

    @torch.inference_mode()
    def black_out(self, images: list[Image.Image]) -> tuple[list[Image.Image], int]:
        """The images, those taken for unsafe all black, and how many these are."""
        prepared = self._prepare(images, return_tensors="pt").pixel_values
        arrays = [np.asarray(image).astype(np.float32) for image in images]
        with quiet("diffusers"):
            _, unsafe = self._judge(images=arrays, clip_input=prepared)
        shown = [
            Image.new("RGB", image.size) if bad else image for image, bad in zip(images, unsafe, strict=True)
        ]
        return shown, sum(unsafe)
