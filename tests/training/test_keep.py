"""loss.keep: the distance to the frozen base, which is the network itself with its adapter switched off."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import train
from ghibli.adapters import lora
from ghibli.adapters.lora import without_adapters
from ghibli.config.schema import Config
from ghibli.data.everyday import captions_to_keep, everyday_captions
from ghibli.data.folder import CaptionedImage
from ghibli.diffusion.process import add_noise
from ghibli.diffusion.samplers import make_scheduler
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_rows
from ghibli.training.module import GhibliModule

STYLE = ", Studio Ghibli style"


@cache
def untouched() -> BaseModel:
    """A base that never sees an adapter; tests only read it."""
    return load("demo")


def batch_of(base: BaseModel) -> dict:
    draws = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=draws)
    return {
        "latents": latents, "noise": noise,
        "timesteps": torch.tensor([300, 700]),
        "input_ids": base.tokenize([f"a red train{STYLE}", f"a girl by a lake{STYLE}"]),
        "keep_ids": base.tokenize(["a red train", "a girl by a lake"]),
        "example": [0, 1], "name": ["a", "b"],
    }  # fmt: skip


def module_of(config: Config, learned: float = 0.0) -> GhibliModule:
    """A module ready for a training step, its trained weights moved by some noise."""
    module = GhibliModule(config, copy.deepcopy(untouched()), base_hash="tested")
    module.probe.expected = torch.ones(module.num_train_timesteps)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.trainable.values():
            parameter += learned * torch.randn(parameter.shape, generator=draws)
    return module.train()


@torch.no_grad()
def fresh_prediction(batch: dict) -> torch.Tensor:
    """What a base that never saw an adapter predicts on the other captions."""
    fresh, timesteps = untouched(), batch["timesteps"]
    abar = make_scheduler("ddpm", fresh).alphas_cumprod
    noisy = add_noise(batch["latents"], batch["noise"], timesteps, abar)
    return fresh.unet(noisy, timesteps, fresh.encode_prompts(batch["keep_ids"]), return_dict=False)[0]


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "loha", "lokr", "oft"])
def test_without_adapters_is_the_base_and_afterwards_all_is_as_before(
    make_config: Callable, variant: str
) -> None:
    module = module_of(make_config(f"lora.variant={variant}", "lora.rank=4", "lora.dropout=0"), 0.05)
    batch, trained = batch_of(module.base), dict(module.trainable)
    before = module.prediction(batch)[0]
    fresh = fresh_prediction(batch)
    assert torch.equal(module.base_prediction(batch), fresh)
    assert not torch.allclose(
        module.prediction(batch | {"input_ids": batch["keep_ids"]})[0], fresh, atol=1e-3
    )
    assert torch.equal(module.prediction(batch)[0], before)
    again = lora.trainable(module.base)
    assert again.keys() == trained.keys() and all(again[name] is trained[name] for name in trained)


def test_an_error_inside_leaves_the_adapter_on(make_config: Callable) -> None:
    module = module_of(make_config("lora.dropout=0"), 0.05)
    batch = batch_of(module.base)
    before = module.prediction(batch)[0]
    with pytest.raises(ZeroDivisionError), without_adapters(module.base):
        _ = 1 / 0
    assert torch.equal(module.prediction(batch)[0], before)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_loss_is_the_sum_by_hand(make_config: Callable, guidance: float) -> None:
    """In float64, with the base's part from a base without an adapter; also the gradient is that sum's."""
    words = (f"loss.guidance={guidance}", "lora.dropout=0", "loss.keep=0.3")
    module = module_of(make_config(*words), 0.05)
    batch = batch_of(module.base)
    found = module.training_step(batch, 0)
    found["loss"].backward()
    gradients = {name: weight.grad.clone() for name, weight in module.trainable.items()}

    prediction, target = module.prediction(batch)
    own, _ = module.prediction(batch | {"input_ids": batch["keep_ids"]})
    keep = (own.double() - fresh_prediction(batch).double()).square().mean()
    wanted = (prediction.double() - target.double()).square().mean() + 0.3 * keep
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["train/keep"].item() == pytest.approx(keep.item(), rel=1e-5) and keep > 0
    for name, gradient in zip(
        gradients, torch.autograd.grad(wanted, list(module.trainable.values())), strict=True
    ):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("unconditional", ["trained", "base"])
def test_a_guided_target_is_held_to_the_guided_base(make_config: Callable, unconditional: str) -> None:
    """To uncond + s (base - uncond), as its own target is uncond + s (noise - uncond)."""
    words = ("loss.guidance_target=3", f"loss.unconditional={unconditional}", "lora.dropout=0")
    module = module_of(make_config(*words, "loss.keep=0.3"), 0.05)
    batch = batch_of(module.base)
    found = module.training_step(batch, 0)["train/keep"].item()
    with torch.no_grad():
        others = batch | {"input_ids": batch["keep_ids"]}
        uncond, cond, _ = module.branches(others, 1 / 3, module.alphas_cumprod)
        if unconditional == "base":
            uncond = fresh_prediction(batch | {"keep_ids": module.base.tokenize(["", ""])})
    base = fresh_prediction(batch).double()
    target = uncond.double() + 3 * (base - uncond.double())
    assert found == pytest.approx((cond.double() - target).square().mean().item(), rel=1e-5)


def test_who_listens_hears_what_is_added(make_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A term that is not finite shows in the total alone; in fp16 the gradient says nothing."""
    module, heard = module_of(make_config("loss.keep=0.3"), 0.05), []
    module.loss_listeners.append(lambda batch, *losses: heard.append(losses))
    batch = batch_of(module.base)
    loss = module.training_step(batch, 0)["loss"]
    assert torch.equal(heard[0][1], loss.detach()) and heard[0][0].shape == (2,)
    monkeypatch.setattr(GhibliModule, "base_prediction", lambda *_: batch["latents"] * torch.inf)
    module.training_step(batch, 0)
    assert heard[1][0].isfinite().all() and not heard[1][1].isfinite()


def test_at_the_start_there_is_nothing_to_hold(make_config: Callable) -> None:
    """The adapter's B is zero: the term is exactly 0, and the step's loss that without it, to the bit."""
    batch = batch_of(untouched())
    plain = module_of(make_config("lora.dropout=0")).training_step(batch, 0)
    held = module_of(make_config("lora.dropout=0", "loss.keep=1")).training_step(batch, 0)
    assert held["train/keep"].item() == 0 and torch.equal(held["loss"], plain["loss"])
    assert "train/keep" not in plain


def test_the_captions_are_the_images_own_without_the_style(make_config: Callable) -> None:
    images = [CaptionedImage(Path(f"{i}.png"), f"a red train{STYLE}", "0" * 64) for i in range(2)]
    assert captions_to_keep(images, make_config("loss.keep=1")) == ["a red train"] * 2
    others = captions_to_keep(images, make_config("data.style=''", "model.made_for=samples"))
    assert others == everyday_captions()[32:34]  # none that the price is measured on


def test_a_full_fine_tuning_is_refused(make_config: Callable) -> None:
    with pytest.raises(UserError, match=r"^loss.keep=0.1 .*finetune=full.*use finetune=lora.*$"):
        make_config("loss.keep=0.1", "finetune=full")
    with pytest.raises(UserError, match="loss.keep=-1"):
        make_config("loss.keep=-1")
    assert make_config("finetune=full").loss.keep == 0


@pytest.mark.parametrize("words", [(), ("lora.text_encoder=false",)], ids=["all", "frozen text encoder"])
def test_a_run_has_its_column(make_config: Callable, tmp_path: Path, words: tuple[str, ...]) -> None:
    more = ("loss.keep=0.5", "trainer.max_epochs=1", "optimizer.lr=5e-3", "data.batch_size=7")
    train.run(make_config(*more, "data.accumulate=1", *words), RunDir(tmp_path))
    values = [float(row["train/keep"]) for row in read_rows(tmp_path / "metrics.csv")]
    assert len(values) == 3 and values[0] == 0 and all(value > 0 for value in values[1:])
