"""Restyling by DDIM inversion: the photo's own noise instead of random noise, so that its structure stays.

Song et al. 2021, section 5.4, and Mokady et al. 2023, section 3: DDIM run backwards with the untouched base
turns the photo's latents into noise that makes the photo again; denoised by the adapted model instead, it
makes the same scene in the trained look.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from PIL import Image

from ghibli.diffusion.samplers import (
    SD15,
    Cell,
    check_finite,
    make_scheduler,
    predictor,
    set_timesteps,
)
from ghibli.inference.control import Control, unet_of
from ghibli.inference.fit import require_memory
from ghibli.inference.img2img import prompt_pair, to_latents
from ghibli.inference.load import LoadedModel
from ghibli.inference.request import RestyleOptions
from ghibli.models.base import BaseModel
from ghibli.models.prompt_embeds import encode_weighted

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents, timestep ()) -> noise prediction


@torch.inference_mode()
def redraw_inverted(
    model: LoadedModel,
    image: Image.Image,
    prompt: str,
    options: RestyleOptions,
    on_step: Callable[[], None] = lambda: None,
    control: Control | None = None,
) -> torch.Tensor:
    """Redraw an image from its own noise: (3, height, width), float32 in 0 .. 1, on the CPU.

    Args:
        image: in the result's size.
        on_step: called after every step of either direction.
        control: steers both directions, so that the base still comes back to the photo.

    Raises:
        UserError: it does not fit into memory, or is not finite.
    """

    def counted(predict: Predict) -> Predict:
        def predict_and_count(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            noise_pred = predict(latents, t)
            on_step()
            return noise_pred

        return predict_and_count

    base = model.at(0.0)
    require_memory(base, image.size, 1, options.guidance)
    predict = predictor(base, encode_weighted(base, [prompt]), None, 1.0, unet_of(base, control))
    noisy = invert(base, to_latents(base, image), options, counted(predict))
    base = model.at(options.scale)
    predict = predictor(base, *prompt_pair(base, prompt, options), options.guidance, unet_of(base, control))
    latents = denoise(base, noisy, options, counted(predict))
    pixels = base.decode(latents).cpu()
    check_finite((latents[0], pixels[0]), prompt, options.seed, Cell("ddim", options.guidance))
    return pixels[0]


def invert(base: BaseModel, latents: torch.Tensor, options: RestyleOptions, predict: Predict) -> torch.Tensor:
    """Return the noisy latents (1, C, h, w) from which `denoise` with this prediction comes back.

    Args:
        options: of steps, the share `strength` is walked, from the clean end up.
    """
    settings = {"clip_sample": False, "prediction_type": base.prediction_type}
    scheduler = DDIMInverseScheduler.from_config(SD15 | base.scheduler_config, **settings)
    before, total = -1, scheduler.config.num_train_timesteps
    for t in walked(base, options)[1].flip(0):
        scheduler.num_inference_steps = Fraction(total, int(t) - before)  # it steps from t - T // this
        latents = scheduler.step(predict(latents, t), int(t), latents).prev_sample
        before = int(t)
    return latents


def denoise(
    base: BaseModel, latents: torch.Tensor, options: RestyleOptions, predict: Predict
) -> torch.Tensor:
    """Denoise what `invert` returned with DDIM; args and result alike."""
    scheduler, timesteps = walked(base, options)
    for t in timesteps:
        latents = scheduler.step(predict(latents, t), t, latents, eta=0.0).prev_sample
    return latents


def walked(base: BaseModel, options: RestyleOptions) -> tuple[DDIMScheduler, torch.Tensor]:
    """Return DDIM and the falling timesteps that `strength` of the steps covers, as image-to-image does."""
    scheduler = make_scheduler("ddim", base)
    set_timesteps(scheduler, options.steps)
    return scheduler, scheduler.timesteps[len(scheduler.timesteps) - int(options.steps * options.strength) :]
