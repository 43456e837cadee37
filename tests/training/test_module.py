"""What is trained when two branches are: the guided loss, its kinds of unconditional branch, a guided target.

The formulas are written here once more, in float64 and with calls of the UNet of their own.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from ghibli.config.schema import Config, describe
from ghibli.diffusion.process import guided_noise
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

W = 7.5


@pytest.fixture(scope="module")
def untouched() -> BaseModel:
    """The demo in float64 without an adapter; tests only read it."""
    base = load("demo")
    base.unet.double(), base.text_encoder.double()
    return base


@pytest.fixture
def base(untouched: BaseModel) -> BaseModel:
    """A copy of it, for an adapter."""
    return copy.deepcopy(untouched)


@pytest.fixture
def module(base: BaseModel, make_config: Callable[..., Config]) -> GhibliModule:
    """The demo in float64 with a random adapter (B not zero) that drops half its inputs."""
    found = GhibliModule(make_config("lora.rank=4", "lora.dropout=0.5", f"loss.guidance={W}"), base)
    draws = torch.Generator().manual_seed(1)
    for parameter in found.trainable.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draws)
    return found.double().train()


@pytest.fixture
def batch(module: GhibliModule) -> dict[str, Any]:
    latents, noise = torch.randn(
        2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    input_ids = module.base.tokenize(["a red train by a lake", "a girl standing in a greenhouse"])
    return {
        "latents": latents, "noise": noise, "timesteps": torch.tensor([120, 870]), "input_ids": input_ids,
    }  # fmt: skip


def predict(base: BaseModel, batch: dict[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
    """One branch from a call of its own, by diffusers' add_noise."""
    scheduler = DDPMScheduler.from_config(base.scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    noisy = scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    return base.unet(noisy, batch["timesteps"], base.text_encoder(input_ids)[0]).sample


def empty(module: GhibliModule) -> torch.Tensor:
    return module.base.tokenize(["", ""])


def branches(module: GhibliModule, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(uncond, cond), dropping the same inputs of the adapters."""
    found = []
    for input_ids in (empty(module), batch["input_ids"]):
        torch.manual_seed(5)
        found.append(predict(module.base, batch, input_ids))
    return found[0], found[1]


def ours(module: GhibliModule, batch: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    for key, value in options.items():
        setattr(module.config.loss, key, value)
    torch.manual_seed(5)
    return module.prediction(batch)


def gradient(module: GhibliModule, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(module.trainable.values()), retain_graph=True, allow_unused=True)
    parts = zip(found, module.trainable.values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])


def agree(module: GhibliModule, found: tuple[torch.Tensor, torch.Tensor], written: torch.Tensor) -> None:
    """The loss and all its gradients are those of the error that is written down."""
    loss, wanted = (found[0] - found[1]).square().mean(), written.square().mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-8, atol=0)
    one, other = gradient(module, loss), gradient(module, wanted)
    assert (one - other).norm() < 1e-6 * other.norm()


def test_shared_dropout_is_two_calls_from_one_state(module: GhibliModule, batch: dict[str, Any]) -> None:
    uncond, cond = branches(module, batch)
    found = ours(module, batch, share_dropout=True)
    agree(module, found, uncond + W * (cond - uncond) - batch["noise"])


def test_without_a_caption_shared_dropout_leaves_nothing_to_guide(
    module: GhibliModule, batch: dict[str, Any]
) -> None:
    """Both branches are then the same, and w multiplies zero; with masks of their own it does not."""
    batch["input_ids"] = empty(module)
    shared = ours(module, batch, share_dropout=True)[0]
    torch.testing.assert_close(shared, branches(module, batch)[1], rtol=1e-9, atol=1e-9)
    apart = ours(module, batch, share_dropout=False)[0]
    assert (apart - shared).norm() > 0.1 * shared.norm()


@pytest.mark.parametrize("share", [False, True])
def test_the_next_random_numbers_are_those_after_the_conditional_branch(
    module: GhibliModule, batch: dict[str, Any], share: bool
) -> None:
    """The state goes on: dropout is not frozen by sharing it."""
    ours(module, batch, share_dropout=share)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert not torch.equal(after, torch.rand(3))


def test_a_detached_branch_has_no_gradient(module: GhibliModule, batch: dict[str, Any]) -> None:
    uncond, cond = branches(module, batch)
    found = ours(module, batch, share_dropout=True, unconditional="detached")
    held = uncond.detach()
    agree(module, found, held + W * (cond - held) - batch["noise"])


def test_a_detached_branch_has_the_loss_of_a_trained_one(module: GhibliModule, batch: dict[str, Any]) -> None:
    trained = ours(module, batch)[0]
    assert torch.equal(ours(module, batch, unconditional="detached")[0], trained)


@pytest.mark.parametrize("share", [False, True])
def test_the_bases_branch_is_that_of_the_untouched_base(
    module: GhibliModule, untouched: BaseModel, batch: dict[str, Any], share: bool
) -> None:
    with torch.no_grad():
        uncond = predict(untouched, batch, empty(module))
    found = ours(module, batch, unconditional="base", share_dropout=share)
    cond = branches(module, batch)[1]
    agree(module, found, uncond + W * (cond - uncond) - batch["noise"])
    assert all(parameter.requires_grad for parameter in module.trainable.values())
    frozen = [p for part in module.base.adaptable.values() for p in part.parameters() if p.requires_grad]
    assert len(frozen) == len(module.trainable)


@pytest.mark.parametrize("s", [1.0, 7.5])
@pytest.mark.parametrize("unconditional", ["trained", "base"])
def test_a_guided_target_is_its_formula(
    module: GhibliModule, untouched: BaseModel, batch: dict[str, Any], s: float, unconditional: str
) -> None:
    """cond - (uncond + s (noise - uncond)), the target without a gradient."""
    module.config.loss.guidance = 1
    found = ours(module, batch, guidance_target=s, unconditional=unconditional, share_dropout=True)
    uncond, cond = branches(module, batch)
    if unconditional == "base":
        uncond = predict(untouched, batch, empty(module))
    agree(module, found, cond - (uncond + s * (batch["noise"] - uncond)).detach())


def test_a_guided_target_is_measured_where_it_predicts_the_noise() -> None:
    """At its optimum cond is uncond + s (noise - uncond); at guidance 1 / s that is the noise."""
    uncond, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    cond = uncond + 7.5 * (noise - uncond)
    torch.testing.assert_close(guided_noise(uncond, cond, 1 / 7.5), noise)


def test_the_probe_of_a_guided_target(make_config: Callable[..., Config]) -> None:
    assert make_config("loss.guidance_target=4").loss.own_guidance == 0.25
    assert make_config().loss.own_guidance == 1
    assert make_config("loss.guidance=7.5").loss.own_guidance == 7.5
    assert "training guidance target 4, lr" in describe(make_config("loss.guidance_target=4"))


def test_the_plain_loss_of_a_guided_target_is_that_of_the_noise(
    module: GhibliModule, batch: dict[str, Any]
) -> None:
    """Without dropout: the square error of uncond + (cond - uncond) / s, which is what the probe measures."""
    module.eval()
    module.config.loss.guidance, module.config.loss.guidance_target = 1, 4.0
    module.probe.expected = torch.zeros(1000)
    plain = module.training_step(batch | {"example": [0, 1]}, 0)["plain"]
    scores = module.scores(batch, 0.25, module.alphas_cumprod)[0]
    torch.testing.assert_close(plain.double(), scores.double().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loss.guidance_target=0.5"], "loss.guidance_target=0.5 is out of range: 1 or more"),
        (
            ["loss.guidance_target=3", "loss.guidance=2"],
            "loss.guidance_target=3 is out of range: null",
        ),
        (["loss.unconditional=none"], "loss.unconditional"),
        (
            ["loss.unconditional=base", "loss.guidance=3", "finetune=full"],
            "loss.unconditional=base needs the untouched base",
        ),
        (
            ["loss.unconditional=base"],
            "loss.unconditional=base is out of range: trained, since at guidance 1",
        ),
        (["loss.unconditional=detached", "loss.guidance_target=1"], "loss.unconditional=detached is out of"),
        (["loss.share_dropout=true"], "loss.share_dropout=true is out of range: false, since at guidance 1"),
        (["loss.regularization=0.5"], "loss.regularization=0.5 is out of range: 1 without .*data.regulariz"),
    ],
)
def test_what_does_not_go_together_is_refused(
    make_config: Callable[..., Config], words: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        make_config(*words)


@pytest.mark.parametrize("guided", ["loss.guidance=3", "loss.guidance_target=3"])
def test_with_guidance_the_other_branch_may_be_chosen(
    make_config: Callable[..., Config], guided: str
) -> None:
    assert make_config(guided, "loss.unconditional=base", "loss.share_dropout=true").loss.share_dropout
