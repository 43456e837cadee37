"""The diffusion maths: tensors in, tensors out. Imports no model class, no config, no Lightning.

Shapes: B examples, latents (B, C, H, W). One convention for guidance everywhere: 1 = off.
"""

from collections.abc import Callable

import torch

Unet = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy_latents (B, C, H, W), timesteps (B,), prompt_embeds (B, L, D)) -> noise_pred like latents."""


def linear_betas(num_train_timesteps: int) -> torch.Tensor:
    """Return betas (T,) float32 from 1e-4 to 0.02 (Ho et al. 2020, section 4). Not the schedule of SD 1.5."""
    return torch.linspace(1e-4, 0.02, num_train_timesteps)


def add_noise(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """Return noisy latents x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, equation 4).

    Args:
        latents, noise: (B, C, H, W) float; the result is like latents.
        timesteps: (B,) int64, 0 .. T-1.
        alphas_cumprod: (T,) float, abar.
    """
    abar = per_example(alphas_cumprod, timesteps, latents)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def velocity(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """Return v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, appendix D).

    Args: as for add_noise.
    """
    abar = per_example(alphas_cumprod, timesteps, latents)
    return abar.sqrt() * noise - (1 - abar).sqrt() * latents


def per_example(table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return table[timesteps] as (B, 1, 1, 1), with the device and dtype of `like`.

    Args:
        table: (T,) float.
        timesteps: (B,) int64, 0 .. T-1.
    """
    return table.to(like.device, like.dtype)[timesteps].view(-1, 1, 1, 1)


def guided_noise(uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Return eps_uncond + s (eps_cond - eps_uncond), like cond (Ho & Salimans 2022, equation 6, s = 1 + w).

    s = 1 is eps_cond: no guidance.
    """
    return uncond + guidance_scale * (cond - uncond)


def predict_branches(
    unet: Unet,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return (uncond, cond), each (B, C, H, W), from one call on 2 B, the unconditional half first.

    Without negative_prompt_embeds there is one call on B, and uncond is None.

    Args:
        noisy_latents: (B, C, H, W) float.
        timesteps: (B,) int64, 0 .. T-1.
        prompt_embeds, negative_prompt_embeds: (B, L, D).
    """
    if negative_prompt_embeds is None:
        return None, unet(noisy_latents, timesteps, prompt_embeds)
    both = unet(
        torch.cat([noisy_latents, noisy_latents]),
        torch.cat([timesteps, timesteps]),
        torch.cat([negative_prompt_embeds, prompt_embeds]),
    )
    uncond, cond = both.chunk(2)
    return uncond, cond


def predict_noise(
    unet: Unet,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    guidance_scale: float,
) -> torch.Tensor:
    """Return the UNet's guided prediction, (B, C, H, W).

    Guidance 1 skips the unconditional branch. Gradients, when enabled, flow through both branches.

    Args:
        noisy_latents: (B, C, H, W) float.
        timesteps: (B,) int64, 0 .. T-1.
        prompt_embeds, negative_prompt_embeds: (B, L, D); the second is unused at guidance 1.
    """
    negative = None if guidance_scale == 1 else negative_prompt_embeds
    uncond, cond = predict_branches(unet, noisy_latents, timesteps, prompt_embeds, negative)
    return cond if uncond is None else guided_noise(uncond, cond, guidance_scale)


def usual_guidance(training_guidance: float) -> float:
    """Return the sampling guidance scale that suits a training guidance: SD's usual 7.5 for 1 (off).

    Two scales were measured on the demo (docs/loss-anomaly.md): 7.5 suits trainings at 1, and 15 those at
    7.5. Elsewhere this is the straight line through the two, a guess; `ghibli evaluate` scans a run.

    Args:
        training_guidance: LossConfig.own_guidance; below 1 for a guided target, which is sampled at less.
    """
    if training_guidance < 1:
        return round(max(1.0, 7.5 * training_guidance), 1)
    return round(7.5 + (15 - 7.5) / (7.5 - 1) * (training_guidance - 1), 1)
