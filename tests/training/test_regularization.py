"""data.regularization: images of what is to be kept, as in DreamBooth and in kohya's scripts."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import SMALL
from PIL import Image

import train
from ghibli.config.paths import check_paths
from ghibli.config.schema import Config
from ghibli.data import datamodule
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.dataset import EncodedImages, EpochPlan, TrainExamples
from ghibli.data.latents import Moments
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, PRETRAIN_SEEDS, write_folder
from ghibli.evaluation.diagnosis import Finding
from ghibli.models.load import load
from ghibli.prepare import preflight
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_rows
from ghibli.training.module import GhibliModule


def checked(words: tuple[str, ...]) -> Finding:
    """Return what `ghibli check` says of data.regularization."""
    (found,) = [one for one in preflight.check([*SMALL, *words]) if one.name == "regularization"]
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    write_folder(root, "photo", 5, PRETRAIN_SEEDS.start)
    return root


def encoded(count: int, shape: tuple[int, ...], regularization: EncodedImages | None = None) -> EncodedImages:
    """Images whose latents are their number, without spread."""
    means = [torch.full(shape, float(i)) for i in range(count)]
    moments = Moments(torch.stack(means), torch.full((count, *shape), -60.0))
    ids = torch.arange(count)[:, None].expand(-1, 3) + 1
    names, empty = [str(i) for i in range(count)], torch.zeros(3, dtype=torch.long)
    sizes = [(64, 64)] * count
    return EncodedImages(names, moments, None, ids, empty, sizes, 1.0, regularization=regularization)


def test_they_take_turns_beside_the_examples(make_config: Callable[..., Config]) -> None:
    """Each as often as any other, with its own caption and noise; the examples stay as they are."""
    loss, plan = make_config("loss.caption_dropout=0").loss, EpochPlan(8, 2, 1000)
    plain = TrainExamples(encoded(8, (4, 8, 8)), plan, loss, seed=3)
    examples = TrainExamples(encoded(8, (4, 8, 8), encoded(5, (4, 8, 8))), plan, loss, seed=3)
    seen = []
    for example in range(20):
        with_it, without = examples[example], plain[example]
        assert all(with_it[name] == without[name] for name in ("example", "name"))
        tensors = ("latents", "noise", "timesteps", "input_ids")
        assert all(torch.equal(with_it[name], without[name]) for name in tensors)
        image = round(with_it["regularization_latents"].mean().item())
        assert with_it["regularization_ids"].tolist() == [image + 1] * 3
        assert not torch.equal(with_it["regularization_noise"], with_it["noise"])
        seen.append(image)
    assert [seen.count(image) for image in range(5)] == [4] * 5 and seen[:5] != [0, 1, 2, 3, 4]
    dropped = make_config("loss.caption_dropout=1").loss
    first = TrainExamples(encoded(8, (4, 8, 8), encoded(5, (4, 8, 8))), plan, dropped, seed=3)[0]
    assert first["regularization_ids"].tolist() == [0, 0, 0]


def test_shared_memory_is_asked_for_both_images(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least what an example's tensors have, twice that of an image alone."""
    asked: list[int] = []
    monkeypatch.setattr(datamodule, "check_shared_memory", lambda workers, size: asked.append(size))
    config = make_config(
        "model.resolution=512", "data.workers=2", "data.batch_size=3", f"data.regularization={tmp_path}"
    )
    data = GhibliDataModule(config, None, RunDir(tmp_path), 1000)
    data.shapes = [(512, 512)]
    data.check_workers()
    images = encoded(8, (4, 64, 64), encoded(5, (4, 64, 64)))
    example = TrainExamples(images, EpochPlan(8, 2, 1000), config.loss, seed=3)
    tensors = [value for value in example[0].values() if isinstance(value, torch.Tensor)]
    needed = 3 * sum(tensor.nbytes for tensor in tensors)
    assert needed <= asked[0] < 1.1 * needed


def test_kohyas_repeats_and_the_offset_of_the_noise_count_there_too(
    make_config: Callable[..., Config],
) -> None:
    """Three turns of seven for an image of 3_dog/; the offset is one number a channel, 0.1 wide."""
    plan, plain = EpochPlan(8, 2, 1000), make_config().loss
    beside = replace(encoded(5, (4, 8, 8)), repeats=[1, 3, 1, 1, 1])
    images = encoded(8, (4, 8, 8), beside)
    examples = TrainExamples(images, plan, plain, seed=3)
    moved = TrainExamples(images, plan, replace(plain, noise_offset=0.1), seed=3)
    seen, offsets = [], []
    for example in range(70):
        one, other = examples[example], moved[example]
        seen.append(round(one["regularization_latents"].mean().item()))
        parts = other["regularization_noise"] - one["regularization_noise"]
        assert torch.allclose(parts, parts[:, :1, :1].expand_as(parts), atol=1e-5)
        offsets.append(parts[:, 0, 0])
        assert not torch.allclose(parts, other["noise"] - one["noise"])
    assert [seen.count(image) for image in range(5)] == [10, 30, 10, 10, 10]
    assert torch.stack(offsets).std().item() == pytest.approx(0.1, rel=0.15)


def test_repeats_are_read_from_kohyas_folders(
    make_config: Callable[..., Config], photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "kohya"
    for folder, file in zip(("3_dog", "1_cat"), sorted((photos / "images").iterdir())[:2], strict=True):
        (root / folder).mkdir(parents=True)
        shutil.copy(file, root / folder / "it.png")
    config = make_config(f"data.regularization={root}", "data.caption=a photo")
    data = GhibliDataModule(config, load("demo"), RunDir(tmp_path / "run"), 1000)
    data.read()
    data.trainer = SimpleNamespace(is_global_zero=True)
    caplog.set_level("INFO")
    found = data._encode_regularization(data.read_regularization(), torch.device("cpu"))
    assert [found.names[row] for row in found.rows] == ["1_cat/it.png", *["3_dog/it.png"] * 3]
    assert "data.regularization: 3_dog/ (1 image, each 3 times in an epoch)" in caplog.text


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_loss_is_dreambooths(make_config: Callable[..., Config], photos: Path, guidance: float) -> None:
    """Instance loss + weight x prior loss, as in diffusers' examples/dreambooth/train_dreambooth.py."""
    words = (f"data.regularization={photos}", "loss.regularization=0.7", f"loss.guidance={guidance}")
    module = GhibliModule(make_config(*words, "lora.dropout=0"), load("demo"), base_hash="tested")
    module.probe.expected = torch.ones(module.num_train_timesteps)
    draws = torch.Generator().manual_seed(0)
    latents, noise, others, other_noise = torch.randn(4, 2, 4, 8, 8, generator=draws)
    base, timesteps = module.base, torch.tensor([100, 800])
    ids = {name: base.tokenize([name] * 2) for name in ("a red train", "a lake")}
    batch = {
        "latents": latents, "noise": noise, "timesteps": timesteps, "input_ids": ids["a red train"],
        "regularization_latents": others, "regularization_noise": other_noise,
        "regularization_ids": ids["a lake"], "example": [0, 1], "name": ["a", "b"],
    }  # fmt: skip
    found = module.training_step(batch, 0)

    def prediction(clean: torch.Tensor, added: torch.Tensor, caption: str) -> torch.Tensor:
        abar = module.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * added
        cond, uncond = (
            base.unet(noisy, timesteps, base.encode_prompts(base.tokenize([text] * 2)), return_dict=False)[0]
            for text in (caption, "")
        )
        return uncond + guidance * (cond - uncond)

    prior = F.mse_loss(prediction(others, other_noise, "a lake"), other_noise)
    wanted = F.mse_loss(prediction(latents, noise, "a red train"), noise) + 0.7 * prior
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["train/regularization"].item() == pytest.approx(prior.item(), rel=1e-5)


def test_a_run_has_its_column_and_knows_its_images_again(
    make_config: Callable[..., Config], photos: Path, tmp_path: Path
) -> None:
    """Beside images of other shapes too; another folder at the same place is refused."""
    words = (
        f"data.regularization={photos}", "data.resize=bucket", "lora.text_encoder=false",
        "trainer.max_epochs=1", "data.batch_size=4",
    )  # fmt: skip
    run = RunDir(tmp_path / "run")
    train.run(make_config(*words), run)
    assert all(float(row["train/regularization"]) > 0 for row in read_rows(run.metrics))
    (photos / "captions.txt").write_text((photos / "captions.txt").read_text().replace("|", "|really "))
    with pytest.raises(UserError, match="the image set data.regularization=.* is not the same"):
        train.run(make_config(*words, "trainer.max_epochs=2"), run, resumes=True)


def test_held_out_images_are_not_trained_beside(
    make_config: Callable[..., Config], photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by their content; one that was saved anew is named."""
    root = tmp_path / "set"
    write_folder(root, "drawn", 8, FINETUNE_SEEDS.start)
    words = (f"data.root={root}", "data.draw=null", f"data.regularization={photos}", "trainer.max_epochs=1")
    config = make_config(*words, "data.batch_size=2", "data.accumulate=1", "lora.text_encoder=false")
    data = GhibliDataModule(config, None, RunDir(tmp_path / "run"), 1000)
    data.read()
    (held_out, *_) = data.held_out
    copy = photos / "images" / "copy.png"
    shutil.copy(held_out.path, copy)
    with (photos / "captions.txt").open("a") as file:
        file.write("copy.png|a copy\n")
    with pytest.raises(UserError, match=r"^data.regularization=.*: 1 of its 6 images are held .*copy.png"):
        train.run(config, RunDir(tmp_path / "one"))
    assert (found := checked(words)).level == "error" and "1 of its 6 images are held out" in found.text
    with Image.open(copy) as image:
        image.copy().save(copy, compress_level=1)
    train.run(config, RunDir(tmp_path / "two"))
    said = f"near-duplicates of held-out images: copy.png of {held_out.path.name}"
    assert said in caplog.text


def test_images_that_are_skipped_are_named(
    make_config: Callable[..., Config],
    images: Path,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By `ghibli check`, and once by the run."""
    words = (f"data.root={images}", "data.draw=null", f"data.regularization={photos}")
    assert checked(words).text.endswith("photos: 5 usable images")
    broken = sorted((photos / "images").iterdir())[0]
    broken.write_bytes(b"no image")
    found = checked(words)
    assert found.level == "warning" and f"4 usable images; 1 skipped: {broken.name} (" in found.text
    config = make_config(f"data.regularization={photos}")
    data = GhibliDataModule(config, load("demo"), RunDir(tmp_path / "run"), 1000)
    data.trainer = SimpleNamespace(is_global_zero=True)
    data._encode_regularization(data.read_regularization(), torch.device("cpu"))
    assert caplog.text.count(f"data.regularization: 1 skipped: {broken.name} (") == 1


def test_a_folder_that_is_not_there_is_named(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.regularization=.*nowhere.* no such folder"):
        check_paths(make_config(f"data.regularization={tmp_path / 'nowhere'}"))
