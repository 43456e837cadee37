"""Denoising losses, one per example."""

import torch


def denoising_losses(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each example, (B,) float32 (Ho et al. 2020, equation 14)."""
    return (noise_pred.float() - target.float()).square().mean(dim=(1, 2, 3))


def min_snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """min(SNR, gamma) / SNR, or / (SNR + 1) for v-prediction, (B,) (Hang et al. 2023, section 3.4)."""
    abar = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = abar / (1 - abar)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor
