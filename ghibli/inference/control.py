"""ControlNets (Zhang et al. 2023): redrawing along a photo's edges, its depth or a ready image."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, pipeline

from ghibli.diffusion.process import Unet
from ghibli.images.edges import canny
from ghibli.inference.request import ControlOptions
from ghibli.models.base import BaseModel
from ghibli.models.hub import CLIP_FILES, PART_FILES
from ghibli.models.load import load_part, part_folder, quiet
from ghibli.runtime.errors import UserError, first_line

SAME = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it sees."""

    controlnet: ControlNetModel
    image: Image.Image  # RGB, of the result's size
    scale: float  # factor on what it adds; 0 = nothing


ControlOf = Callable[[Image.Image], Control]  # makes the control of a photo in the result's size


def load_control(options: ControlOptions, base: BaseModel) -> Callable[[Image.Image | None], ControlOf]:
    """Load what steers: given a photo's own control image, or None to compute it, it returns a ControlOf.

    Raises:
        UserError: weights that are not there, damaged, or of another base.
    """
    controlnet = load_controlnet(options.model, base)
    compute = depth_estimator(options.depth_model) if options.source == "depth" else canny

    def control_of(own: Image.Image | None, photo: Image.Image) -> Control:
        image = compute(photo) if own is None else own
        return Control(controlnet, image.resize(photo.size, Image.Resampling.LANCZOS), options.scale)

    return lambda own: partial(control_of, own)


def load_controlnet(name: str, base: BaseModel) -> ControlNetModel:
    """Load a ControlNet from a folder or a hub id, onto the base's device.

    Raises:
        UserError: not there, damaged, or of another base.
    """
    what = f"--control-model {name}"
    folder = part_folder(name, what, PART_FILES)
    controlnet = load_part(ControlNetModel, folder, what, torch_dtype=torch.float32)
    for key in SAME:
        own, wanted = (comparable(part.config.get(key)) for part in (controlnet, base.unet))
        if own != wanted:
            raise UserError(f"{what} is for another base: its {key} is {own}, and this base's {wanted}")
    return controlnet.requires_grad_(False).eval().to(next(base.unet.parameters()).device)


def comparable(value: object) -> object:
    """Return a config's value with its tuples as lists."""
    return list(value) if isinstance(value, tuple) else value


def depth_estimator(name: str) -> Callable[[Image.Image], Image.Image]:
    """Load transformers' depth estimation: photo -> grey RGB of its size, the nearest place white.

    Raises:
        UserError: weights that are not there or damaged.
    """
    what = f"--depth-model {name}"
    folder = part_folder(name, what, CLIP_FILES)
    model = load_part(AutoModelForDepthEstimation, folder, what, dtype=torch.float32, trust_remote_code=False)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        with quiet("transformers"):  # silenced: which device it uses
            estimate = pipeline("depth-estimation", model=model.eval(), image_processor=processor)
    except Exception as error:  # transformers raises many types; all mean the same to the user
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error
    return lambda photo: estimate(photo)["depth"].convert("RGB")


def unet_of(base: BaseModel, control: Control | None) -> Unet:
    """Return (latents (B, C, h, w), timesteps (B,), embeds) -> prediction, with what a ControlNet adds."""
    if control is None:
        return lambda *inputs: base.unet(*inputs, return_dict=False)[0]
    pixels = torch.from_numpy(np.array(control.image, np.float32) / 255).permute(2, 0, 1)[None]
    pixels = pixels.to(control.controlnet.device)

    def predict(
        noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        down, mid = control.controlnet(
            noisy_latents, timesteps, prompt_embeds, pixels.expand(len(noisy_latents), -1, -1, -1),
            conditioning_scale=control.scale, return_dict=False,
        )  # fmt: skip
        return base.unet(
            noisy_latents, timesteps, prompt_embeds, return_dict=False,
            down_block_additional_residuals=down, mid_block_additional_residual=mid,
        )[0]  # fmt: skip

    return predict
