"""The second pass, sizes that the UNet cannot halve thrice, the VAE in tiles, and the look at the memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from ghibli.config.paths import DEMO
from ghibli.images.grid import to_image
from ghibli.inference import fit, generate
from ghibli.inference.generate import generate_images, write_images
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ImageRequest
from ghibli.models import base as base_module
from ghibli.models.cost import FRAGMENTS, Live
from ghibli.runtime.errors import UserError

REQUEST = ImageRequest(["a red train", "a lake"], "ddim", 3.0, 4, 7, (64, 64), batch=2)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model([], ["model=demo"])


def test_any_multiple_of_8_is_diffusers_own(demo: LoadedModel) -> None:
    """Also where a side of the latents is odd at one of the UNet's resolutions."""
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(demo.base.scheduler_config)
    request = replace(REQUEST, prompts=["a red train"], size=(72, 88))
    theirs = pipeline(
        "a red train", height=88, width=72, num_inference_steps=4, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7), output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(generate_images(demo, request), theirs, rtol=0, atol=1e-4)


def test_the_second_pass_is_diffusers_image_to_image(demo: LoadedModel, tmp_path: Path) -> None:
    """Of each image of the first pass, enlarged, with its own prompt and seed."""
    request = replace(REQUEST, hires=1.5, hires_strength=0.5)
    assert request.final_size == (96, 96)
    small = generate_images(demo, REQUEST)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(DEMO, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(demo.base.scheduler_config)
    ours = generate_images(demo, request)
    assert ours.shape == (2, 3, 96, 96)
    for i, prompt in enumerate(REQUEST.prompts):
        theirs = pipeline(
            prompt, image=to_image(small[i]).resize((96, 96), Image.Resampling.LANCZOS), strength=0.5,
            guidance_scale=3.0, num_inference_steps=4, generator=torch.Generator().manual_seed(7 + i),
            output_type="pt",
        ).images[0]  # fmt: skip
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-4)
    alone = generate_images(demo, replace(request, prompts=["a lake"], seed=8, batch=1))[0]
    torch.testing.assert_close(alone, ours[1], rtol=0, atol=0.02)  # the enlarged image has 8 bits
    file = write_images(ours, request, demo, tmp_path)[0]
    with Image.open(file) as opened:
        assert opened.size == (96, 96)
        assert "Denoising strength: 0.5, Hires upscale: 1.5" in opened.text["parameters"]
        assert json.loads(opened.text["ghibli"])["hires"] == 1.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hires": 0.5}, "--hires 0.5 is out of range: from 1"),
        ({"hires": 3.0, "size": (2048, 64)}, "--hires 3 of 2048x64 px: a side of more than 4096 px"),
        ({"hires": 2.0, "hires_strength": 0.1}, "--hires-strength 0.1 of 4 steps is less than one"),
        ({"hires": 2.0, "hires_strength": 1.5}, "--hires-strength 1.5 is out of range"),
    ],
)
def test_what_the_second_pass_cannot_do_is_one_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(REQUEST, **change)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


@torch.inference_mode()
def test_a_large_image_is_decoded_in_diffusers_tiles(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's VAE has tiles of 128 px of its own, as here; a small image is decoded whole."""
    base, vae = demo.base, demo.base.vae
    latents = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(1))
    whole = base.decode(latents)
    monkeypatch.setattr(base_module, "WHOLE", 128 * 128)
    monkeypatch.setattr(base_module, "TILE", 128)
    tiled = base.decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 192, 320)
    vae.enable_tiling()
    theirs = vae.decode(latents / vae.config.scaling_factor).sample
    vae.disable_tiling()
    assert torch.equal(tiled, (theirs / 2 + 0.5).clamp(0, 1))
    assert 0 < (tiled - whole).abs().mean() < 0.05
    assert torch.equal(base.decode(latents[..., :16, :16]), vae_whole(demo, latents[..., :16, :16]))


def vae_whole(model: LoadedModel, latents: torch.Tensor) -> torch.Tensor:
    """Decode in one piece."""
    vae = model.base.vae
    assert not vae.use_tiling
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def test_the_estimate_is_what_a_step_takes(demo: LoadedModel) -> None:
    """Measured at 64 px, compared with the peak of live tensors at 192 x 192 px, two examples at once."""
    base = demo.base
    with Live() as live:
        base.unet(torch.zeros(2, 4, 24, 24), torch.zeros(2).long(), torch.zeros(2, 77, 64))
    denoise = live.peak
    with Live() as live:
        base.decode(torch.zeros(1, 4, 24, 24))
    expected = max(denoise, live.peak)
    assert fit.bytes_needed(base, 192 * 192, 2) / FRAGMENTS == pytest.approx(expected, rel=0.15)


def test_a_size_that_does_not_fit_is_one_line(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step; the second pass is looked at too."""
    monkeypatch.setattr(fit, "free_memory", lambda device: 10**8)
    monkeypatch.setattr(generate, "sample", lambda *args, **options: pytest.fail("it was drawn"))
    with pytest.raises(UserError, match=r"^not enough memory: 2 images of 1024x1024 px take about .* 0.1 GB"):
        generate_images(demo, replace(REQUEST, size=(1024, 1024)))
    with pytest.raises(UserError, match=r"^not enough memory: 2048x1024 px take .*--hires\)$"):
        generate_images(demo, replace(REQUEST, size=(1024, 512), hires=2.0, prompts=["x"]))


def test_a_large_image_is_drawn(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles, here of 64 px, with the second pass encoded in tiles too."""
    monkeypatch.setattr(base_module, "WHOLE", 96 * 96)
    monkeypatch.setattr(base_module, "TILE", 64)
    image = generate_images(demo, replace(REQUEST, prompts=["a lake"], hires=2.0))[0]
    assert image.shape == (3, 128, 128) and image.std() > 0.05
    assert np.isfinite(image.numpy()).all() and not demo.base.vae.use_tiling
