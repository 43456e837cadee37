"""Redrawing an image with diffusers' image-to-image pipeline: photos in the style, and larger images.

Meng et al. 2022, "SDEdit": noise of an intermediate timestep is added to the image's latents, which are then
denoised.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from ghibli.diffusion.samplers import Cell, check_finite, make_scheduler, set_timesteps
from ghibli.inference.fit import require_memory
from ghibli.inference.request import RestyleOptions
from ghibli.models.base import BaseModel
from ghibli.models.load import quiet
from ghibli.models.pipeline import make_pipeline
from ghibli.models.prompt_embeds import encode_weighted, same_length


class GuidedImg2ImgPipeline(StableDiffusionImg2ImgPipeline):
    """The library's pipeline with our guidance: uncond + w (cond - uncond) for every w, below 1 too."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Tell whether both branches are needed: at any guidance but 1. The library's own: only above 1."""
        return self.guidance_scale != 1

    def get_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> Any:
        """Return the library's share of our own timesteps, and how many these are."""
        set_timesteps(self.scheduler, num_inference_steps)
        return super().get_timesteps(num_inference_steps, strength, device)


@torch.inference_mode()
def redraw(
    base: BaseModel,
    image: Image.Image,
    prompt: str,
    size: tuple[int, int],
    options: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Redraw an image, scaled to a size first: (3, height, width), float32 in 0 .. 1, on the CPU.

    Args:
        size: width and height in px, multiples of 8.
        options: scale and resolution are the caller's business.
        on_step: called after every denoising step.

    Raises:
        UserError: it does not fit into memory, or is not finite.
    """

    def after_step(*args: Any) -> dict[str, Any]:
        on_step()
        return {}

    require_memory(base, size, 1, options.guidance)
    pipeline = make_pipeline(base, GuidedImg2ImgPipeline)
    pipeline.scheduler = make_scheduler(options.sampler, base)  # the constructor would set steps_offset to 1
    pipeline.set_progress_bar_config(disable=True)
    with quiet("diffusers"), base.tiles(size):  # silenced: advice on deprecated options
        embeds, negative = encode_weighted(base, [prompt]), None
        if options.guidance != 1:
            embeds, negative = same_length(embeds, encode_weighted(base, [options.negative]))
        latents = pipeline(
            image=image.resize(size, Image.Resampling.LANCZOS), strength=options.strength,
            guidance_scale=options.guidance, prompt_embeds=embeds, negative_prompt_embeds=negative,
            num_inference_steps=options.steps, generator=torch.Generator().manual_seed(options.seed),
            callback_on_step_end=after_step, output_type="latent",
        ).images  # fmt: skip
    pixels = base.decode(latents).cpu()
    check_finite((latents[0], pixels[0]), prompt, options.seed, Cell(options.sampler, options.guidance))
    return pixels[0]
