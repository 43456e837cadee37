"""The safety checker of Stable Diffusion 1.5: images that it finds unsafe are blacked out.

It compares CLIP embeddings of an image with those of some concepts, and errs both ways (Rando et al. 2022,
"Red-Teaming the Stable Diffusion Safety Filter").
"""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from ghibli.config.paths import resolve_path
from ghibli.models.configs import check_config
from ghibli.models.load import load_part, quiet
from ghibli.runtime.errors import UserError, first_line

CHECKER = "safety_checker"  # in the base's folder; its image processor is in feature_extractor/


def has_checker(base: str) -> bool:
    """Tell whether the folder of a base, as `model.path` names it, holds a checker."""
    return (resolve_path(base) / CHECKER / "config.json").is_file()


class SafetyChecker:
    """The safety checker in the folder of a base."""

    def __init__(self, base: str) -> None:
        """Load the checker.

        Raises:
            UserError: the base has no checker, or a damaged one.
        """
        folder = resolve_path(base)
        if not has_checker(base):
            raise UserError(f"{base} has no {CHECKER}/ folder: copy it there, or turn the checker off")
        # load_part checks that no weight is missing: a checker with random ones would pass anything
        self._checker = load_part(StableDiffusionSafetyChecker, folder / CHECKER, f"model.path={base}")
        check_config(folder / "feature_extractor" / "preprocessor_config.json", f"model.path={base}")
        try:
            self._processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
        except Exception as error:  # transformers raises many types; all mean the same to the user
            raise UserError(f"feature_extractor/ of {base} cannot be loaded: {first_line(error)}") from error

    @torch.inference_mode()
    def black_out(self, images: list[Image.Image]) -> tuple[list[Image.Image], int]:
        """Replace unsafe images by black ones; also return how many these are."""
        pixel_values = self._processor(images, return_tensors="pt").pixel_values
        arrays = [np.asarray(image).astype(np.float32) for image in images]
        with quiet("diffusers"):  # silenced: that an image is unsafe, which is returned
            _, unsafe = self._checker(images=arrays, clip_input=pixel_values)
        checked = [
            Image.new("RGB", image.size) if bad else image for image, bad in zip(images, unsafe, strict=True)
        ]
        return checked, sum(unsafe)
