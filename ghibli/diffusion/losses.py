"""Denoising losses, one per example, and their weights."""

from collections.abc import Callable
from functools import partial

import torch

from ghibli.config.registry import LOSSES, TERMS, WEIGHTINGS
from ghibli.config.schema import LossConfig
from ghibli.runtime.errors import UserError
from ghibli.runtime.registry import load_object

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noise_pred (B, C, H, W), target like it) -> losses (B,) float32."""


def loss_function(options: LossConfig) -> LossFunction:
    """Return the loss that is registered under `options.function` in LOSSES, with its settings."""
    entry = LOSSES[options.function]
    settings = {argument: getattr(options, key) for argument, key in entry.settings.items()}
    return partial(load_object(entry.function), **settings)


def term_functions(options: LossConfig) -> dict[str, LossFunction]:
    """Return the function of every term in `options.terms` by its name."""
    return {name: load_object(TERMS[name].function) for name in options.terms}


def mse(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each example, (B,) float32 (Ho et al. 2020, equation 14).

    Args:
        noise_pred, target: (B, C, H, W), any float dtype; computed in float32.
    """
    return (noise_pred.float() - target.float()).square().mean(dim=(1, 2, 3))


def l1(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error of each example, (B,) float32. Args: as for mse."""
    return (noise_pred.float() - target.float()).abs().mean(dim=(1, 2, 3))


def huber(noise_pred: torch.Tensor, target: torch.Tensor, c: float) -> torch.Tensor:
    """Return the mean of 2 c (sqrt(d^2 + c^2) - c) of each example, d the error, (B,) float32.

    The pseudo-Huber loss (Charbonnier et al. 1997) in the scale of kohya's and diffusers' `huber`: d^2 for
    errors far below c, 2 c |d| far above. It is neither torch's huber_loss nor its smooth_l1_loss, which
    join a parabola and a line.

    Args:
        noise_pred, target: as for mse.
        c: above 0, in the unit of the target.
    """
    squares = (noise_pred.float() - target.float()).square()
    # sqrt(d^2 + c^2) - c cancels for small d; this is the same
    return (2 * c * squares / ((squares + c * c).sqrt() + c)).mean(dim=(1, 2, 3))


def loss_weights(
    options: LossConfig, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """Return the weight of each example's loss under `options.weighting_name`, (B,).

    A weighting states how much the squared error of x_0 counts. As its SNR-th part is the squared error of
    epsilon, and its (SNR + 1)-th that of v, the weight is divided by SNR or SNR + 1; at SNR 0, where the
    last timestep of a base with zero terminal SNR is, it is the limit for epsilon.

    Args:
        timesteps: (B,) int64, 0 .. T-1.
        alphas_cumprod: (T,) float, abar; SNR is abar / (1 - abar).
        prediction_type: epsilon or v_prediction.
    """
    assert options.weighting_name is not None, "a loss without weights needs none"
    entry = WEIGHTINGS[options.weighting_name]
    abar = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = abar / (1 - abar)
    weights = load_object(entry.function)(snr, gamma=options.snr_gamma or entry.gamma)
    if prediction_type != "epsilon":
        return weights / (snr + 1)
    limit = float("inf") if entry.at_zero_snr is None else entry.at_zero_snr
    return torch.where(snr == 0, limit, weights / snr)


def check_weighting(options: LossConfig, alphas_cumprod: torch.Tensor, prediction_type: str) -> None:
    """Require finite weights at every timestep.

    Raises:
        UserError: the base's noise ends at an SNR of 0, where this weighting of epsilon is infinite.
    """
    if options.weighting_name is None:
        return
    timesteps = torch.arange(len(alphas_cumprod))
    broken = ~loss_weights(options, timesteps, alphas_cumprod.cpu(), prediction_type).isfinite()
    if broken.any():
        raise UserError(
            f"loss.weighting={options.weighting_name} is infinite at timestep {int(broken.nonzero()[0])} of "
            "this base, where nothing of the image is left in the noise: use min_snr, soft_min_snr or p2"
        )


def min_snr(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return 1 / (1 / SNR + 1 / gamma), min-SNR without its corner (Crowson et al. 2024, section 3.4)."""
    return snr * (gamma / (snr + gamma))


def debiased(snr: torch.Tensor, gamma: None) -> torch.Tensor:
    """Return sqrt(SNR), which is 1 / sqrt(SNR) of epsilon (Yu et al. 2023, equation 9)."""
    return snr.sqrt()


def p2(snr: torch.Tensor, gamma: None) -> torch.Tensor:
    """Return SNR / (1 + SNR), which is 1 / (1 + SNR) of epsilon (Choi et al. 2022, equation 8).

    That is with k = gamma = 1; the gamma of that paper is not loss.snr_gamma.
    """
    return snr / (1 + snr)
