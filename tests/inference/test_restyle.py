"""Photos in the trained style: which are found, what is kept of them, what is written."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.config.paths import DEMO
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.diffusion.samplers import predictor
from ghibli.images import grid
from ghibli.images.grid import to_image
from ghibli.inference import restyle
from ghibli.inference.img2img import covered, kept_outside, to_latents
from ghibli.inference.inversion import invert, walked
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.photos import Photo, find_photos, with_masks
from ghibli.inference.request import RestyleOptions, unused_negative
from ghibli.inference.restyle import restyle_all, size_like
from ghibli.runtime.errors import UserError

OPTIONS = RestyleOptions(0.5, "ddim", 3.0, 4, 1, "", 1.0, 64)


@pytest.fixture(scope="module")
def base_alone() -> LoadedModel:
    return load_model([], ["model=demo", "data=demo"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photo-like scenes with captions."""
    folder = tmp_path / "photos"
    write_folder(folder, "photo", 2, FINETUNE_SEEDS.start)
    return folder


# Which photos, and their prompts


def test_prompts_of_photos(photos: Path) -> None:
    table = dict(line.split("|") for line in (photos / "captions.txt").read_text().splitlines())
    found = find_photos([photos], None, ", drawn")
    assert [(photo.path.name, photo.prompt) for photo in found] == [
        (name, f"{caption}, drawn") for name, caption in sorted(table.items())
    ]
    one = found[0].path
    assert find_photos([one], "a dog", "") == [Photo(one, "a dog")]
    alone = photos.parent / "alone.png"
    alone.write_bytes(one.read_bytes())
    with pytest.raises(
        UserError, match=r"alone.png has no caption: give --prompt TEXT, or run `ghibli caption"
    ):
        find_photos([alone], None, "")
    alone.with_suffix(".txt").write_text("a cat\n")
    assert find_photos([alone], None, ", drawn") == [Photo(alone, "a cat, drawn")]


def test_a_prompt_for_all_needs_no_caption_table(photos: Path, capsys: pytest.CaptureFixture) -> None:
    """A captions.txt of something else is named and left alone; without a prompt it is an error."""
    (photos / "captions.txt").write_text("00:01 --> 00:02 Hello\n")
    names = sorted(file.name for file in (photos / "images").iterdir())
    with pytest.raises(UserError, match=r"captions.txt"):
        find_photos([photos], None, "")
    capsys.readouterr()
    found = find_photos([photos], "a dog", ", drawn")
    assert [(photo.path.name, photo.prompt) for photo in found] == [(n, "a dog, drawn") for n in names]
    said = " ".join(capsys.readouterr().out.split())
    assert "the captions there are not used: " in said and "captions.txt" in said


def test_files_that_are_not_photos(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.doc").write_text("x")
    for path, words in (
        ("empty", "no images there: name files, or a folder that holds some"),
        ("nowhere", "no such file or folder"),
        ("notes.doc", "notes.doc is not an image"),
    ):
        with pytest.raises(UserError, match=words):
            find_photos([tmp_path / path], "a cat", "")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 3000), (592, 440)),
        ((3000, 4000), (440, 592)),
        ((512, 512), (512, 512)),
        ((9000, 100), (5760, 64)),
        ((3000, 200), (1984, 136)),
    ],
)
def test_shape_and_area_are_kept(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_like(size, 512) == expected


def test_strength_of_no_step() -> None:
    with pytest.raises(UserError, match=r"--strength 0.2 of 4 steps is less than one: raise either"):
        RestyleOptions(0.2, "ddim", 1.0, 4, 0, "", 1.0, 64)
    with pytest.raises(UserError, match="--steps 1001 is out of range: from 1 to 1000"):
        RestyleOptions(1.0, "ddim", 1.0, 1001, 0, "", 1.0, 64)
    with pytest.raises(UserError, match="--sampler eulr is unknown"):
        RestyleOptions(0.5, "eulr", 1.0, 4, 0, "", 1.0, 64)


# The images


def test_it_is_the_librarys_own_image_to_image(base_alone: LoadedModel, photos: Path) -> None:
    photo = find_photos([photos], None, "")[0]
    with Image.open(photo.path) as opened:
        small = opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(DEMO, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs = pipeline(
        photo.prompt, image=small, strength=0.5, guidance_scale=3.0, num_inference_steps=4,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    ours = restyle.restyle_photo(base_alone, small, photo.prompt, OPTIONS)
    assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max() <= 1


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_guidance_below_1_is_the_formula(base_alone: LoadedModel, photos: Path, guidance: float) -> None:
    """The library's own pipeline takes every guidance up to 1 for 1; here it is a loop around its DDIM."""
    with Image.open(find_photos([photos], "x", "")[0].path) as opened:
        small = opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    base, options = base_alone.base, RestyleOptions(0.5, "ddim", guidance, 10, 1, "", 1.0, 64)
    scheduler = DDIMScheduler.from_config(
        base.scheduler_config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.inference_mode():
        posterior = base.vae.encode(pixels).latent_dist
        latents = posterior.sample(generator) * base.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        latents = scheduler.add_noise(latents, noise, scheduler.timesteps[5:6])
        cond, uncond = (base.encode_prompts(base.tokenize([text])) for text in ("a lake", ""))
        for t in scheduler.timesteps[5:]:
            a, b = (base.unet(latents, t[None], embeds).sample for embeds in (uncond, cond))
            latents = scheduler.step(a + guidance * (b - a), t, latents).prev_sample
        theirs = base.decode(latents)[0].permute(1, 2, 0).numpy() * 255
    ours = restyle.restyle_photo(base_alone, small, "a lake", options)
    assert np.abs(np.asarray(ours, float) - theirs).max() <= 1.5
    plain = restyle.restyle_photo(base_alone, small, "a lake", replace(options, guidance=1.0))
    assert np.abs(np.asarray(ours, float) - np.asarray(plain, float)).max() > 3


@pytest.mark.parametrize("steps", [334, 400, 501, 1000])
def test_strength_is_a_share_of_all_noise_levels(
    base_alone: LoadedModel, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Half of the steps begin at half of the timesteps, for every number of steps."""
    seen: list[int] = []

    def unet(latents: torch.Tensor, t: torch.Tensor, **options: object) -> tuple[torch.Tensor]:
        seen.append(int(t))
        return (latents,)

    monkeypatch.setattr(base_alone.base.unet, "forward", unet)
    options = RestyleOptions(0.5, "ddim", 1.0, steps, 0, "", 1.0, 64)
    restyle.restyle_photo(base_alone, Image.new("RGB", (64, 64), "grey"), "x", options)
    assert len(seen) == steps // 2 and abs(seen[0] - 500) <= 3 and min(seen) >= 0


def test_a_negative_prompt_of_any_length_is_used(base_alone: LoadedModel) -> None:
    """Words beyond the 75th token, which the library's own pipeline drops with a warning."""
    photo = Image.new("RGB", (64, 64), "grey")
    drawn = [
        grey(restyle.restyle_photo(base_alone, photo, "a lake", replace(OPTIONS, negative=negative)))
        for negative in ("fog, " * 60, "fog, " * 60 + "blue house")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 1


@pytest.mark.parametrize("command", ["generate", "restyle"])
def test_the_commands_say_that_a_negative_prompt_is_not_used(
    command: str, photos: Path, tmp_path: Path
) -> None:
    words = ["generate", "--prompt", "a lake", "--size", "64", "model=demo"]
    if command == "restyle":
        words = ["restyle", str(photos), "--prompt", "a lake", "--with", "model=demo"]
    words += ["--negative", "fog", "--guidance", "1", "--steps", "2", "--to", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "the negative prompt is not used: at guidance 1" in " ".join(result.output.split())


def test_a_negative_prompt_that_is_not_used_is_named() -> None:
    assert unused_negative("fog", 7.5) == unused_negative(" ", 1) == []
    (said,) = unused_negative("fog", 1)
    assert said.startswith("the negative prompt is not used: at guidance 1")


def test_a_stored_caption_is_no_prompt_with_weights(photos: Path) -> None:
    """What was typed is; the style is a caption's end."""
    (photos / "captions.txt").write_text(
        "".join(f"{path.name}|a dog (a pug:1.3\n" for path in (photos / "images").iterdir())
    )
    found = find_photos([photos], None, ", drawn (1984)")
    assert {photo.prompt for photo in found} == {r"a dog \(a pug:1.3, drawn \(1984\)"}
    found = find_photos([photos], "a (dog:1.3)", ", drawn")
    assert {photo.prompt for photo in found} == {"a (dog:1.3), drawn"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("strength", math.nan), ("guidance", math.nan), ("guidance", -1.0), ("scale", math.inf)],
)
def test_options_are_finite(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^--{name} "):
        replace(OPTIONS, **{name: value})


def test_no_file_of_the_user_is_replaced(base_alone: LoadedModel, photos: Path) -> None:
    """The next free name is taken, for an image and for the sheet; a long name and its temporary one fit."""
    folder = photos / "images"
    photo = sorted(folder.glob("*.png"))[0]
    long = folder / f"{'ä' * 125}.jpeg"  # 255 bytes, and .png makes it 254
    Image.open(photo).save(long)
    mine = folder / f"{'ä' * 125}.png"
    for file in (mine, folder / "before_after.png"):
        file.write_bytes(b"mine")
    words = [str(long), "--with", "model=demo", "--prompt", "x", "--steps", "2", "--to", str(folder)]
    result = CliRunner().invoke(app, ["restyle", *words])
    assert result.exit_code == 0, result.output
    assert mine.read_bytes() == (folder / "before_after.png").read_bytes() == b"mine"
    assert (folder / f"{'ä' * 124}-2.png").is_file() and (folder / "before_after-2.png").is_file()
    assert "before_after-2.png" in result.output.replace("\n", "")


def test_long_prompts_and_their_style_are_drawn(photos: Path, tmp_path: Path) -> None:
    """Nothing is cut: another word beyond the 75th token makes another image, and nothing is said."""
    seen = {}
    for word in ("", "lake "):
        out = tmp_path / f"out {word}"
        prompt = "train " * 100 + word
        words = ["--with", "model=demo", "--with", "data=demo", "--prompt", prompt, "--steps", "2"]
        result = CliRunner().invoke(
            app, ["restyle", str(photos), *words, "--to", str(out), "--negative", "fog"]
        )
        assert result.exit_code == 0 and "too long" not in result.output, result.output
        with Image.open(next(iter(sorted(out.glob("[!b]*.png"))))) as opened:
            note = json.loads(opened.text["ghibli"], parse_constant=pytest.fail)
            seen[word] = np.asarray(opened, int)
        assert note["prompt"] == prompt + ", Studio Ghibli style"
    assert np.abs(seen[""] - seen["lake "]).max() > 3


# Other ways, and masks


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), float)


@pytest.mark.parametrize(("steps", "clean"), [(10, False), (30, False), (10, True)])
def test_inversion_is_diffusers_ddim_backwards(base_alone: LoadedModel, steps: int, clean: bool) -> None:
    """Its scheduler steps T // steps, so the comparison is at numbers that leave the strides equal.

    What the base's scheduler file leaves out is SD 1.5's; `clean` begins below the first noise level.
    """
    base = replace(base_alone.base, scheduler_config={"set_alpha_to_one": clean})
    options = RestyleOptions(0.3, "ddim", 1.0, steps, 0, "", 1.0, 64, "inversion")
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5
    scheduler = DDIMInverseScheduler.from_config(
        base_alone.base.scheduler_config, clip_sample=False, set_alpha_to_one=clean, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    expected = start
    with torch.inference_mode():
        embeds = base.encode_captions(["a lake"])
        count = int(steps * 0.3)
        for t in scheduler.timesteps[:count]:
            expected = scheduler.step(base.unet(expected, t[None], embeds).sample, t, expected).prev_sample
        found = invert(base, start, options, predictor(base, embeds, None, 1.0))
    assert walked(base, options)[1].flip(0).tolist() == scheduler.timesteps[:count].tolist()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_each_step_ends_where_the_next_one_starts(base_alone: LoadedModel) -> None:
    """With unequal strides (400 steps, `trailing`) too: Song et al. 2021, equation 13, in float64."""
    options = RestyleOptions(0.012, "ddim", 1.0, 400, 0, "", 1.0, 64, "inversion")
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler, timesteps = walked(base_alone.base, options)
    strides = timesteps.flip(0).diff()
    assert len(timesteps) == 4 and len(strides.unique()) > 1
    alphas, before, expected = scheduler.alphas_cumprod.double(), 0, start.double()
    for t in timesteps.flip(0).tolist():
        noise, low, high = (expected * t / 1000).sin(), alphas[before], alphas[t]
        clean = (expected - (1 - low).sqrt() * noise) / low.sqrt()
        expected, before = high.sqrt() * clean + (1 - high).sqrt() * noise, t
    found = invert(base_alone.base, start, options, lambda latents, t: (latents * t / 1000).sin())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_photo_comes_back_from_its_own_noise(base_alone: LoadedModel, photos: Path) -> None:
    """With the base that inverted it and no guidance; image-to-image is much farther away."""
    photo = find_photos([photos], None, "")[0]
    with Image.open(photo.path) as opened:
        small = opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    options = RestyleOptions(0.5, "ddim", 1.0, 50, 1, "", 1.0, 64, "inversion")
    with torch.inference_mode():
        coded = to_image(base_alone.base.decode(to_latents(base_alone.base, small))[0])
    calls: list[int] = []
    back = restyle.restyle_photo(base_alone, small, photo.prompt, options, lambda: calls.append(1))
    assert len(calls) == 50  # half of the steps, in both directions
    other = restyle.restyle_photo(base_alone, small, photo.prompt, replace(options, way="img2img"))
    near, far = (np.abs(grey(image) - grey(coded)).mean() for image in (back, other))
    assert near < 5 and near < far / 2


def test_outside_a_mask_the_photo_stays(base_alone: LoadedModel, photos: Path) -> None:
    """And inside it is redrawn; a black mask leaves the photo, a white one is image-to-image."""
    photo = find_photos([photos], None, "")[0]
    with Image.open(photo.path) as opened:
        small = opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    half = Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 64, 0).astype(np.uint8))
    for way in ("img2img", "inversion"):
        options = replace(OPTIONS, way=way, strength=0.75)
        drawn = grey(restyle.restyle_photo(base_alone, small, photo.prompt, options, mask=half))
        change = np.abs(drawn - grey(small)).mean((0, 2))
        assert change[:28].max() <= 1 < 5 < change[36:].mean()
        black = restyle.restyle_photo(base_alone, small, "x", options, mask=Image.new("L", (64, 64)))
        assert np.abs(grey(black) - grey(small)).max() <= 1
    options = replace(OPTIONS, strength=0.75)
    whole = restyle.restyle_photo(base_alone, small, "x", options, mask=Image.new("L", (64, 64), 255))
    plain = restyle.restyle_photo(base_alone, small, "x", options)
    assert np.abs(grey(whole) - grey(plain)).max() <= 1


def test_all_that_is_mixed_in_was_redrawn() -> None:
    """Down to the last trace of a soft edge; else a rim of what was not redrawn would be mixed in."""
    mask = Image.new("L", (50, 40))
    mask.paste(255, (20, 10, 35, 30))
    redrawn = covered(mask, (128, 96))
    mixed = kept_outside(Image.new("RGB", (128, 96)), torch.ones(3, 96, 128), mask)[0] > 0
    assert set(np.array(redrawn).flat) == {0, 255} and redrawn.size == (128, 96)
    assert np.array_equal(np.array(redrawn) == 255, mixed.numpy())
    assert mixed.sum() > 1.1 * 128 * 96 * 15 * 20 / (50 * 40)  # wider than what is white


def test_masks_belong_to_their_photos(photos: Path, tmp_path: Path) -> None:
    found = find_photos([photos], "x", "")
    size = Image.open(found[0].path).size
    folder = tmp_path / "masks"
    folder.mkdir()
    for photo in found:
        Image.new("L", size, 255).save(folder / f"{photo.path.stem}.png")
    masked = with_masks(found, folder)
    assert [photo.mask and photo.mask.stem for photo in masked] == [photo.path.stem for photo in found]
    assert with_masks(found, None) == found
    Image.new("L", (10, 20)).save(folder / f"{found[1].path.stem}.png")
    with pytest.raises(UserError, match=rf"^--mask .* has 10x20 px and .* {size[0]}x{size[1]}: a mask has"):
        with_masks(found, folder)
    (folder / f"{found[0].path.stem}.png").unlink()
    with pytest.raises(UserError, match=r"^--mask .*: no image called .* there"):
        with_masks(found, folder)
    with pytest.raises(UserError, match=r"^--mask "):
        with_masks(found, tmp_path / "nowhere.png")


def test_the_default_way_is_one_that_the_sampler_can_go(photos: Path, tmp_path: Path) -> None:
    """At the strength that docs/restyle.md found for it."""
    for sampler, way, strength in (("DDIM", "inversion", 0.65), ("euler_a", "img2img", 0.5)):
        out = tmp_path / sampler
        words = [str(photos), "--with", "model=demo", "--steps", "2", "--sampler", sampler, "--to", str(out)]
        result = CliRunner().invoke(app, ["restyle", *words])
        assert result.exit_code == 0, result.output
        with Image.open(next(out.glob("scene_*.png"))) as opened:
            found = json.loads(opened.text["ghibli"])
        assert (found["way"], found["strength"]) == (way, strength)


def test_a_way_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^--way twirl is unknown: choose one of img2img, inversion$"):
        replace(OPTIONS, way="twirl")
    with pytest.raises(
        UserError, match=r"^--way inversion walks DDIM backwards: use --sampler ddim, not ddpm"
    ):
        replace(OPTIONS, way="inversion", sampler="ddpm")


def test_the_stronger_the_farther_from_the_photo(base_alone: LoadedModel, photos: Path) -> None:
    photo = find_photos([photos], None, "")[0]
    with Image.open(photo.path) as opened:
        before = opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        options = RestyleOptions(strength, "ddim", 1.0, 10, 1, "", 1.0, 64)
        after = restyle.restyle_photo(base_alone, before, photo.prompt, options)
        distances.append(np.abs(np.asarray(after, float) - np.asarray(before, float)).mean())
    assert distances == sorted(distances) and distances[0] < 25 < distances[2]


def test_a_photo_is_turned_as_its_exif_says(base_alone: LoadedModel, tmp_path: Path) -> None:
    """Its shape and orientation are kept."""
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 60:] = 255  # right half white; turned clockwise it is the lower half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    options = RestyleOptions(0.1, "ddim", 1.0, 10, 0, "", 1.0, 96)
    _, ((before, after),) = restyle_all(
        base_alone, [Photo(tmp_path / "a.jpg", "x")], options, tmp_path / "out"
    )
    assert before.size == after.size == (64, 136)
    for image in (before, after):
        grey = np.asarray(image.convert("L"), float)
        assert grey[-30:].mean() - grey[:30].mean() > 100


def test_photos_that_cannot_be_read_are_skipped(
    base_alone: LoadedModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (photos / "images" / "text.jpg").write_text("no image")
    (photos / "images" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = find_photos([photos], "a scene", ", drawn")
    written, pairs = restyle_all(base_alone, found, OPTIONS, tmp_path / "out")
    assert written == len(pairs) == 2 and len(list((tmp_path / "out").iterdir())) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "text.jpg is skipped: it is not an image, despite its name" in said
    assert "gone.jpg is skipped: " in said
    with Image.open(sorted((tmp_path / "out").iterdir())[0]) as opened:
        note = json.loads(opened.text["ghibli"])
    assert (note["prompt"], note["strength"], note["seed"]) == ("a scene, drawn", 0.5, 1)
    with pytest.raises(UserError, match="none of the photos could be read"):
        restyle_all(base_alone, [p for p in found if p.path.suffix == ".jpg"], OPTIONS, tmp_path / "out")


def test_ctrl_c_keeps_what_is_done(
    base_alone: LoadedModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    plain, calls = restyle.restyle_photo, []

    def restyle_photo(*args: object, **options: object) -> Image.Image:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(restyle, "restyle_photo", restyle_photo)
    found = find_photos([photos], "a scene", "")
    with pytest.raises(KeyboardInterrupt):
        restyle_all(base_alone, found, OPTIONS, tmp_path / "a (1)")
    assert [file.stem for file in (tmp_path / "a (1)").iterdir()] == [found[0].path.stem]
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 of 2 are done and kept in '{tmp_path / 'a (1)'}'" in said


def test_one_photo_of_a_set(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caption is in the table above images/; with a prompt, no table is read."""
    table = dict(line.split("|") for line in (photos / "captions.txt").read_text().splitlines())
    name = min(table)
    monkeypatch.chdir(photos / "images")
    (photo,) = find_photos([Path(name)], None, "")
    assert photo.prompt == table[name]
    (photos / "images" / "metadata.csv").write_text("price,colour\n1,red\n")
    (photo,) = find_photos([Path(name)], "mine", "")
    assert photo.prompt == "mine"


def test_no_file_is_written_over_another(tmp_path: Path) -> None:
    """Photos with the same name, one named like the sheet, and an output folder that holds the photos."""
    out = tmp_path / "out"

    def names(*photos: str) -> list[str]:
        return [file.name for file in restyle.output_files([tmp_path / photo for photo in photos], out)]

    assert names("a.jpg", "b.png") == ["a.png", "b.png"]
    assert names("a.jpg", "a.png") == ["a.jpg.png", "a.png.png"]
    assert names("before_after.jpg") == ["before_after.jpg.png"]
    assert names("x/a.jpg", "y/a.jpg") == ["0000-a.jpg.png", "0001-a.jpg.png"]
    with pytest.raises(UserError, match="b.png there is one of the photos; name another folder"):
        restyle.output_files([tmp_path / "a.jpg", tmp_path / "b.png"], tmp_path)
    with pytest.raises(UserError, match="before_after.png there is one of the photos"):
        restyle.output_files([tmp_path / "before_after.png"], tmp_path)
    assert names("a.jpg", "A.png") == ["a.jpg.png", "A.png.png"]  # one file on some systems
    assert restyle.output_files([tmp_path / "a.jpg"], tmp_path) == [tmp_path / "a.png"]


def test_the_command(photos: Path, tmp_path: Path) -> None:
    words = ["restyle", str(photos), "--with", "model=demo", "--steps", "2", "--to", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "restyled 2 of 2 into" in " ".join(result.output.split())
    with Image.open(tmp_path / "out" / "before_after.png") as sheet:
        assert sheet.size == (2 * 264 + 8, 26 + 2 * 264 + 8)


def test_the_sheet_shows_both() -> None:
    pairs = [(Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"))] * 8
    page = np.asarray(grid.before_after_sheet(pairs))
    assert page.shape == (2 * 562, 6 * 264 + 8, 3)
    assert tuple(page[26 + 128, 8 + 128]) == (255, 0, 0) and tuple(page[26 + 264 + 128, 8 + 128]) == (
        0,
        0,
        255,
    )
    assert tuple(page[562 + 26 + 128, 3 * 264]) == (255, 255, 255)  # two in the second row


def test_a_strip_keeps_its_shape_or_is_refused() -> None:
    for size in ((3000, 200), (200, 3000), (640, 64), (5000, 100), (333, 1000)):
        for resolution in (64, 128, 512):
            width, height = size_like(size, resolution)
            assert width % 8 == height % 8 == 0 and min(width, height) >= 64
            assert width / height == pytest.approx(size[0] / size[1], rel=0.08)
    with pytest.raises(UserError, match="30000x10 px is too long a strip to redraw whole: crop it"):
        size_like((30000, 10), 512)
