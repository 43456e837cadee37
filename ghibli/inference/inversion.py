"""Restyling by DDIM inversion: the photo's own noise instead of random noise, so that its structure stays.

Song et al. 2021, section 5.4, and Mokady et al. 2023, section 3: DDIM run backwards with the untouched base
turns the photo's latents into noise that makes the photo again; denoised by the adapted model instead, it
makes the same scene in the trained look.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from diffusers import DDIMInverseScheduler
from PIL import Image

from ghibli.diffusion.samplers import (
    SD15,
    Cell,
    check_finite,
    make_scheduler,
    predictor,
    set_timesteps,
)
from ghibli.inference.fit import require_memory
from ghibli.inference.img2img import prompt_pair, to_latents
from ghibli.inference.request import RestyleOptions
from ghibli.models.base import BaseModel
from ghibli.models.prompt_embeds import encode_weighted


@torch.inference_mode()
def invert(
    base: BaseModel,
    latents: torch.Tensor,
    prompt: str,
    options: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return the noisy latents (1, C, h, w) from which DDIM at guidance 1 comes back to these latents.

    Args:
        options: of steps, the share `strength` is walked, from the clean end up.
    """
    timesteps = walked(base, options).flip(0)
    settings = {"clip_sample": False, "prediction_type": base.prediction_type}
    scheduler = DDIMInverseScheduler.from_config(SD15 | base.scheduler_config, **settings)
    predict = predictor(base, encode_weighted(base, [prompt]), None, 1.0)
    before, total = -1, scheduler.config.num_train_timesteps
    for t in timesteps:
        scheduler.num_inference_steps = Fraction(total, int(t) - before)  # it steps from t - T // this
        latents = scheduler.step(predict(latents, t), int(t), latents).prev_sample
        before = int(t)
        on_step()
    return latents


@torch.inference_mode()
def denoise_inverted(
    base: BaseModel,
    latents: torch.Tensor,
    prompt: str,
    options: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Denoise what `invert` returned with DDIM: (3, height, width), float32 in 0 .. 1, on the CPU.

    Raises:
        UserError: the image is not finite.
    """
    scheduler = make_scheduler("ddim", base)
    set_timesteps(scheduler, options.steps)
    predict = predictor(base, *prompt_pair(base, prompt, options), options.guidance)
    for t in walked(base, options):
        latents = scheduler.step(predict(latents, t), t, latents, eta=0.0).prev_sample
        on_step()
    pixels = base.decode(latents).cpu()
    check_finite((latents[0], pixels[0]), prompt, options.seed, Cell("ddim", options.guidance))
    return pixels[0]


def walked(base: BaseModel, options: RestyleOptions) -> torch.Tensor:
    """Return the timesteps that `strength` of the steps covers, falling, as image-to-image has them."""
    scheduler = make_scheduler("ddim", base)
    set_timesteps(scheduler, options.steps)
    return scheduler.timesteps[len(scheduler.timesteps) - int(options.steps * options.strength) :]


def photo_latents(
    base: BaseModel, image: Image.Image, size: tuple[int, int], options: RestyleOptions
) -> torch.Tensor:
    """Encode a photo, scaled to a size first: (1, C, h, w); checks the memory."""
    require_memory(base, size, 1, options.guidance)
    return to_latents(base, image.resize(size, Image.Resampling.LANCZOS))
