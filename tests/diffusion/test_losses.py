"""Losses and their weights against torch, diffusers and the papers' formulas in float64."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from helpers.sd15_random import SCHEDULER

from ghibli.config.registry import WEIGHTINGS
from ghibli.config.schema import Config, LossConfig
from ghibli.diffusion.losses import check_weighting, huber, loss_function, loss_weights, mse
from ghibli.runtime.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module")
def options(make_config: Callable[..., Config]) -> LossConfig:
    return make_config().loss


@pytest.fixture(scope="module")
def abar() -> torch.Tensor:
    """alphas_cumprod of Stable Diffusion 1.5, as diffusers makes it."""
    return DDPMScheduler.from_config(SCHEDULER).alphas_cumprod


@pytest.fixture(scope="module")
def zero_terminal(abar: torch.Tensor) -> torch.Tensor:
    """The same with an SNR of 0 at the last timestep, as diffusers rescales it."""
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    return torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))


@pytest.mark.parametrize(("name", "authority"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_a_loss_is_torchs_of_each_example_in_fp32(
    options: LossConfig, name: str, authority: Callable
) -> None:
    noise_pred, target = pair()
    losses = loss_function(replace(options, function=name))(noise_pred, target)
    assert (losses.dtype, losses.shape) == (torch.float32, (3,))
    for i in range(3):
        torch.testing.assert_close(losses[i], authority(noise_pred[i].float(), target[i].float()))


@pytest.mark.parametrize("c", [0.01, 0.1, 3.0])
def test_huber_is_its_formula_and_takes_its_c(options: LossConfig, c: float) -> None:
    noise_pred, target = pair()
    found = loss_function(replace(options, function="huber", huber_c=c))(noise_pred, target)
    errors = noise_pred.double().numpy() - target.double().numpy()
    wanted = 2 * c * (np.sqrt(errors**2 + c**2) - c)
    np.testing.assert_allclose(found.numpy(), wanted.mean((1, 2, 3)), rtol=1e-5)


def test_huber_is_a_square_below_c_and_a_line_above() -> None:
    near, far = 1e-3 * torch.ones(1, 1, 2, 2), 1e3 * torch.ones(1, 1, 2, 2)
    zero = torch.zeros_like(near)
    assert huber(near, zero, c=0.5).item() == pytest.approx(mse(near, zero).item(), rel=1e-2)
    assert huber(far, zero, c=0.5).item() == pytest.approx(2 * 0.5 * 1e3, rel=1e-2)


# Weights


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_diffusers(options: LossConfig, gamma: float) -> None:
    """As in diffusers' examples/text_to_image/train_text_to_image.py."""
    scheduler, timesteps = DDPMScheduler.from_config(SCHEDULER), torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    own = replace(options, snr_gamma=gamma)  # alone, as runs of before had it
    for prediction, expected in zip(PREDICTIONS, (least / snr, least / (snr + 1)), strict=True):
        ours = loss_weights(own, timesteps, scheduler.alphas_cumprod, prediction)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
        named = loss_weights(
            replace(own, weighting="min_snr"), timesteps, scheduler.alphas_cumprod, prediction
        )
        assert torch.equal(named, ours)


FORMULAS = {  # of epsilon, as the papers write them, in sigma^2 = 1 / SNR where they do
    "soft_min_snr": lambda snr: (1 / (1 / snr + 1 / 4)) / snr,
    "debiased": lambda snr: 1 / np.sqrt(snr),
    "p2": lambda snr: 1 / (1 + snr),
    "min_snr": lambda snr: np.minimum(snr, 5) / snr,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_weight_of_epsilon_is_its_papers_formula(
    options: LossConfig, abar: torch.Tensor, name: str
) -> None:
    exact = abar.double().numpy()
    found = loss_weights(replace(options, weighting=name), torch.arange(1000), abar, "epsilon")
    np.testing.assert_allclose(found.numpy(), FORMULAS[name](exact / (1 - exact)), rtol=1e-4)


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_a_weighting_is_the_same_of_epsilon_and_of_v(
    options: LossConfig, abar: torch.Tensor, name: str
) -> None:
    """A wrong x_0 by 1 makes epsilon wrong by sqrt(SNR) and v by sqrt(abar) sqrt(SNR) + sqrt(1 - abar)."""
    timesteps, exact = torch.arange(1000), abar.double()
    snr = exact / (1 - exact)
    of_epsilon, of_v = (
        loss_weights(replace(options, weighting=name), timesteps, abar, kind).double() for kind in PREDICTIONS
    )
    wrong_v = exact.sqrt() * snr.sqrt() + (1 - exact).sqrt()
    torch.testing.assert_close(of_epsilon * snr, of_v * wrong_v.square(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "p2"])
def test_weights_are_finite_at_an_snr_of_zero(
    options: LossConfig, zero_terminal: torch.Tensor, name: str, prediction: str
) -> None:
    assert zero_terminal[-1] == 0
    own = replace(options, weighting=name)
    weights = loss_weights(own, torch.arange(1000), zero_terminal, prediction)
    assert weights.isfinite().all()
    if prediction == "epsilon":
        assert weights[-1] == 1  # where they go as the SNR goes to 0
        assert weights[-2] == pytest.approx(1, abs=1e-3)
    check_weighting(own, zero_terminal, prediction)


def test_debiased_is_refused_at_an_snr_of_zero(options: LossConfig, zero_terminal: torch.Tensor) -> None:
    own = replace(options, weighting="debiased")
    with pytest.raises(UserError, match=r"^loss.weighting=debiased is infinite at timestep 999 of this base"):
        check_weighting(own, zero_terminal, "epsilon")
    check_weighting(own, zero_terminal, "v_prediction")


def test_a_gamma_that_nothing_uses_is_refused(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"loss.snr_gamma=5.*null, since p2 has none"):
        make_config("loss.weighting=p2", "loss.snr_gamma=5")
    with pytest.raises(UserError, match=r"loss.weighting=min_snd is unknown: .*did you mean min_snr"):
        make_config("loss.weighting=min_snd")
