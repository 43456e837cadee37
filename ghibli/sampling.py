"""DDPM and DDIM sampling with the live UNet, and the labelled grid of what it draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw, ImageFont

from ghibli.base_model import BaseModel
from ghibli.diffusion import predict_noise
from ghibli.schema import SampleConfig

GUIDED_SCALE = 2  # x the training guidance: nearest to real pictures, docs/loss-anomaly.md (part guidance)
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
    """Pictures (B, 3, height, width), float32 in 0 .. 1 on the CPU, one for each prompt.

    Start noise, and DDPM's noise, come from one CPU generator per picture, so a picture does not
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


def usual_guidance(training_guidance: float) -> float:
    """The guidance scale at which the pictures of a training are best."""
    return 7.5 if training_guidance == 1 else GUIDED_SCALE * training_guidance


def cells_of(config: SampleConfig, training_guidance: float) -> list[Cell]:
    """The grid's columns: every sampler at every guidance.

    A run trained with guidance w is also drawn at GUIDED_SCALE times w, where its pictures are best.
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
    """Pictures (prompts, cells, 3, resolution, resolution), 0 .. 1, for the grid's prompts.

    Prompt i starts from the noise of seed `config.seed + i` in every cell.
    """
    seeds = [config.seed + i for i in range(len(config.prompts))]
    with in_eval_mode(base):
        pictures = [
            sample(
                base, config.prompts, cell, num_inference_steps=config.num_inference_steps,
                seeds=seeds, resolution=resolution, on_step=on_step,
            )
            for cell in cells
        ]  # fmt: skip
    return torch.stack(pictures, dim=1)


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


def to_image(picture: torch.Tensor) -> Image.Image:
    """(3, H, W) in 0 .. 1 -> 8-bit RGB picture, rounded to the nearest level."""
    levels = (picture * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


def compose_grid(
    rows: list[tuple[str, torch.Tensor]], prompts: list[str], columns: list[str], title: str
) -> Image.Image:
    """One picture of all samples: for each prompt a block of rows, a column for each cell.

    Args:
        rows: (label, pictures (prompts, columns, 3, H, W) in 0 .. 1), such as base first, adapter
            below; all with the same start noise.
        prompts, columns: the labels of blocks and columns.
    """
    height, width = rows[0][1].shape[-2:]
    zoom = 1 if min(height, width) >= 256 else 2
    tile, tall = zoom * width, zoom * height
    font, small = ImageFont.load_default(size=17), ImageFont.load_default(size=15)
    gap, left, head, line = 6, 120, 100, 30
    block = line + len(rows) * (tall + gap)
    width = left + len(columns) * (tile + gap) + gap
    grid = Image.new("RGB", (width, head + len(prompts) * block + gap), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((12, 12), title, fill="black", font=font, spacing=8)
    for column, text in enumerate(columns):
        center = left + column * (tile + gap) + tile // 2
        draw.text((center, head - 18), text, fill="black", font=small, anchor="mm")
    for p, prompt in enumerate(prompts):
        top = head + p * block
        draw.text((12, top + line // 2), prompt, fill="#444444", font=small, anchor="lm")
        for r, (label, pictures) in enumerate(rows):
            y = top + line + r * (tall + gap)
            draw.text((12, y + tall // 2), label, fill="black", font=small, anchor="lm")
            for c in range(len(columns)):
                one = to_image(pictures[p, c]).resize((tile, tall), Image.Resampling.LANCZOS)
                grid.paste(one, (left + c * (tile + gap), y))
    return grid
