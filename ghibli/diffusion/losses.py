"""Denoising losses, one per example, and their weights."""

from collections.abc import Callable

import torch

from ghibli.config.registry import LOSSES
from ghibli.runtime.registry import load_object

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noise_pred (B, C, H, W), target like it) -> losses (B,) float32."""


def loss_function(name: str) -> LossFunction:
    """Return the loss that is registered under this name in LOSSES."""
    return load_object(LOSSES[name].function)


def mse(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each example, (B,) float32 (Ho et al. 2020, equation 14).

    Args:
        noise_pred, target: (B, C, H, W), any float dtype; computed in float32.
    """
    return (noise_pred.float() - target.float()).square().mean(dim=(1, 2, 3))


def min_snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Return min(SNR, gamma) / SNR, or / (SNR + 1) for v-prediction, (B,) (Hang et al. 2023, section 3.4).

    Args:
        timesteps: (B,) int64, 0 .. T-1.
        alphas_cumprod: (T,) float, abar; SNR is abar / (1 - abar).
    """
    abar = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = abar / (1 - abar)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor
