"""Redrawing an image with diffusers' image-to-image pipeline: photos in the style, and larger images.

Meng et al. 2022, "SDEdit": noise of an intermediate timestep is added to the image's latents, which are then
denoised.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image, ImageFilter

from ghibli.diffusion.samplers import Cell, check_finite, make_scheduler, set_timesteps
from ghibli.inference.control import Control
from ghibli.inference.fit import require_memory
from ghibli.inference.request import RestyleOptions
from ghibli.models.base import BaseModel
from ghibli.models.load import quiet
from ghibli.models.pipeline import make_pipeline
from ghibli.models.prompt_embeds import encode_weighted, same_length

EDGE = 128  # a mask's edge is blurred by the longer side over this


class Guided:
    """Gives the library's pipelines our guidance, uncond + w (cond - uncond) for every w, and timesteps."""

    scheduler: Any

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Tell whether both branches are needed: at any guidance but 1. The library's own: only above 1."""
        return self.guidance_scale != 1  # type: ignore[attr-defined]

    def get_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> Any:
        """Return the library's share of our own timesteps, and how many these are."""
        set_timesteps(self.scheduler, num_inference_steps)
        return super().get_timesteps(num_inference_steps, strength, device)  # type: ignore[misc]


class GuidedImg2ImgPipeline(Guided, StableDiffusionImg2ImgPipeline):
    """Image-to-image."""


class GuidedInpaintPipeline(Guided, StableDiffusionInpaintPipeline):
    """Image-to-image in which, after every step, the latents outside a mask are the noised image's."""


class GuidedControlImg2ImgPipeline(Guided, StableDiffusionControlNetImg2ImgPipeline):
    """Image-to-image with a ControlNet."""


class GuidedControlInpaintPipeline(Guided, StableDiffusionControlNetInpaintPipeline):
    """Inside a mask, with a ControlNet."""


PIPELINES = {  # (inside a mask, with a ControlNet) -> class
    (False, False): GuidedImg2ImgPipeline,
    (True, False): GuidedInpaintPipeline,
    (False, True): GuidedControlImg2ImgPipeline,
    (True, True): GuidedControlInpaintPipeline,
}


@torch.inference_mode()
def redraw(
    base: BaseModel,
    image: Image.Image,
    prompt: str,
    options: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
    mask: Image.Image | None = None,
    control: Control | None = None,
) -> torch.Tensor:
    """Redraw an image in its own size: (3, height, width), float32 in 0 .. 1, on the CPU.

    Args:
        image: width and height are multiples of 8.
        options: scale, resolution and control are the caller's business.
        on_step: called after every denoising step.
        mask: in grey, white where it is redrawn; None = everywhere. Outside of it the pixels are kept.
        control: the ControlNet that steers; None = none.

    Raises:
        UserError: it does not fit into memory, or is not finite.
    """

    def after_step(*args: Any) -> dict[str, Any]:
        on_step()
        return {}

    require_memory(base, image.size, 1, options.guidance)
    parts = {} if control is None else {"controlnet": control.controlnet}
    pipeline = make_pipeline(base, PIPELINES[mask is not None, control is not None], **parts)
    pipeline.scheduler = make_scheduler(options.sampler, base)  # the constructor would set steps_offset to 1
    pipeline.set_progress_bar_config(disable=True)
    with quiet("diffusers"), base.tiles(image.size):  # silenced: advice on deprecated options
        embeds, negative = prompt_pair(base, prompt, options)
        more: dict[str, Any] = {}
        if mask is not None:
            more = {"mask_image": covered(mask, image.size), "width": image.width, "height": image.height}
        if control is not None:
            more |= {"control_image": control.image, "controlnet_conditioning_scale": float(control.scale)}
        latents = pipeline(
            image=image, strength=options.strength,
            guidance_scale=options.guidance, prompt_embeds=embeds, negative_prompt_embeds=negative,
            num_inference_steps=options.steps, generator=torch.Generator().manual_seed(options.seed),
            callback_on_step_end=after_step, output_type="latent", **more,
        ).images  # fmt: skip
    pixels = base.decode(latents).cpu()
    check_finite((latents[0], pixels[0]), prompt, options.seed, Cell(options.sampler, options.guidance))
    return pixels[0] if mask is None else kept_outside(image, pixels[0], mask)


def prompt_pair(
    base: BaseModel, prompt: str, options: RestyleOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (prompt_embeds, negative_prompt_embeds), (1, 77 k, D) each; the second None at guidance 1."""
    embeds = encode_weighted(base, [prompt])
    if options.guidance == 1:
        return embeds, None
    return same_length(embeds, encode_weighted(base, [options.negative]))


def to_latents(base: BaseModel, image: Image.Image) -> torch.Tensor:
    """Encode an image as the mean of its latents, (1, C, h, w), scaled, on the base's device."""
    device = next(base.unet.parameters()).device
    pixels = (unit_pixels(image)[None] * 2 - 1).to(device)
    with torch.inference_mode(), base.tiles(image.size):
        return base.vae.encode(pixels).latent_dist.mode() * base.vae.config.scaling_factor


def unit_pixels(image: Image.Image) -> torch.Tensor:
    """Return an image's pixels, (channels, height, width), float32 in 0 .. 1."""
    values = torch.from_numpy(np.array(image, np.float32)) / 255
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def covered(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a mask of this size that is white wherever soft_edges is not black."""
    return soft_edges(mask, size).point(lambda value: 255 if value > 0 else 0)


def soft_edges(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a mask to a size and blur its edges: by 4 px at 512 px, as A1111 does."""
    blurred = ImageFilter.GaussianBlur(max(size) / EDGE)
    return mask.convert("L").resize(size, Image.Resampling.BILINEAR).filter(blurred)


def kept_outside(image: Image.Image, redrawn: torch.Tensor, mask: Image.Image) -> torch.Tensor:
    """Mix an image and its redrawn pixels (3, height, width): the second where the mask is white."""
    share = unit_pixels(soft_edges(mask, image.size))
    return share * redrawn + (1 - share) * unit_pixels(image)
