"""The diffusion maths against diffusers, against the written formulas and against statistics."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from helpers.sd15_random import SCHEDULER

from ghibli.adapters.lora import trainable
from ghibli.config.paths import DEMO
from ghibli.config.schema import Config
from ghibli.diffusion import process
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.training.module import GhibliModule

DEMO_SCHEDULER = json.loads((DEMO / "scheduler" / "scheduler_config.json").read_text())


@pytest.fixture(params=[SCHEDULER, DEMO_SCHEDULER], ids=["sd15", "demo"])
def scheduler(request: pytest.FixtureRequest) -> DDPMScheduler:
    """diffusers' own scheduler of a base."""
    return DDPMScheduler.from_config(request.param)


@pytest.fixture
def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents, noise, timesteps), the timesteps from the first to the last."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 400, 998, 999])


def test_add_noise_is_diffusers(scheduler: DDPMScheduler, example: tuple) -> None:
    ours = process.add_noise(*example, scheduler.alphas_cumprod)
    assert torch.equal(ours, scheduler.add_noise(*example))


def test_velocity_is_diffusers(scheduler: DDPMScheduler, example: tuple) -> None:
    ours = process.velocity(*example, scheduler.alphas_cumprod)
    assert torch.equal(ours, scheduler.get_velocity(*example))


def test_forward_process_is_the_chain_of_single_steps(scheduler: DDPMScheduler) -> None:
    """q(x_t | x_0) against t + 1 times q(x_t | x_t-1) = N(sqrt(1 - beta) x, beta), in float64."""
    betas = scheduler.betas.double()
    abar = torch.cumprod(1 - betas, 0)
    mean, variance = torch.ones(()).double(), torch.zeros(()).double()
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    for t in range(len(betas)):
        mean, variance = mean * (1 - betas[t]).sqrt(), variance * (1 - betas[t]) + betas[t]
        at = torch.tensor([t])
        signal = process.add_noise(one, zero, at, abar).squeeze()
        noise = process.add_noise(zero, one, at, abar).squeeze()
        torch.testing.assert_close(signal, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(noise**2, variance, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_statistics_of_noisy_latents(scheduler: DDPMScheduler, t: int) -> None:
    """Mean and variance of 200,000 draws lie within 5 standard errors of the formula."""
    count, latent = 200_000, 1.7
    abar = scheduler.alphas_cumprod.double()
    noise = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    drawn = process.add_noise(torch.full_like(noise, latent), noise, torch.full((count,), t), abar)
    mean, variance = abar[t].sqrt() * latent, 1 - abar[t]
    assert abs(drawn.mean() - mean) < 5 * (variance / count).sqrt()
    assert abs(drawn.var() - variance) < 5 * variance * (2 / count) ** 0.5


def test_velocity_and_noisy_latents_give_back_latents_and_noise(example: tuple) -> None:
    latents, noise, timesteps = example[0].double(), example[1].double(), example[2]
    abar = DDPMScheduler.from_config(SCHEDULER).alphas_cumprod.double()
    noisy = process.add_noise(latents, noise, timesteps, abar)
    velocity = process.velocity(latents, noise, timesteps, abar)
    a, s = abar[timesteps].sqrt().view(-1, 1, 1, 1), (1 - abar[timesteps]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(a * noisy - s * velocity, latents, rtol=0, atol=1e-12)
    torch.testing.assert_close(s * noisy + a * velocity, noise, rtol=0, atol=1e-12)


def test_linear_betas_are_diffusers_defaults() -> None:
    assert torch.equal(process.linear_betas(1000), DDPMScheduler(num_train_timesteps=1000).betas)


def test_guided_noise_is_the_formula() -> None:
    uncond, cond = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    for s in (1.0, 2.0, 7.5):
        w = s - 1  # as the reference study also writes it
        guided = process.guided_noise(uncond, cond, s)
        torch.testing.assert_close(guided, (1 + w) * cond - w * uncond, rtol=1e-12, atol=1e-12)
    assert torch.equal(process.guided_noise(uncond, cond, 0), uncond)


def test_usual_guidance_goes_through_what_was_measured_without_a_jump() -> None:
    assert process.usual_guidance(1) == 7.5
    assert process.usual_guidance(7.5) == 15
    assert process.usual_guidance(1.01) - 7.5 == pytest.approx(0, abs=0.06)
    assert process.usual_guidance(1 / 1.01) - 7.5 == pytest.approx(0, abs=0.11)
    assert process.usual_guidance(1 / 7.5) == 1
    scales = [process.usual_guidance(w) for w in (1 / 30, 1 / 3, 1, 2, 4, 7.5, 15)]
    assert scales == sorted(scales)
    assert min(scales) == 1


class FakeUnet:
    """Returns a fixed function of its inputs and remembers them."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append(inputs)
        latents, timesteps, embeds = inputs
        return latents * embeds.mean((1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1)


def test_predict_noise_at_guidance_1_is_one_call_on_the_batch() -> None:
    unet, latents, timesteps = FakeUnet(), torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    embeds, empty = torch.randn(2, 3, 7, 6)
    for negative in (None, empty):
        unet.calls.clear()
        noise_pred = process.predict_noise(unet, latents, timesteps, embeds, negative, 1)
        assert len(unet.calls) == 1
        assert all(map(torch.equal, unet.calls[0], (latents, timesteps, embeds)))
        assert torch.equal(noise_pred, FakeUnet()(latents, timesteps, embeds))


@pytest.mark.parametrize("guidance", [0.0, 2.0, 7.5])
def test_predict_noise_with_guidance_is_one_call_with_the_unconditional_half_first(guidance: float) -> None:
    unet, latents, timesteps = FakeUnet(), torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    embeds, empty = torch.randn(2, 3, 7, 6)
    noise_pred = process.predict_noise(unet, latents, timesteps, embeds, empty, guidance)
    assert len(unet.calls) == 1
    seen_latents, seen_timesteps, seen_embeds = unet.calls[0]
    assert torch.equal(seen_latents, torch.cat([latents, latents]))
    assert torch.equal(seen_timesteps, torch.cat([timesteps, timesteps]))
    assert torch.equal(seen_embeds, torch.cat([empty, embeds]))
    uncond, cond = FakeUnet()(latents, timesteps, empty), FakeUnet()(latents, timesteps, embeds)
    torch.testing.assert_close(noise_pred, uncond + guidance * (cond - uncond))


@pytest.fixture
def module(base: BaseModel, make_config: Callable[..., Config]) -> GhibliModule:
    """The demo with a random adapter (B not zero), dropout off."""
    module = GhibliModule(make_config("lora.rank=4", "lora.dropout=0"), base).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.trainable.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def batch(module: GhibliModule) -> dict[str, Any]:
    """Two training examples with different captions and timesteps."""
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    input_ids = module.base.tokenize(["a red train by a lake", "a girl standing in a greenhouse"])
    return {
        "latents": latents, "noise": noise, "timesteps": torch.tensor([120, 870]), "input_ids": input_ids,
    }  # fmt: skip


def branches(module: GhibliModule, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(uncond, cond) of the live UNet from two calls of their own, by diffusers' add_noise."""
    scheduler = DDPMScheduler.from_config(module.base.scheduler_config)
    noisy = scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    outputs = []
    for input_ids in (module.base.tokenize(["", ""]), batch["input_ids"]):
        embeds = module.text_encoder(input_ids)[0]
        outputs.append(module.unet(noisy, batch["timesteps"], encoder_hidden_states=embeds).sample)
    return outputs[0], outputs[1]


def losses_at(module: GhibliModule, batch: dict[str, Any], guidance: float) -> torch.Tensor:
    module.config.loss.guidance = guidance
    return module.losses(batch)


def gradients(module: GhibliModule, loss: torch.Tensor) -> torch.Tensor:
    """The gradients of all trainable weights in one vector."""
    found = torch.autograd.grad(loss, list(module.trainable.values()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


def test_loss_at_guidance_1_is_mse(module: GhibliModule, batch: dict[str, Any]) -> None:
    cond = branches(module, batch)[1]
    losses = losses_at(module, batch, 1)
    torch.testing.assert_close(losses.mean(), F.mse_loss(cond, batch["noise"]), rtol=1e-5, atol=0)
    for i in range(2):
        torch.testing.assert_close(losses[i], F.mse_loss(cond[i], batch["noise"][i]), rtol=1e-5, atol=0)


def test_guided_loss_and_its_gradients_are_those_of_two_calls(
    module: GhibliModule, batch: dict[str, Any]
) -> None:
    assert any(name.startswith("text_encoder.") for name in trainable(module.base))
    ours = losses_at(module, batch, 7.5).mean()
    uncond, cond = branches(module, batch)
    written = F.mse_loss(uncond + 7.5 * (cond - uncond), batch["noise"])
    torch.testing.assert_close(ours, written, rtol=1e-5, atol=0)
    assert relative(gradients(module, ours), gradients(module, written)) < 1e-5


def test_guided_gradient_flows_through_both_branches(module: GhibliModule, batch: dict[str, Any]) -> None:
    """The gradient is the sum of the two branches' shares, and neither share is small."""
    ours = gradients(module, losses_at(module, batch, 7.5).mean())
    uncond, cond = branches(module, batch)
    shares = []
    for u, c in ((uncond.detach(), cond), (uncond, cond.detach())):
        shares.append(gradients(module, F.mse_loss(u + 7.5 * (c - u), batch["noise"])))
    assert relative(shares[0] + shares[1], ours) < 1e-5
    assert min(share.norm() for share in shares) > 0.2 * ours.norm()


def test_loss_of_a_v_prediction_base_is_mse_of_the_velocity(
    module: GhibliModule, batch: dict[str, Any]
) -> None:
    module.base.scheduler_config = module.base.scheduler_config | {"prediction_type": "v_prediction"}
    scheduler = DDPMScheduler.from_config(module.base.scheduler_config)
    target = scheduler.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    cond = branches(module, batch)[1]
    torch.testing.assert_close(
        losses_at(module, batch, 1).mean(), F.mse_loss(cond, target), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("guidance", [1, 7.5])
def test_the_probes_scores_are_the_guided_loss_and_the_conditional_one(
    module: GhibliModule, batch: dict[str, Any], guidance: float
) -> None:
    guided, alone = module.scores(batch, guidance, module.base_alphas_cumprod)
    torch.testing.assert_close(guided, losses_at(module, batch, guidance))
    torch.testing.assert_close(alone, losses_at(module, batch, 1), rtol=1e-5, atol=1e-6)


def test_the_probe_keeps_to_the_bases_schedule(make_config: Callable, batch: dict[str, Any]) -> None:
    """Samplers use the base's schedule whichever one trains, so that is the one to score on."""
    wrong = GhibliModule(make_config("loss.noise_schedule=linear"), load("demo"))
    right = GhibliModule(make_config(), load("demo"))
    assert torch.equal(wrong.base_alphas_cumprod, right.alphas_cumprod)
    assert not torch.allclose(wrong.alphas_cumprod, right.alphas_cumprod)
    own = wrong.scores(batch, 1, wrong.base_alphas_cumprod)
    assert torch.equal(own, right.scores(batch, 1, right.base_alphas_cumprod))
