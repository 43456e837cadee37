"""Sampling with the live UNet, and the columns of the labelled grids that are drawn with it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ghibli.config.registry import SAMPLERS, sampler_label
from ghibli.config.schema import SampleConfig
from ghibli.diffusion.process import Unet, predict_noise, usual_guidance
from ghibli.models.base import BaseModel
from ghibli.models.prompt_embeds import same_length
from ghibli.runtime.errors import UserError
from ghibli.runtime.registry import load_object

PromptEncoder = Callable[[BaseModel, list[str]], torch.Tensor]  # (base, texts) -> embeds (B, 77 k, D)

# What the base's scheduler_config.json leaves out means SD 1.5's value; diffusers' own defaults differ.
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Cell:
    """A sampler at a guidance scale: a column of a grid."""

    sampler: str  # a name in SAMPLERS
    guidance: float  # 1 = off

    @property
    def label(self) -> str:
        """Heading of the column, such as `DDIM  guidance 7.5`."""
        return f"{sampler_label(self.sampler)}  guidance {self.guidance:g}"

    @property
    def short_label(self) -> str:
        """Heading where there is little room, such as `DDIM 7.5`."""
        return f"{sampler_label(self.sampler)} {self.guidance:g}"


def make_scheduler(sampler: str, base: BaseModel) -> SchedulerMixin:
    """Build a sampler's diffusers scheduler with the base's own betas and prediction type.

    Raises:
        UserError: no sampler of this name.
    """
    entry = SAMPLERS[sampler]
    settings = {**entry.settings, "prediction_type": base.prediction_type}
    return load_object(entry.scheduler).from_config(SD15 | base.scheduler_config, **settings)


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Choose the scheduler's timesteps, so that denoising starts near T - 1, where there is only noise.

    `leading`, the spacing of DDPM and DDIM where the base names none, counts upwards in equal strides. What
    their division leaves is missing at the top: 400 steps would start at t = 799. There, `trailing` is used
    instead, which counts down from T - 1 (Lin et al. 2024, table 2). The other samplers have `linspace`, from
    T - 1 to 0, as A1111 and ComfyUI do.

    Raises:
        UserError: more steps than timesteps.
    """
    config = scheduler.config
    if num_inference_steps > config.num_train_timesteps:
        raise UserError(f"{num_inference_steps} steps: this base has {config.num_train_timesteps} timesteps")
    scheduler.set_timesteps(num_inference_steps)
    if not reaches_top(scheduler, num_inference_steps):  # `linspace` neither, with its one step at 0
        scheduler.register_to_config(timestep_spacing="trailing")
        scheduler.set_timesteps(num_inference_steps)
    if scheduler.timesteps[-1] < 0:  # numpy's arange goes one too far for 61 steps, 103, ... of `trailing`
        scheduler.timesteps = scheduler.timesteps[:-1]
        if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == num_inference_steps + 2:
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def steps_key(base: BaseModel, num_inference_steps: int) -> int | str:
    """Return what a cache key holds for the timesteps: their number, and `trailing` where we chose that.

    Images that an older version drew and cached started lower there.
    """
    scheduler = make_scheduler("ddim", base)
    was = scheduler.config.timestep_spacing
    set_timesteps(scheduler, num_inference_steps)
    spacing = scheduler.config.timestep_spacing
    return num_inference_steps if spacing == was else f"{num_inference_steps} {spacing}"


def reaches_top(scheduler: SchedulerMixin, num_inference_steps: int) -> bool:
    """Tell whether the first timestep is within two strides and a quarter of all from T - 1."""
    total = scheduler.config.num_train_timesteps
    missing = total - 1 - float(scheduler.timesteps[0])
    return 0 <= missing < min(2 * (total // num_inference_steps), total / 4)


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
    encode: PromptEncoder = BaseModel.encode_captions,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return an image for each prompt, (B, 3, height, width), float32 in 0 .. 1, on the CPU.

    Start noise, and the noise of a stochastic sampler, come from one CPU generator per image, so an
    image does not depend on its neighbours in the batch or (but for rounding) on the device. DDPM with
    skipped timesteps uses beta = 1 - abar_t / abar_{t-k} (Ho et al. 2020, equations 6 and 7).

    Args:
        seeds: one for each prompt.
        resolution: px, a square's side or (width, height); multiples of the VAE's factor.
        negative_prompt: of the unconditional branch; unused at guidance 1.
        encode: as training does by default; prompt_embeds.encode_weighted reads weights and cuts nothing.
        on_step: called after every denoising step.

    Raises:
        NotFinite: NaN or inf in the result, of which nothing is returned.
    """
    device = next(base.unet.parameters()).device
    entry, scheduler = SAMPLERS[cell.sampler], make_scheduler(cell.sampler, base)
    set_timesteps(scheduler, num_inference_steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    step_options = {**entry.step_options, **({"generator": generators} if entry.is_stochastic else {})}
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    sides = height // base.vae_factor, width // base.vae_factor
    shape = (len(prompts), base.unet.config.in_channels, *sides)
    noise = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    latents = noise * scheduler.init_noise_sigma  # 1, or the highest sigma of those that count in sigma
    prompt_embeds, negative_prompt_embeds = encode(base, prompts), None
    if cell.guidance != 1:
        negative_prompt_embeds = encode(base, [negative_prompt] * len(prompts))
        prompt_embeds, negative_prompt_embeds = same_length(prompt_embeds, negative_prompt_embeds)
    predict = predictor(base, prompt_embeds, negative_prompt_embeds, cell.guidance)
    for t in scheduler.timesteps:
        noise_pred = predict(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(noise_pred, t, latents, **step_options).prev_sample
        on_step()
    images = base.decode(latents).cpu()
    for i, prompt in enumerate(prompts):
        check_finite((latents[i], images[i]), prompt, seeds[i], cell)
    return images


def predictor(
    base: BaseModel,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    guidance_scale: float,
    unet: Unet | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return (latents (B, C, H, W), timestep ()) -> guided prediction like latents, float32.

    Args:
        unet: None = the base's own, with nothing added.
    """
    own = unet or (lambda *inputs: base.unet(*inputs, return_dict=False)[0])

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return predict_noise(
            own, latents, t.to(latents.device).expand(len(latents)),
            prompt_embeds, negative_prompt_embeds, guidance_scale,
        ).float()  # fmt: skip

    return predict


class NotFinite(UserError):
    """An image with NaN or inf in it, which is not drawn."""


def check_finite(found: Iterable[torch.Tensor], prompt: str, seed: int, cell: Cell) -> None:
    """Raise NotFinite unless all latents and pixels of an image are finite, naming what it was made from."""
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise NotFinite(
            f"`{prompt[:60]}` with seed {seed}, {cell.label}: the image has values that are not finite, so "
            "it is not drawn; lower the guidance or the adapter's scale, or check the weights for NaN"
        )


def cells_of(config: SampleConfig, training_guidance: float) -> list[Cell]:
    """Return the columns of a grid: every sampler at every guidance scale, each once.

    A run trained with guidance w is also drawn at the scale that suits it, usual_guidance(w).

    Args:
        training_guidance: LossConfig.own_guidance.
    """
    scales = list(config.guidance)
    if training_guidance != 1:
        scales.append(usual_guidance(training_guidance))
    return list(dict.fromkeys(Cell(sampler, scale) for sampler in config.samplers for scale in scales))


def own_cell(config: SampleConfig, training_guidance: float) -> Cell:
    """Return the cell that shows a run best: the last of the grid, at the scale that suits its training.

    Args:
        training_guidance: LossConfig.own_guidance; 1 = the last of sample.guidance suits it.
    """
    scale = config.guidance[-1] if training_guidance == 1 else usual_guidance(training_guidance)
    return Cell(config.samplers[-1], scale)


def draw_cells(
    base: BaseModel,
    config: SampleConfig,
    cells: list[Cell],
    resolution: int,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return the grid's prompts in every cell, (prompts, cells, 3, resolution, resolution), 0 .. 1.

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
    """Turn dropout off and gather all parts on the UNet's device; put everything back afterwards."""
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
