"""DDPM and DDIM sampling with the live UNet, and the labelled grid of what it draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from ghibli.config.schema import SampleConfig
from ghibli.diffusion.process import GUIDED_SCALE, predict_noise
from ghibli.models.base import BaseModel

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
# What a base's file leaves out is meant as SD 1.5 has it; diffusers' own defaults differ.
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Cell:
    """One way of sampling: a column of a grid."""

    sampler: str  # ddpm or ddim
    guidance: float  # 1 = off

    @property
    def label(self) -> str:
        return f"{self.sampler.upper()}  guidance {self.guidance:g}"


def make_scheduler(sampler: str, base: BaseModel) -> DDPMScheduler | DDIMScheduler:
    """diffusers' scheduler with the base's own betas, and what its file leaves out as in SD 1.5.

    Never clips: latents are not limited to -1 .. 1.
    """
    config = SD15 | base.scheduler_config
    wanted = {"clip_sample": False, "prediction_type": base.prediction_type}
    if sampler == "ddpm":
        wanted["variance_type"] = "fixed_small"
    return SAMPLERS[sampler].from_config(config, **wanted)


@torch.inference_mode()
def sample(
    base: BaseModel,
    prompts: list[str],
    cell: Cell,
    *,
    num_inference_steps: int,
    seeds: list[int],
    resolution: int | tuple[int, int],
    negative_prompt: str = "",
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Images (B, 3, height, width), float32 in 0 .. 1 on the CPU, one for each prompt.

    Start noise, and DDPM's noise, come from one CPU generator per image, so an image does not
    depend on its neighbours in the batch or (but for rounding) on the device. DDPM with skipped
    timesteps uses beta = 1 - abar_t / abar_{t-k} (Ho et al. 2020, equations 6 and 7); DDIM is
    eta = 0 (Song et al. 2021, equation 12).

    Args:
        seeds: one for each prompt.
        resolution: px, a square's side or (width, height); multiples of the VAE's factor.
        on_step: called after every denoising step.
    """
    device = next(base.unet.parameters()).device
    scheduler = make_scheduler(cell.sampler, base)
    scheduler.set_timesteps(num_inference_steps)
    last = scheduler.config.num_train_timesteps - 1
    scheduler.timesteps -= (scheduler.timesteps.max() - last).clamp(min=0)  # all 1000: no room to shift
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    sides = height // base.vae_factor, width // base.vae_factor
    shape = (len(prompts), base.unet.config.in_channels, *sides)
    latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    prompt_embeds = base.encode_prompts(base.tokenize(prompts).to(device))
    negative_prompt_embeds = None
    if cell.guidance != 1:
        negative_prompt_embeds = base.encode_prompts(
            base.tokenize([negative_prompt] * len(prompts)).to(device)
        )
    for t in scheduler.timesteps:
        noise_pred = predict_noise(
            lambda *inputs: base.unet(*inputs, return_dict=False)[0],
            latents, t.to(device).expand(len(prompts)), prompt_embeds, negative_prompt_embeds, cell.guidance,
        )  # fmt: skip
        extra = {"generator": generators} if cell.sampler == "ddpm" else {"eta": 0.0}
        latents = scheduler.step(noise_pred.float(), t, latents, **extra).prev_sample
        on_step()
    return base.decode(latents).cpu()


def cells_of(config: SampleConfig, training_guidance: float) -> list[Cell]:
    """The grid's columns: every sampler at every guidance.

    A run trained with guidance w is also drawn at GUIDED_SCALE times w, where its images are best.
    Each column stands there once.
    """
    scales = list(config.guidance)
    if training_guidance != 1:
        scales.append(GUIDED_SCALE * training_guidance)
    return list(dict.fromkeys(Cell(sampler, scale) for sampler in config.samplers for scale in scales))


def draw_cells(
    base: BaseModel,
    config: SampleConfig,
    cells: list[Cell],
    resolution: int,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Images (prompts, cells, 3, resolution, resolution), 0 .. 1, for the grid's prompts.

    Prompt i starts from the noise of seed `config.seed + i` in every cell.
    """
    seeds = [config.seed + i for i in range(len(config.prompts))]
    with in_eval_mode(base):
        images = [
            sample(
                base, config.prompts, cell, num_inference_steps=config.num_inference_steps,
                seeds=seeds, resolution=resolution, on_step=on_step,
            )
            for cell in cells
        ]  # fmt: skip
    return torch.stack(images, dim=1)


@contextmanager
def in_eval_mode(base: BaseModel) -> Iterator[None]:
    """A model in training as it would be used: no dropout; for now all parts on the UNet's device."""
    was_training = base.unet.training, base.text_encoder.training
    homes = [(part, next(part.parameters()).device) for part in (base.vae, base.text_encoder)]
    base.unet.eval()
    base.text_encoder.eval()
    for part, _ in homes:
        part.to(next(base.unet.parameters()).device)
    try:
        yield
    finally:
        for part, home in homes:
            part.to(home)
        base.unet.train(was_training[0])
        base.text_encoder.train(was_training[1])
