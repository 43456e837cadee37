"""The price: what the base was made for, scored beside held-out images, and what training does to it."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults.compare import different_parts
from helpers.commands import CACHE, GRIDS

import train
from ghibli.config.schema import Config
from ghibli.data.everyday import everyday_captions, measured_captions
from ghibli.demo.scenes.scene import PRICE_SEEDS, compose, draw
from ghibli.diffusion.samplers import NotFinite, sample
from ghibli.images.resize import preprocess
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import read_rows
from ghibli.training import price
from ghibli.training.module import GhibliModule
from ghibli.training.price import CELL, STEPS, price_items


def untouched(config: Config, base: BaseModel) -> Any:
    """What price_items asks of a module, without one."""

    class Here:
        is_global_zero, precision = True, "32-true"
        strategy = SimpleNamespace(broadcast=lambda found: found)
        precision_plugin = SimpleNamespace(forward_context=torch.no_grad)

    return SimpleNamespace(
        config=config, base=base, results_key="untouched", trainer=Here, device=torch.device("cpu"),
        num_train_timesteps=1000,
    )  # fmt: skip


@torch.no_grad()
def test_the_set_is_unseen_photo_like_scenes_in_groups(
    make_config: Callable, base: BaseModel, tmp_path: Path
) -> None:
    """Each item's latents are the scene's own by the VAE, but for the posterior's spread."""
    config = make_config("validation.items_per_image=2", "model.resolution=128", f"cache_dir={tmp_path}")
    images, batches = price_items(untouched(config, base), 3)
    assert [batch["timesteps"].shape for batch in batches] == [(2,), (2,)]
    assert len({image.content_hash for image in images}) == 2
    for group, rows in zip(batches, ([0, 1], [2, 0]), strict=True):
        scenes = [compose(PRICE_SEEDS.start + row) for row in rows]
        assert torch.equal(group["input_ids"], base.tokenize([scene.caption for scene in scenes]))
        assert [int(t) // 500 for t in group["timesteps"]] == [0, 1]
        for latents, scene in zip(group["latents"], scenes, strict=True):
            posterior = base.vae.encode(preprocess(draw(scene, "photo"), 128, "squash")[None]).latent_dist
            apart = latents / base.vae.config.scaling_factor - posterior.mean[0]
            assert (apart / posterior.std[0]).std() == pytest.approx(1, abs=0.1)
    again, more = price_items(untouched(config, base), 3)
    assert again == images and all(
        torch.equal(one[key], other[key]) for one, other in zip(batches, more, strict=True) for key in one
    )
    assert len(list((tmp_path / "price").iterdir())) == 1


@torch.no_grad()
def test_any_other_base_samples_its_own(
    make_config: Callable, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For our everyday captions; the second time they are read."""
    words = ("model.made_for=samples", "validation.items_per_image=1", f"cache_dir={tmp_path}")
    config = make_config(*words)
    monkeypatch.setattr(price, "STEPS", 3)
    _, batches = price_items(untouched(config, base), 2)
    captions = everyday_captions()[:2]
    assert torch.equal(torch.cat([one["input_ids"] for one in batches]), base.tokenize(captions))
    for seed, (caption, batch) in enumerate(zip(captions, batches, strict=True)):
        drawn = sample(base, [caption], CELL, num_inference_steps=3, seeds=[seed], resolution=64)
        posterior = base.vae.encode(2 * drawn.clone() - 1).latent_dist
        apart = batch["latents"] / base.vae.config.scaling_factor - posterior.mean
        assert (apart / posterior.std).std() == pytest.approx(1, abs=0.15)
    monkeypatch.setattr(price, "sample", None)
    assert price_items(untouched(config, base), 2)[0]


def test_a_base_that_samples_no_numbers_has_no_price(
    make_config: Callable, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*words: object, **options: object) -> torch.Tensor:
        raise NotFinite("values that are not finite")

    monkeypatch.setattr(price, "sample", broken)
    config = make_config("model.made_for=samples", f"cache_dir={tmp_path}")
    assert price_items(untouched(config, base), 2) == ([], [])
    assert "no price: values that are not finite" in caplog.text


def test_no_caption_measures_and_holds_alike(make_config: Callable) -> None:
    """Sixty-four of our own, each once: half to measure, half for loss.keep."""
    captions = everyday_captions()
    assert len(set(captions)) == len(captions) == 64 and all(captions)
    assert measured_captions(make_config("model.made_for=samples"), 32) == captions[:32]
    assert STEPS >= 10 and not any("style" in caption for caption in captions)


def trained(config: Config, folder: Path) -> GhibliModule:
    """The module of a run, after its last epoch."""
    seen: list[GhibliModule] = []
    original = GhibliModule.on_validation_epoch_end

    def keep(module: GhibliModule) -> None:
        seen.append(module)
        original(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GhibliModule, "on_validation_epoch_end", keep)
        train.run(config, RunDir(folder))
    return seen[-1]


@pytest.fixture(scope="module")
def priced(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[GhibliModule, Path, str]:
    """A run of one epoch with a price: its module, its folder and what it printed."""
    folder, said = tmp_path_factory.mktemp("priced"), io.StringIO()
    words = ("validation.price_images=3", "trainer.max_epochs=1", "optimizer.lr=5e-3", "data.batch_size=4")
    with redirect_stdout(said):
        module = trained(make_config(*words), folder)
    return module, folder, said.getvalue()


def test_the_price_is_exactly_zero_before_training_and_with_the_adapter_off(
    priced: tuple[GhibliModule, Path, str],
) -> None:
    module, folder, said = priced
    start, end = (probe.forgotten for probe in module.probe.history)
    assert (start.value, start.standard_error) == (0, 0)
    assert end.value != 0
    assert f"), forgot {end.signed_size}\n" in said
    row = read_rows(folder / "probe.csv")[-1]
    assert float(row["probe/price"]) == end.value and row["probe/price_groups"] == "2"
    status = json.loads((folder / "status.json").read_text())
    assert (status["price"], status["price_se"]) == (end.value, end.standard_error)

    data = module.trainer.datamodule
    for part in (module.unet, module.text_encoder):
        part.disable_adapters()
        part.eval()
    with torch.no_grad():
        module.probe.begin_epoch()
        for index, batch in enumerate(data.val_dataloader()):
            module.validation_step(batch, index)
    off = module.probe.probe_of(module.probe.collected(), data)
    assert torch.equal(off.price, off.base_price) and off.forgotten.value == 0


def test_the_items_are_scored_as_by_a_fresh_base(priced: tuple[GhibliModule, Path, str]) -> None:
    """The losses in the history's first row, by the formula in float64 on a base without any adapter."""
    module = priced[0]
    fresh, data = load("demo"), module.trainer.datamodule
    abar = module.base_alphas_cumprod.double()
    for row, batch in enumerate(data.price_batches):
        level = abar[batch["timesteps"]].view(-1, 1, 1, 1)
        noisy = (level.sqrt() * batch["latents"] + (1 - level).sqrt() * batch["noise"]).float()
        with torch.no_grad():
            embeds = fresh.encode_prompts(batch["input_ids"])
            found = fresh.unet(noisy, batch["timesteps"], embeds, return_dict=False)[0]
        losses = (found.double() - batch["noise"].double()).square().mean((1, 2, 3))
        torch.testing.assert_close(module.probe.history[0].price[row].double(), losses, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_measuring_it_changes_nothing_else(make_config: Callable, tmp_path: Path) -> None:
    """Weights, optimiser, loss column and grids to the bit; and the columns of probe.csv that both have."""
    words = (*GRIDS, "sample.samplers=[ddpm]", "sample.prompts=[A panda]", "trainer.max_epochs=1")
    words += ("loss.caption_dropout=0.5", "lora.text_encoder=false")  # so all captions are encoded before
    for name, count in (("without", 0), ("with", 3)):
        config = make_config(*words, f"validation.price_images={count}", f"cache_dir={CACHE}")
        train.run(config, RunDir(tmp_path / name))
    without, found = (read_rows(tmp_path / name / "probe.csv") for name in ("without", "with"))
    assert [{key: row[key] for key in without[0]} for row in found] == without
    assert set(found[0]) - set(without[0]) == {
        f"probe/price{end}" for end in ("", "_se", "_low", "_high", "_loss", "_groups")
    }
    parts = different_parts(tmp_path / "without", tmp_path / "with")
    of_scores = ("probe", "val_loop", "status", "settings", "command")  # there are more of them
    assert not [part for part in parts if not any(word in part for word in of_scores)]


@pytest.mark.slow
def test_it_grows_with_the_learning_rate(make_config: Callable, tmp_path: Path) -> None:
    """On the demo at its own size: each step is larger than two standard errors of both."""
    prices = []
    for rate in (1e-4, 5e-4, 2.5e-3):
        words = ("validation.price_images=28", "validation.items_per_image=4", "model.resolution=128")
        config = make_config(
            *words, f"optimizer.lr={rate}", "trainer.max_epochs=3",
            "data.batch_size=4", "data.accumulate=1", "early_stopping.patience=null",
        )  # fmt: skip
        prices.append(trained(config, tmp_path / str(rate)).probe.history[-1].forgotten)
    for less, more in zip(prices, prices[1:], strict=False):
        assert more.value - less.value > 2 * (less.standard_error**2 + more.standard_error**2) ** 0.5
