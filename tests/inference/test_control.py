"""ControlNets: against diffusers' own pipelines, and what their input is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    ControlNetModel,
    DDIMInverseScheduler,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.config.paths import DEMO
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.diffusion.samplers import predictor
from ghibli.images.edges import canny
from ghibli.inference.control import Control, depth_estimator, load_control, load_controlnet, unet_of
from ghibli.inference.img2img import covered, redraw, to_latents
from ghibli.inference.inversion import denoise, invert, redraw_inverted
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.photos import Photo, with_control_images
from ghibli.inference.request import ControlOptions, RestyleOptions, control_options
from ghibli.runtime.errors import UserError

OPTIONS = RestyleOptions(0.5, "ddim", 3.0, 4, 1, "", 1.0, 64)
SCENE = compose(EVALUATION_SEEDS.start)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model([], ["model=demo"])


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return draw(SCENE, "photo", 64)


@pytest.fixture(scope="module")
def zero(demo: LoadedModel) -> ControlNetModel:
    """As every training of a ControlNet starts: it adds nothing."""
    torch.manual_seed(0)
    return ControlNetModel.from_unet(demo.base.unet).eval()


@pytest.fixture(scope="module")
def steering(demo: LoadedModel) -> ControlNetModel:
    """With random weights where a training starts with zeros."""
    torch.manual_seed(0)
    found = ControlNetModel.from_unet(demo.base.unet).eval()
    for part in (found.controlnet_down_blocks, found.controlnet_mid_block, found.controlnet_cond_embedding):
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return found


@pytest.fixture
def stored(steering: ControlNetModel, tmp_path: Path) -> str:
    """The same in a folder."""
    steering.save_pretrained(tmp_path / "control")
    return str(tmp_path / "control")


def half_mask() -> Image.Image:
    return Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 64, 0).astype(np.uint8))


# What is drawn


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("way", ["img2img", "mask", "inversion"])
def test_a_zero_control_is_none_bit_for_bit(
    demo: LoadedModel, photo: Image.Image, zero: ControlNetModel, way: str, guidance: float
) -> None:
    options = replace(OPTIONS, guidance=guidance)

    def drawn(control: Control | None) -> torch.Tensor:
        if way == "inversion":
            return redraw_inverted(demo, photo, "a (red:1.3) train", options, control=control)
        mask = half_mask() if way == "mask" else None
        return redraw(demo.base, photo, "a (red:1.3) train", options, mask=mask, control=control)

    assert torch.equal(drawn(Control(zero, canny(photo), 1.0)), drawn(None))


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_diffusers_pipeline(
    demo: LoadedModel, photo: Image.Image, steering: ControlNetModel, masked: bool
) -> None:
    """At another scale than 1, and far from what is drawn without."""
    own = StableDiffusionControlNetInpaintPipeline if masked else StableDiffusionControlNetImg2ImgPipeline
    pipeline = own.from_pretrained(DEMO, controlnet=steering, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(demo.base.scheduler_config)
    mask = half_mask() if masked else None
    inside = {"mask_image": covered(mask, (64, 64)), "height": 64, "width": 64} if mask else {}
    latents = pipeline(
        "a red train", image=photo, control_image=canny(photo), strength=0.5, guidance_scale=3.0,
        num_inference_steps=4, controlnet_conditioning_scale=0.7, output_type="latent",
        generator=torch.Generator().manual_seed(1), **inside,
    ).images  # fmt: skip
    theirs = demo.base.decode(latents)[0]
    control = Control(steering, canny(photo), 0.7)
    ours = redraw(demo.base, photo, "a red train", OPTIONS, mask=mask, control=control)
    changed = slice(40, None) if masked else slice(None)  # outside the mask the photo's pixels are put back
    torch.testing.assert_close(ours[..., changed], theirs[..., changed], rtol=0, atol=1e-4)
    without = redraw(demo.base, photo, "a red train", OPTIONS, mask=mask)
    assert (without - ours).abs().max() > 0.05


@torch.inference_mode()
def test_inversion_is_diffusers_in_both_directions(
    demo: LoadedModel, photo: Image.Image, steering: ControlNetModel
) -> None:
    """Up with its inverse scheduler and its ControlNet, down with its pipeline from the same latents."""
    base, options = demo.base, replace(OPTIONS, steps=10, strength=0.3, way="inversion", guidance=1.0)
    control = Control(steering, canny(photo), 0.7)
    embeds = base.encode_captions(["a lake"])
    predict = predictor(base, embeds, None, 1.0, unet_of(base, control))
    noisy = invert(base, to_latents(base, photo), options, predict)
    scheduler = DDIMInverseScheduler.from_config(
        base.scheduler_config, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    expected = to_latents(base, photo)
    pixels = torch.from_numpy(np.array(canny(photo))).permute(2, 0, 1)[None] / 255
    for t in scheduler.timesteps[:3]:
        down, mid = steering(expected, t, embeds, pixels, 0.7, return_dict=False)
        found = base.unet(
            expected, t, embeds, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        expected = scheduler.step(found, t, expected).prev_sample
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-4)
    pipeline = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        DEMO, controlnet=steering, safety_checker=None
    )
    pipeline.scheduler = DDIMScheduler.from_config(base.scheduler_config)
    theirs = pipeline(
        "a lake", image=photo, control_image=canny(photo), strength=0.3, guidance_scale=1.0, latents=noisy,
        num_inference_steps=10, controlnet_conditioning_scale=0.7, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(denoise(base, noisy, options, predict), theirs, rtol=0, atol=1e-4)


def test_weights_and_long_prompts_are_drawn(
    demo: LoadedModel, photo: Image.Image, steering: ControlNetModel
) -> None:
    control = Control(steering, canny(photo), 1.0)
    drawn = [
        redraw(demo.base, photo, prompt, OPTIONS, control=control)
        for prompt in ("a red train", "a (red:1.5) train", "train " * 100, "train " * 100 + "lake")
    ]
    for one, other in ((0, 1), (2, 3)):
        assert (drawn[one] - drawn[other]).abs().max() > 0.01


def test_the_demos_own_draws_along_the_edges(demo: LoadedModel) -> None:
    """From noise alone, with neither prompt nor photo: the edges of the result fall on those that it saw."""
    found = []
    for scale in (0.0, 1.0):
        shared = 0.0
        for seed in range(2):
            seen = canny(draw(compose(EVALUATION_SEEDS.start + seed), "photo"))
            control = Control(load_controlnet("demo/control", demo.base), seen, scale)
            options = RestyleOptions(1.0, "ddim", 1.0, 8, seed, "", 1.0, 128)
            pixels = redraw(demo.base, Image.new("RGB", (128, 128), "grey"), "", options, control=control)
            grey = pixels.mean(0)
            steep = (grey[1:, 1:] - grey[:-1, 1:]).abs() + (grey[1:, 1:] - grey[1:, :-1]).abs()
            on = torch.from_numpy(np.array(seen.convert("L")))[1:, 1:] > 0
            shared += (steep[on].mean() / steep[~on].mean()).item() / 2
        found.append(shared)
    assert found[1] > 2 * found[0]


# What it sees


def test_edges_of_the_photo_in_the_results_size(demo: LoadedModel, stored: str) -> None:
    control_of = load_control(ControlOptions("canny", stored, 0.5), demo.base)(None)
    photo = draw(SCENE, "photo", 96)
    control = control_of(photo)
    assert control.scale == 0.5 and control.image.size == (96, 96)
    assert np.array_equal(np.array(control.image), np.array(canny(photo)))
    assert not control.controlnet.training


def test_depth_is_transformers_pipeline(demo: LoadedModel, stored: str, tmp_path: Path) -> None:
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, patch_size=14, image_size=56,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[4, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "depth"
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    transformers.DPTImageProcessor(size=size, ensure_multiple_of=14).save_pretrained(folder)
    photo = draw(SCENE, "photo", 64)
    theirs = transformers.pipeline("depth-estimation", model=str(folder))(photo)["depth"]
    options = ControlOptions("depth", stored, depth_model=str(folder))
    ours = load_control(options, demo.base)(None)(photo).image
    assert ours.mode == "RGB" and np.array_equal(np.array(ours), np.array(theirs.convert("RGB")))
    assert np.ptp(np.array(ours)) == 255


@pytest.fixture
def two(tmp_path: Path) -> list[Photo]:
    """Two photos of 64 x 96 px."""
    found = []
    for name in ("a", "b"):
        draw(SCENE, "photo", 96).crop((0, 0, 64, 96)).save(tmp_path / f"{name}.png")
        found.append(Photo(tmp_path / f"{name}.png", "x"))
    return found


def test_ready_images_belong_to_their_photos(demo: LoadedModel, stored: str, two: list[Photo]) -> None:
    """Of any size in the photo's shape; they are scaled to the result's."""
    folder = two[0].path.parent / "edges"
    folder.mkdir()
    for photo, colour in zip(two, ("white", "grey"), strict=True):
        Image.new("RGB", (32, 48), colour).save(folder / f"{photo.path.stem}.jpg")
    found = with_control_images(two, folder)
    assert [photo.control and photo.control.name for photo in found] == ["a.jpg", "b.jpg"]
    one = load_control(ControlOptions(str(folder), stored), demo.base)(Image.open(folder / "b.jpg"))
    control = one(Image.new("RGB", (64, 96)))
    assert control.image.size == (64, 96) and set(np.array(control.image).flat) == {128}
    assert [photo.control for photo in with_control_images(two, folder / "a.jpg")] == [folder / "a.jpg"] * 2
    Image.new("RGB", (32, 32)).save(folder / "b.jpg")
    with pytest.raises(UserError, match=r"^--control .*b.jpg has 32x32 px and b.png 64x96: a control image"):
        with_control_images(two, folder)
    (folder / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"^--control .*: no image called b there, as "):
        with_control_images(two, folder)
    with pytest.raises(UserError, match=r"^--control .*nowhere: no such file or folder, and not canny"):
        with_control_images(two, folder / "nowhere")


def test_the_command(stored: str, two: list[Photo]) -> None:
    """It draws with the edges, which changes the image; its settings are in the PNG."""
    folder = two[0].path.parent
    words = ["restyle", str(two[0].path), "--with", "model=demo", "--prompt", "a lake", "--steps", "2"]
    control = ["--control", "canny", "--control-model", stored, "--control-scale", "0.8"]
    drawn = []
    for name, more in (("plain", []), ("steered", control)):
        result = CliRunner().invoke(app, [*words, *more, "--to", str(folder / name)])
        assert result.exit_code == 0, result.output
        with Image.open(folder / name / "a.png") as opened:
            note = json.loads(opened.text["ghibli"])
            drawn.append(np.asarray(opened, int))
    assert note["control"]["source"] == "canny" and note["control"]["scale"] == 0.8
    assert np.abs(drawn[0] - drawn[1]).max() > 10


# What is wrong is one line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("canny", None, None, None), "--control canny needs --control-model: "),
        ((None, "x/y", None, None), "--control-model is used with --control only: "),
        ((None, None, 0.5, None), "--control-scale is used with --control only: "),
        (("canny", "x/y", None, "z"), "--depth-model is used with --control depth only, not with canny"),
        (("canny", "x/y", float("nan"), None), "--control-scale"),
    ],
)
def test_options_that_do_not_fit_together(given: tuple, words: str) -> None:
    with pytest.raises(UserError) as caught:
        control_options(*given)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    assert control_options(None, None, None, None) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"cross_attention_dim": 32},
            "is for another base: its cross_attention_dim is 32, and this base's 64",
        ),
        ({"block_out_channels": (32, 64, 64, 64)}, r"its block_out_channels is \[32, 64, 64, 64\], and"),
        ({"in_channels": 9}, "is for another base: its in_channels is 9, and this base's 4"),
    ],
)
def test_weights_of_another_base(
    demo: LoadedModel, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    config = dict(demo.base.unet.config) | change
    unet = UNet2DConditionModel.from_config(config)
    ControlNetModel.from_unet(unet).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_controlnet(str(tmp_path), demo.base)
    assert str(caught.value).startswith(f"--control-model {tmp_path} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--control-model", "--depth-model"])
@pytest.mark.parametrize("name", ["nowhere/at/all", "nobody/nothing", "demo/vae", "demo/tokenizer"])
def test_no_such_weights(demo: LoadedModel, option: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_controlnet(name, demo.base) if option == "--control-model" else depth_estimator(name)
    assert str(caught.value).startswith(f"{option} {name}: ") and "\n" not in str(caught.value)
