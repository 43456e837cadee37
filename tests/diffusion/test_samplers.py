"""Sampling against diffusers' own pipeline and, in float64, against the published steps; the grid."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from helpers.sd15_random import SCHEDULER
from torch import nn

from ghibli.config.paths import DEMO
from ghibli.config.registry import SAMPLERS, letters_of, sampler_name
from ghibli.config.schema import Config
from ghibli.diffusion.samplers import (
    Cell,
    NotFinite,
    cells_of,
    draw_cells,
    make_scheduler,
    sample,
    set_timesteps,
    steps_key,
)
from ghibli.images.grid import compose_grid, to_image
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

PROMPTS = ["a panda on top of a red train", "a girl standing in a greenhouse, Studio Ghibli style"]
SEEDS = [7, 11]
SIDE = 64


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """diffusers' pipeline of the same folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_scheduler(base: BaseModel, config: dict) -> BaseModel:
    return replace(base, scheduler_config=config)


# The pipeline


PIPELINES = {  # sampler -> the scheduler that diffusers' documentation gives for it, and its settings
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


UNGUIDED = [("ddim", 1), ("euler_a", 1)]  # which all of them predict alike


@pytest.mark.parametrize(("sampler", "guidance"), [*((name, 7.5) for name in PIPELINES), *UNGUIDED])
def test_sample_is_the_stable_diffusion_pipeline(
    model: BaseModel, pipeline: StableDiffusionPipeline, sampler: str, guidance: float
) -> None:
    scheduler, settings = PIPELINES[sampler]
    pipeline.scheduler = scheduler.from_config(model.scheduler_config, **settings)
    expected = pipeline(
        PROMPTS, height=SIDE, width=SIDE, num_inference_steps=6, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="pt",
    ).images  # fmt: skip
    cell = Cell(sampler, guidance)
    ours = sample(model, PROMPTS, cell, num_inference_steps=6, seeds=SEEDS, resolution=SIDE)
    assert ours.shape == (2, 3, SIDE, SIDE)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert ours.std() > 0.01  # an image, not one colour that any sampler would give


def test_sampler_guidance_prompt_and_seed_all_matter(model: BaseModel) -> None:
    """Otherwise the comparisons above would prove nothing."""

    def image(sampler: str, guidance: float, prompt: str, seed: int) -> torch.Tensor:
        return sample(
            model, [prompt], Cell(sampler, guidance), num_inference_steps=6, seeds=[seed], resolution=SIDE
        )

    reference = image("ddim", 7.5, PROMPTS[0], 7)
    others = [("ddpm", 7.5, PROMPTS[0], 7), ("ddim", 1, PROMPTS[0], 7), ("ddim", 7.5, PROMPTS[1], 7),
              ("ddim", 7.5, PROMPTS[0], 8)]  # fmt: skip
    for other in others:
        assert (image(*other) - reference).abs().max() > 0.005, other


# The written steps, with a noise predictor that is an ordinary function


def fake_noise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth function of latents and timestep, mild enough not to blow up rounding errors."""
    return 0.7 * x + 0.3 * torch.sin(x) + 0.2 * torch.cos(t.to(x.dtype).view(-1, 1, 1, 1) / 100)


class FakeUnet(nn.Module):
    """fake_noise with the interface of a UNet; remembers the timesteps it was asked for."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(torch.zeros(()))
        self.timesteps: list[int] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, return_dict: bool) -> tuple:
        self.timesteps.append(int(t[0]))
        return (fake_noise(x, t),)


@pytest.fixture
def fake(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """The demo with the fake noise predictor and SD 1.5's schedule, showing latents as images."""
    base = replace(model, unet=FakeUnet(), scheduler_config=SCHEDULER)
    monkeypatch.setattr(base, "decode", lambda latents: latents)
    return base


def betas_of_sd15() -> torch.Tensor:
    """From the published numbers in float64: linear in their square roots."""
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2


def abar_of_sd15() -> torch.Tensor:
    return torch.cumprod(1 - betas_of_sd15(), 0)


def noises(seed: int, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """Start noise and then DDPM's noise of one image, as one CPU generator gives them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(1, 4, 8, 8, generator=generator, dtype=dtype).double()


def ddpm_by_hand(timesteps: list[int], z: Iterator[torch.Tensor]) -> torch.Tensor:
    """The reference study's step in float64, beta = 1 - abar_t / abar_t-k; abar is 1 after the last step."""
    abar = abar_of_sd15()
    x = next(z)
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        abar_after = abar[after] if after is not None else torch.ones(()).double()
        alpha = abar[t] / abar_after
        beta = 1 - alpha
        eps = fake_noise(x, torch.tensor([t]))
        x = (x - beta / (1 - abar[t]).sqrt() * eps) / alpha.sqrt()
        x = x + ((1 - abar_after) / (1 - abar[t]) * beta).sqrt() * next(z)
    return x


def ddim_by_hand(timesteps: list[int], z: Iterator[torch.Tensor]) -> torch.Tensor:
    """The reference study's step in float64; after the last step abar is abar_0, as SD 1.5's file says."""
    abar = abar_of_sd15()
    x = next(z)
    for t, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        eps = fake_noise(x, torch.tensor([t]))
        latent = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        after = abar[following]
        x = after.sqrt() * latent + (1 - after).sqrt() * eps
    return x


BY_HAND = {"ddpm": ddpm_by_hand, "ddim": ddim_by_hand}


LEADING = (4, 5, 6, 7, 10, 15, 20, 25, 30, 40, 50, 100, 125, 200, 250, 333, 500, 999)  # among others
TRAILING = (1, 2, 3, 60, 300, 334, 400, 501, 600, 667, 900, 1000)


def planned(steps: int) -> list[int]:
    """SD 1.5's timesteps, every (1000 // steps)-th plus 1; where these end too low, downwards from 999."""
    if steps in TRAILING:
        return [round(1000 - k * (1000 / steps)) - 1 for k in range(steps)]
    return [k * (1000 // steps) + 1 for k in reversed(range(steps))]


@pytest.mark.parametrize("steps", LEADING + TRAILING)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_timesteps_are_one_of_diffusers_spacings(model: BaseModel, sampler: str, steps: int) -> None:
    """Whichever it is, diffusers' own scheduler is the authority for the numbers."""
    ours = make_scheduler(sampler, with_scheduler(model, SCHEDULER))
    set_timesteps(ours, steps)
    spacing = "leading" if steps in LEADING else "trailing"
    theirs = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler].from_config(
        SCHEDULER, timestep_spacing=spacing
    )
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_every_number_of_steps_starts_near_the_top(model: BaseModel) -> None:
    """Nowhere is more missing than `leading` leaves by its design, two strides; often nothing is."""
    scheduler = make_scheduler("ddim", with_scheduler(model, SCHEDULER))
    for steps in range(1, 1001):
        scheduler.register_to_config(timestep_spacing="leading")
        set_timesteps(scheduler, steps)
        found = scheduler.timesteps
        assert len(found) == steps and found.unique().numel() == steps
        assert 999 >= found[0] > 999 - min(250, 2 * (1000 // steps)) and found[-1] >= 0
    with pytest.raises(UserError, match=r"1001 steps: this base has 1000 timesteps"):
        set_timesteps(scheduler, 1001)


def test_a_cache_of_older_images_is_not_used_where_the_timesteps_changed(model: BaseModel) -> None:
    base = with_scheduler(model, SCHEDULER)
    assert [steps_key(base, steps) for steps in (30, 100, 400)] == [30, 100, "400 trailing"]
    own = with_scheduler(model, SCHEDULER | {"timestep_spacing": "trailing"})
    assert steps_key(own, 400) == 400


def test_a_bases_own_spacing_stays(model: BaseModel) -> None:
    own = with_scheduler(model, SCHEDULER | {"timestep_spacing": "linspace"})
    scheduler = make_scheduler("ddim", own)
    set_timesteps(scheduler, 10)
    assert scheduler.timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("steps", [1, 5, 30, 400, 600, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_trajectory_is_the_written_step(fake: BaseModel, sampler: str, steps: int) -> None:
    """Every image of a batch ends where float64 arithmetic by the formula ends."""
    ours = sample(
        fake, PROMPTS, Cell(sampler, 1), num_inference_steps=steps, seeds=SEEDS, resolution=SIDE
    ).double()
    assert fake.unet.timesteps == planned(steps)
    for latents, seed in zip(ours, SEEDS, strict=True):
        expected = BY_HAND[sampler](planned(steps), noises(seed))[0]
        torch.testing.assert_close(latents, expected, rtol=0, atol=2e-4)


def test_all_1000_steps_of_ddpm_use_the_published_betas(fake: BaseModel) -> None:
    """The formula as printed, with beta_t itself: nothing is skipped, so nothing is combined."""
    betas, abar, z = betas_of_sd15(), abar_of_sd15(), noises(3)
    x = next(z)
    for t in reversed(range(1000)):
        mean = x - betas[t] / (1 - abar[t]).sqrt() * fake_noise(x, torch.tensor([t]))
        variance = betas[t] * (1 - abar[t - 1]) / (1 - abar[t]) if t > 0 else torch.zeros(()).double()
        x = mean / (1 - betas[t]).sqrt() + variance.sqrt() * next(z)
    ours = sample(fake, ["x"], Cell("ddpm", 1), num_inference_steps=1000, seeds=[3], resolution=SIDE)
    torch.testing.assert_close(ours.double(), x, rtol=0, atol=2e-4)


@pytest.mark.parametrize("steps", [7, 30, 334, 900])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_steps_in_float64_equal_the_formula_to_rounding(model: BaseModel, sampler: str, steps: int) -> None:
    """The scheduler we make, with float64 numbers: no fp32 rounding hides a small difference."""
    scheduler = make_scheduler(sampler, with_scheduler(model, SCHEDULER))
    scheduler.alphas_cumprod = abar_of_sd15()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    set_timesteps(scheduler, steps)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(fake_noise(x, t[None]), t, x, generator=generator).prev_sample
    expected = BY_HAND[sampler](planned(steps), noises(5, torch.float64))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


# Settings


FILES = {
    "as published": SCHEDULER,
    "without clip_sample": {k: v for k, v in SCHEDULER.items() if k != "clip_sample"},
    "without set_alpha_to_one": {k: v for k, v in SCHEDULER.items() if k != "set_alpha_to_one"},
    "without steps_offset": {k: v for k, v in SCHEDULER.items() if k != "steps_offset"},
    "without betas": {k: v for k, v in SCHEDULER.items() if not k.startswith("beta_")},
    "empty": {"_class_name": "PNDMScheduler"},
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_scheduler_is_sd15s_where_its_file_leaves_something_out(
    model: BaseModel, sampler: str, file: str
) -> None:
    scheduler = make_scheduler(sampler, with_scheduler(model, FILES[file]))
    assert scheduler.config.clip_sample is False
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.timestep_spacing == "leading"
    assert scheduler.config.thresholding is False
    torch.testing.assert_close(scheduler.betas.double(), betas_of_sd15(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), abar_of_sd15(), rtol=1e-4, atol=0)
    if sampler == "ddim":
        assert scheduler.config.set_alpha_to_one is False
        assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    else:
        assert scheduler.config.variance_type == "fixed_small"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_scheduler_follows_what_a_base_says_itself(model: BaseModel, sampler: str) -> None:
    own = {
        "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction",
        "steps_offset": 0, "set_alpha_to_one": True, "timestep_spacing": "trailing",
    }  # fmt: skip
    scheduler = make_scheduler(sampler, with_scheduler(model, SCHEDULER | own))
    for name, value in own.items():
        if name in scheduler.config:
            assert scheduler.config[name] == value, name
    assert torch.equal(scheduler.betas, torch.linspace(0.001, 0.02, 1000))


@pytest.mark.parametrize("guidance", [0, 0.5, 7.5])
def test_guidance_is_the_formula_at_every_scale(model: BaseModel, guidance: float) -> None:
    """uncond + w (cond - uncond), in a loop around diffusers' DDIM; its pipeline has no guidance below 1."""
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(10)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        cond, uncond = (model.encode_prompts(model.tokenize([text])) for text in (PROMPTS[0], ""))
        for t in scheduler.timesteps:
            a, b = (model.unet(latents, t[None], embeds).sample for embeds in (uncond, cond))
            latents = scheduler.step(a + guidance * (b - a), t, latents).prev_sample
        expected = model.decode(latents)
    base = with_scheduler(model, SCHEDULER)
    cell = Cell("ddim", guidance)
    ours = sample(base, PROMPTS[:1], cell, num_inference_steps=10, seeds=[7], resolution=SIDE)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["latents", "pixels"])
def test_an_image_that_is_not_finite_is_refused(
    fake: BaseModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its prompt and seed are named, not those of its neighbour."""
    if where == "latents":
        plain = fake.unet.forward

        def spoilt(x: torch.Tensor, *rest: object, **options: object) -> tuple:
            x = x.clone()
            x[-1, 0, 0, 0] = math.inf
            return plain(x, *rest, **options)

        monkeypatch.setattr(fake.unet, "forward", spoilt)
    else:
        nan = torch.tensor([1.0, math.nan]).view(2, 1, 1, 1)
        monkeypatch.setattr(fake, "decode", lambda latents: latents * nan)
    with pytest.raises(NotFinite) as caught:
        sample(fake, PROMPTS, Cell("ddim", 1), num_inference_steps=2, seeds=SEEDS, resolution=SIDE)
    assert str(caught.value).startswith(f"`{PROMPTS[1]}` with seed 11, DDIM  guidance 1: the image")


# Names, steps and noise levels


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("DDIM", "ddim"), ("Euler", "euler"), ("Euler a", "euler_a"), ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("DPM++ SDE", "dpmpp_sde"), ("UniPC", "unipc"),
        ("LCM", "lcm"), ("euler_ancestral", "euler_a"), ("uni_pc", "unipc"), ("dpmpp_sde", "dpmpp_sde"),
    ],
)  # fmt: skip
def test_names_of_a1111_and_comfyui(name: str, ours: str) -> None:
    assert sampler_name(name, "--sampler") == ours


def test_a_setting_takes_other_programs_names_and_stores_ours(make_config: Callable[..., Config]) -> None:
    words = (
        "sample.samplers=['DPM++ 2M Karras',euler_ancestral]",
        "evaluate.sampler_steps={euler_ancestral: 9}",
    )
    config = make_config(*words)
    assert config.sample.samplers == ["dpmpp_2m_karras", "euler_a"]
    assert config.evaluate.sampler_steps == {"euler_a": 9}
    with pytest.raises(UserError, match=r"^evaluate.sampler_steps names lcm, which sample.samplers does not"):
        make_config("evaluate.sampler_steps={lcm: 4}")
    with pytest.raises(UserError, match=r"^evaluate.sampler_steps.ddim=0 is out of range: from 1 to 1000$"):
        make_config("evaluate.sampler_steps={ddim: 0}")
    with pytest.raises(UserError, match=r"^evaluate.sampler_steps=7 is out of range: a number of steps by"):
        make_config("evaluate.sampler_steps=7")
    with pytest.raises(UserError, match=r"^sample.num_inference_steps=60 is .*: from 1 to 50 with lcm$"):
        make_config("sample.samplers=[lcm]", "sample.num_inference_steps=60")


def test_every_sampler_has_a_name_of_its_own() -> None:
    names = [{letters_of(name) for name in (own, e.label, *e.other_names)} for own, e in SAMPLERS.items()]
    assert sum(map(len, names)) == len(set().union(*names))
    for other in ("DPM++ 2M SDE Karras", "DPM++ 2S a", "heun", ""):
        with pytest.raises(UserError, match=r"^--sampler .*is unknown: choose one of ddpm, ddim, euler"):
            sampler_name(other, "--sampler")


@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("ddpm", "ddim", "lcm")])
def test_noise_levels_fall_from_the_top_to_nought(
    model: BaseModel, sampler: str, spacing: str | None
) -> None:
    """For every number of steps that is accepted: as many levels, each lower than the one before."""
    own = {} if spacing is None else {"timestep_spacing": spacing}
    base, abar = with_scheduler(model, SCHEDULER | own), abar_of_sd15()
    levels = ((1 - abar) / abar).sqrt()
    for steps in (1, 2, 3, 5, 7, 20, 30, 61, 103, 333, 400, 501, 998, SAMPLERS[sampler].most_steps):
        scheduler = make_scheduler(sampler, base)
        set_timesteps(scheduler, steps)
        sigmas = scheduler.sigmas.double()
        assert len(scheduler.timesteps) == steps and len(sigmas) == steps + 1, steps
        assert sigmas[-1] == 0 and (sigmas.diff() < 0).all(), steps
        assert levels[-251] < sigmas[0] <= levels[-1] * 1.001, steps


def test_euler_and_karras_have_the_noise_levels_of_other_programs(model: BaseModel) -> None:
    """k-diffusion's get_sigmas and get_sigmas_karras, which A1111 and ComfyUI use, written out."""
    abar = abar_of_sd15()
    levels = ((1 - abar) / abar).sqrt()
    low, high = levels[0] ** (1 / 7), levels[-1] ** (1 / 7)
    rising = torch.linspace(0, 1, 20, dtype=torch.float64)
    at = 999 * (1 - rising)
    between = (1 - at % 1) * levels[at.floor().long()] + (at % 1) * levels[at.ceil().long()]
    for sampler, expected in (("euler", between), ("dpmpp_2m_karras", (high + rising * (low - high)) ** 7)):
        scheduler = make_scheduler(sampler, with_scheduler(model, SCHEDULER))
        set_timesteps(scheduler, 20)
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_base_that_predicts_velocity(model: BaseModel, sampler: str) -> None:
    """The v that belongs to a base's eps gives the image that the eps gives."""
    options = {"num_inference_steps": 5, "seeds": [1], "resolution": SIDE}
    unet, abar = model.unet, abar_of_sd15().numpy()
    scheduler = make_scheduler(sampler, model)
    set_timesteps(scheduler, 5)

    class Velocity(nn.Module):
        config = unet.config
        calls = 0

        def forward(self, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, **other: object) -> tuple:
            if hasattr(scheduler, "sigmas"):
                a = 1 / (1 + scheduler.sigmas[self.calls] ** 2)
            else:
                a = torch.tensor(abar[int(t[0])]).float()
            Velocity.calls += 1
            return ((unet(x, t, embeds).sample - (1 - a).sqrt() * x) / a.sqrt(),)

    velocity = Velocity()
    velocity.register_parameter("device", nn.Parameter(torch.zeros(1)))
    config = model.scheduler_config | {"prediction_type": "v_prediction"}
    other = replace(model, unet=velocity, scheduler_config=config)
    expected = sample(model, ["a lake"], Cell(sampler, 1), **options)
    drawn = sample(other, ["a lake"], Cell(sampler, 1), **options)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)


# One image does not depend on another


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "guidance"), [*((name, 7.5) for name in SAMPLERS), *UNGUIDED])
def test_an_image_does_not_depend_on_its_neighbours(model: BaseModel, sampler: str, guidance: float) -> None:
    options = {"num_inference_steps": 4, "resolution": SIDE}
    cell = Cell(sampler, guidance)
    together = sample(model, PROMPTS, cell, seeds=SEEDS, **options)
    swapped = sample(model, PROMPTS[::-1], cell, seeds=SEEDS[::-1], **options)
    alone = torch.cat(
        [sample(model, [p], cell, seeds=[s], **options) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    )
    for other in (alone, swapped.flip(0)):  # to a quarter of a grey level; rounding makes up to 2e-4
        torch.testing.assert_close(together, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_twice_is_bit_equal(model: BaseModel, sampler: str) -> None:
    def draw() -> torch.Tensor:
        return sample(model, PROMPTS, Cell(sampler, 7.5), num_inference_steps=3, seeds=SEEDS, resolution=SIDE)

    first = draw()
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(first, draw())


def test_on_step_is_called_after_every_step(fake: BaseModel) -> None:
    calls = []
    sample(
        fake, ["x"], Cell("ddim", 1), num_inference_steps=9, seeds=[0], resolution=SIDE,
        on_step=lambda: calls.append(len(fake.unet.timesteps)),
    )  # fmt: skip
    assert calls == list(range(1, 10))


# The grid


def test_cells_are_every_sampler_at_every_guidance(make_config: Callable[..., Config]) -> None:
    cells = cells_of(make_config().sample, training_guidance=1)
    assert cells == [Cell("ddpm", 1), Cell("ddpm", 7.5), Cell("ddim", 1), Cell("ddim", 7.5)]


def test_a_run_trained_with_guidance_w_is_also_drawn_at_its_own_scale(make_config: Callable) -> None:
    cells = cells_of(make_config().sample, training_guidance=7.5)
    assert [c.guidance for c in cells if c.sampler == "ddim"] == [1, 7.5, 15]
    assert [c.guidance for c in cells if c.sampler == "ddpm"] == [1, 7.5, 15]
    assert cells[2].label == "DDPM  guidance 15"
    three = cells_of(make_config("sample.samplers=[ddim]").sample, training_guidance=3)
    assert three == [Cell("ddim", 1), Cell("ddim", 7.5), Cell("ddim", 9.8)]
    fixed = make_config("sample.samplers=[ddim]", "sample.guidance=[1,15]").sample
    assert cells_of(fixed, training_guidance=7.5) == [Cell("ddim", 1), Cell("ddim", 15)]


def test_draw_cells_is_sample_with_the_rows_seed_in_every_cell(
    model: BaseModel, make_config: Callable[..., Config]
) -> None:
    config = make_config("sample.seed=40", "sample.num_inference_steps=2").sample
    cells = [Cell("ddpm", 1), Cell("ddim", 7.5)]
    model.unet.train()
    images = draw_cells(model, config, cells, SIDE)
    assert model.unet.training
    model.unet.eval()
    assert images.shape == (2, 2, 3, SIDE, SIDE)
    for c, cell in enumerate(cells):
        expected = sample(model, config.prompts, cell, num_inference_steps=2, seeds=[40, 41], resolution=SIDE)
        assert torch.equal(images[:, c], expected)


def test_images_are_rounded_to_the_nearest_8_bit_level() -> None:
    levels = torch.tensor([0, 1, 127, 128, 254, 255])
    shifted = ((levels + torch.tensor([0.4, -0.4, 0.4, -0.4, 0.4, 0])) / 255).expand(3, 1, 6)
    assert np.array_equal(np.asarray(to_image(shifted)), levels.view(1, 6, 1).expand(1, 6, 3).numpy())


def box(grid: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of everything in exactly this colour, which fills its box."""
    ys, xs = np.nonzero((grid == colour).all(-1))
    left, top, width, height = xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1
    assert len(ys) == width * height, "the colour fills one box and nothing else"
    return int(left), int(top), int(width), int(height)


@pytest.mark.parametrize(("side", "tile"), [(64, 128), (128, 256), (256, 256), (512, 512)])
def test_grid_has_every_image_once_in_its_place(side: int, tile: int) -> None:
    """2 prompts x 2 rows x 3 cells in 12 colours, found again by their colours."""
    prompts, cells = PROMPTS, [Cell("ddpm", 1), Cell("ddim", 1), Cell("ddim", 7.5)]

    def colour(p: int, r: int, c: int) -> tuple[int, int, int]:
        return 60 + 120 * p, 40 + 150 * r, 30 + 80 * c

    rows = [
        (label, torch.tensor([[colour(p, r, c) for c in range(3)] for p in range(2)]).float() / 255)
        for r, label in enumerate(("base", "adapter"))
    ]
    rows = [(label, colours[..., None, None].expand(-1, -1, -1, side, side)) for label, colours in rows]
    grid = np.asarray(compose_grid(rows, prompts, [cell.label for cell in cells], "title"))
    boxes = {(p, r, c): box(grid, colour(p, r, c)) for p in range(2) for r in range(2) for c in range(3)}
    assert {size[2:] for size in boxes.values()} == {(tile, tile)}
    gap = 6
    for (p, r, c), (left, top, _, _) in boxes.items():
        assert left == boxes[0, 0, 0][0] + c * (tile + gap)
        assert top == boxes[p, 0, 0][1] + r * (tile + gap)
    last_row, below = boxes[0, 1, 0][1] + tile, boxes[1, 0, 0][1]
    assert 20 <= below - last_row <= 60  # room for the second prompt's line
    left, top = boxes[0, 0, 0][:2]
    assert left >= 100  # room for the rows' labels
    assert grid.shape[1] == left + 3 * (tile + gap) + gap
    assert grid.shape[0] == boxes[1, 1, 2][1] + tile + 2 * gap
    for name, strip in (("title and cells", grid[:top]), ("rows", grid[top:, :left])):
        assert (strip != 255).any(), f"no label at {name}"
