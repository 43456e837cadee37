"""Each compute option gives the gradients of the plain fp32 path, within its precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

from ghibli.config.schema import Config
from ghibli.diffusion.samplers import in_eval_mode
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.performance import PromptEmbeds, shrink_frozen
from ghibli.training.module import GhibliModule

Gradients = dict[str, torch.Tensor]
SHALLOW = {  # the demo's UNet with one block of each kind: compiling all of it takes minutes
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture
def make_module(make_config: Callable[..., Config]) -> Callable[..., GhibliModule]:
    """Make the demo in training mode, dropout on, with the same random adapter every time."""

    def make(*words: str, shallow: bool = False) -> GhibliModule:
        config = make_config("lora.rank=4", "lora.dropout=0.1", "loss.guidance=7.5", *words)
        base = load("demo")
        if shallow:
            torch.manual_seed(3)
            base = replace(base, unet=UNet2DConditionModel.from_config(dict(base.unet.config) | SHALLOW))
        module = GhibliModule(config, base).train()
        generator = torch.Generator().manual_seed(1)
        for parameter in module.trainable.values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        return module

    return make


def batch_of(module: GhibliModule) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    captions = ["a red train by a lake", "a girl standing in a greenhouse", ""]
    return {
        "latents": latents, "noise": noise, "timesteps": torch.tensor([120, 500, 870]),
        "input_ids": module.base.tokenize(captions),
        "example": [0, 1, 2], "name": ["a.png", "b.png", "c.png"],
    }  # fmt: skip


def gradients(module: GhibliModule, dtype: torch.dtype | None = None) -> Gradients:
    module.probe.expected = torch.ones(1000)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = module.training_step(batch_of(module), 0)["loss"]
    loss.backward()
    return {name: parameter.grad for name, parameter in module.trainable.items()}


def largest_difference(ours: Gradients, plain: Gradients) -> float:
    """Largest difference over all weights, relative to the largest gradient."""
    assert ours.keys() == plain.keys()
    largest = max(gradient.abs().max() for gradient in plain.values())
    return max(((ours[name] - plain[name]).abs().max() / largest).item() for name in plain)


@pytest.mark.parametrize(
    "words",
    [
        ("compute.channels_last=true",),
        ("compute.checkpoint_every=1",),
        ("compute.checkpoint_every=2",),
        pytest.param(("compute.compile=true", "lora.dropout=0"), marks=pytest.mark.slow),
        pytest.param(
            ("compute.compile=true", "compute.channels_last=true", "lora.dropout=0"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda words: " ".join(words),
)
def test_gradients_do_not_depend_on_how_they_are_computed(
    make_module: Callable[..., GhibliModule], words: tuple[str, ...]
) -> None:
    rest = [
        word for word in words if not word.startswith("compute.")
    ]  # compiled dropout draws other random numbers
    compiles = "compute.compile=true" in words
    plain = gradients(make_module(*rest, shallow=compiles))
    assert max(gradient.abs().max() for gradient in plain.values()) > 1e-3
    counters.clear()
    assert largest_difference(gradients(make_module(*words, shallow=compiles)), plain) < 1e-4
    assert (counters["stats"]["unique_graphs"] > 0) == compiles  # or it would compare plain with plain


@pytest.mark.slow
def test_every_second_block_is_computed_again(make_module: Callable[..., GhibliModule]) -> None:
    def recomputed(every: int) -> int:
        unet = make_module(f"compute.checkpoint_every={every}").unet
        return sum(getattr(module, "gradient_checkpointing", False) for module in unet.modules())

    assert recomputed(0) == 0 < recomputed(2) < recomputed(1)
    assert recomputed(2) == -(-recomputed(1) // 2)


@pytest.mark.slow
def test_recomputing_saves_memory(make_module: Callable[..., GhibliModule]) -> None:
    def kept(*words: str) -> int:
        module, saved = make_module(*words), []
        module.probe.expected = torch.ones(1000)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            module.training_step(batch_of(module), 0)
        return sum(saved)

    assert kept("compute.checkpoint_every=1") < kept("compute.checkpoint_every=2") < kept()


def test_frozen_weights_in_16_bits_change_nothing_that_autocast_computes(
    make_module: Callable[..., GhibliModule],
) -> None:
    """Bit for bit without dropout; with it, its factor 1 / (1 - p) is rounded to 16 bits as well."""
    mixed = gradients(make_module("lora.dropout=0"), torch.bfloat16)
    shrunk = make_module("lora.dropout=0")
    before = sum(p.nbytes for p in shrunk.unet.parameters() if not p.requires_grad)
    shrink_frozen(shrunk.base, "bf16-mixed")
    after = sum(p.nbytes for p in shrunk.unet.parameters() if not p.requires_grad)
    assert after < 0.51 * before
    assert all(parameter.dtype == torch.float32 for parameter in shrunk.trainable.values())
    ours = gradients(shrunk, torch.bfloat16)
    assert all(torch.equal(ours[name], mixed[name]) for name in mixed)


def test_16_bits_are_near_fp32(make_module: Callable[..., GhibliModule]) -> None:
    """bf16 keeps 8 bits, and guidance 7.5 amplifies the rounding of the difference of two branches."""
    shrunk = make_module()
    shrink_frozen(shrunk.base, "bf16-mixed")
    assert largest_difference(gradients(shrunk, torch.bfloat16), gradients(make_module())) < 0.1


def test_fp32_training_keeps_the_base_in_fp32(make_module: Callable[..., GhibliModule]) -> None:
    module = make_module()
    shrink_frozen(module.base, "32-true")
    assert {parameter.dtype for parameter in module.unet.parameters()} == {torch.float32}


def test_remembered_prompts_are_those_of_the_text_encoder(make_module: Callable[..., GhibliModule]) -> None:
    plain, ours = (make_module("lora.text_encoder=false") for _ in range(2))
    captions = [f"a train, number {i}" for i in range(9)]
    known = ["", "a red train by a lake", "a girl standing in a greenhouse", *captions]
    ours.known_prompts = PromptEmbeds(ours.base, ours.base.tokenize(known), lambda done, total: None)
    with torch.no_grad():
        for caption in known:
            ids = ours.base.tokenize([caption])
            torch.testing.assert_close(ours.known_prompts(ids), ours.base.encode_prompts(ids))
    ours.text_encoder.to("meta")  # unusable from here on: training must not need it
    assert largest_difference(gradients(ours), gradients(plain)) < 1e-4


def test_sampling_fetches_every_part_and_sends_it_back(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = []
    for part in (base.vae, base.text_encoder):
        monkeypatch.setattr(part, "to", lambda device: moves.append(device.type))
    base.unet.to("meta")  # stands in for another device
    with in_eval_mode(base):
        assert moves == ["meta", "meta"]
    assert moves[2:] == ["cpu", "cpu"]


@pytest.mark.gpu
def test_on_a_gpu_a_frozen_text_encoder_leaves_it(make_module: Callable[..., GhibliModule]) -> None:
    module = make_module("lora.text_encoder=false").cuda()
    ids = module.base.tokenize([""]).cuda()
    module.known_prompts = PromptEmbeds(module.base, ids, lambda done, total: None)
    module.on_train_start()
    assert next(module.text_encoder.parameters()).device.type == "cpu"
    assert next(module.unet.parameters()).device.type == "cuda"
