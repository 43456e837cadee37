"""Gradient dot products against finite differences in float64; the optimiser's step against torch's own."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from ghibli.config.schema import Config
from ghibli.diffusion.losses import loss_weights
from ghibli.diffusion.process import guided_noise
from ghibli.inference import gradients
from ghibli.inference.gradients import Batch, HeldOut, Stage, held_out_loss, training_loss
from ghibli.models.base import BaseModel
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import groups_of, lr_factor

BLOCK = "attentions.0.transformer_blocks.0"
SETTINGS = ("lora.rank=2", f"lora.targets=[{BLOCK}.attn1.to_v,{BLOCK}.attn2.to_k]", "lora.dropout=0.5")
CAPTIONS = ("a cat in a town", "a red train at night", "a girl by a lake", "a tree")


def make_module(config: Config, base: BaseModel) -> GhibliModule:
    """A module whose adapters do something, in eval mode."""
    module = GhibliModule(config, base, base_hash="x").eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.trainable.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return module


def items(module: GhibliModule, number: int, count: int = 3) -> Batch:
    """Some items of one image."""
    draw = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(count, 4, 8, 8, generator=draw),
        "noise": torch.randn(count, 4, 8, 8, generator=draw),
        "timesteps": torch.randint(0, 1000, (count,), generator=draw),
        "input_ids": module.base.tokenize([CAPTIONS[number % 4]]).expand(count, -1),
    }


def exact_loss(module: GhibliModule, batch: Batch, weighted: bool) -> float:
    """The mean loss in float64, from the formulas alone."""
    guidance = module.config.loss.guidance
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        uncond, cond, target = module.branches(wide, guidance, module.alphas_cumprod)
        prediction = cond if uncond is None else guided_noise(uncond, cond, guidance)
        losses = (prediction - target).square().mean(dim=(1, 2, 3))
        if weighted:
            losses = losses * loss_weights(
                module.config.loss, wide["timesteps"], module.alphas_cumprod, "epsilon"
            )
    return losses.mean().item()


def widened(module: GhibliModule) -> GhibliModule:
    """A copy in float64."""
    wide = deepcopy(module).double()
    wide.trainable = {name: dict(wide.named_parameters())[name] for name in module.trainable}  # of the copy
    return wide


def slope(
    module: GhibliModule, wide: GhibliModule, direction: torch.Tensor, loss: Callable[[GhibliModule], float]
) -> float:
    """The derivative of a loss along a direction of the trained weights: central differences in float64."""
    step = 1e-4 / direction.norm().item()

    def at(factor: float) -> float:
        place = 0
        with torch.no_grad():
            for name, parameter in module.trainable.items():
                part = direction[place : place + parameter.numel()].reshape(parameter.shape).double()
                wide.trainable[name].copy_(parameter.double() + factor * part)
                place += parameter.numel()
        return loss(wide)

    return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize(
    "words", [(), ("loss.weighting=min_snr",), ("loss.guidance=3",)], ids=["plain", "weighted", "guided"]
)
def test_the_dot_products_are_derivatives(
    make_config: Callable[..., Config], base: BaseModel, words: tuple[str, ...]
) -> None:
    """Of the training loss along the held-out gradient, and of the held-out loss along anything."""
    module = make_module(make_config(*SETTINGS, *words), base)
    weights = {name: p.detach().clone() for name, p in module.trainable.items()}
    count = sum(p.numel() for p in module.trainable.values())
    stage = Stage("best.ckpt", 1, weights, torch.ones(count), False)
    held_out, image = [items(module, 1), items(module, 2)], items(module, 3)
    wide = widened(module)
    measured = HeldOut(module, [stage], held_out, lambda: None)
    (own,) = measured.blocks
    direction = torch.randn(count, generator=torch.Generator().manual_seed(5))
    for block, batch in enumerate(held_out):
        expected = slope(module, wide, direction, lambda wide, batch=batch: exact_loss(wide, batch, False))
        assert (own[block] @ direction).item() == pytest.approx(expected, rel=1e-3)
    found, weighted = measured.products(image), "loss.weighting" in str(words)
    for block in range(2):
        expected = slope(module, wide, own[block], lambda wide: exact_loss(wide, image, weighted))
        assert found.blocks[block].item() == pytest.approx(expected, rel=1e-3)


def one_item(batch: Batch, item: int) -> Batch:
    return {key: tensor[item : item + 1] for key, tensor in batch.items()}


def test_checkpoints_add_up_each_with_its_weights_and_rates(
    make_config: Callable[..., Config], base: BaseModel
) -> None:
    """Against autograd on the whole batch, and cosines of the stacked vectors in float64."""
    module = make_module(make_config(*SETTINGS), base)
    first = {name: p.detach().clone() for name, p in module.trainable.items()}
    second = {name: 0.5 * value for name, value in first.items()}
    count = sum(value.numel() for value in first.values())
    rates = torch.rand(2, count, generator=torch.Generator().manual_seed(1))
    stages = [Stage("a", 1, first, rates[0], True), Stage("b", 2, second, rates[1], True)]
    image, held_out = items(module, 1), [items(module, 2), items(module, 0)]
    found = HeldOut(module, stages, held_out, lambda: None).products(image)

    def whole(batch: Batch, loss: Callable) -> torch.Tensor:
        gradient = torch.autograd.grad(loss(module, batch), list(module.trainable.values()))
        return gradients.flat(gradient).double()

    blocks, vectors = torch.zeros(2, dtype=torch.float64), {}
    for stage in stages:
        gradients.put(module, stage)
        size = stage.rates.double()
        ours = whole(image, training_loss)
        blocks += torch.stack([(size * ours) @ whole(batch, held_out_loss) for batch in held_out])
        for level in range(3):
            pair = (
                whole(one_item(image, level), training_loss),
                sum(whole(one_item(batch, level), held_out_loss) for batch in held_out),
            )
            vectors.setdefault(level, []).append(torch.stack([size.sqrt() * one for one in pair]))
    torch.testing.assert_close(found.blocks, blocks, rtol=1e-3, atol=0)
    cosines = [torch.cosine_similarity(*torch.cat(parts, 1), dim=0) for parts in vectors.values()]
    torch.testing.assert_close(found.levels, torch.stack(cosines), rtol=1e-3, atol=1e-5)
    assert gradients.block_of(0, 20) == 0 and gradients.block_of(19, 20) == 7


def test_step_sizes_are_those_of_adamw(make_config: Callable[..., Config], base: BaseModel) -> None:
    """Against what torch's AdamW subtracts for a gradient that is small beside those before it."""
    words = ("optimizer.lr=1e-3", "optimizer.text_encoder_lr=2e-4", "optimizer.lora_plus=4")
    module = make_module(
        make_config(*SETTINGS, *words, "optimizer.betas=[0.0,0.999]", "optimizer.weight_decay=0"), base
    )
    options, trainable = module.double().config.optimizer, module.trainable
    optimizer = torch.optim.AdamW(
        groups_of(options, trainable), lr=options.lr, betas=(0.0, 0.999), weight_decay=0
    )
    draw = torch.Generator().manual_seed(3)

    def step(size: float) -> torch.Tensor:
        rows = [size * (0.1 + torch.rand(p.shape, generator=draw)).double() for p in trainable.values()]
        before = gradients.flat([p.detach().clone() for p in trainable.values()])
        for parameter, row in zip(trainable.values(), rows, strict=True):
            parameter.grad = row
        optimizer.step()
        return (before - gradients.flat([p.detach() for p in trainable.values()])) / gradients.flat(rows)

    for _ in range(50):
        step(1.0)
    sizes, known = gradients.step_sizes(module, [deepcopy(optimizer.state_dict())])
    torch.testing.assert_close(sizes, step(1e-2), rtol=0.03, atol=0)
    assert known


def test_without_second_moments_the_rate_alone_counts(
    make_config: Callable[..., Config], base: BaseModel
) -> None:
    config = make_config(*SETTINGS, "optimizer.name=torch.optim:NAdam", "optimizer.lr=1e-3")
    module = make_module(config, base)
    groups = [{"params": [0], "lr": 1e-3}]
    sizes, known = gradients.step_sizes(module, [{"param_groups": groups, "state": {}}])
    assert not known and sizes.tolist() == pytest.approx([1e-3] * len(sizes))


def test_rates_are_summed_over_the_steps_of_a_stage(make_config: Callable[..., Config]) -> None:
    config = make_config("trainer.max_epochs=4", "optimizer.warmup_steps=2")
    every = [
        lr_factor(step, schedule="cosine_epochs", warmup_steps=2, steps_per_epoch=5, epochs=4)
        for step in range(20)
    ]
    assert gradients.summed_factors(config, 0, 20, 5) == pytest.approx(sum(every))
    parts = gradients.summed_factors(config, 0, 12, 5), gradients.summed_factors(config, 12, 20, 5)
    assert sum(parts) == pytest.approx(sum(every)) and parts[0] == pytest.approx(sum(every[:12]))


def test_held_out_images_are_scored_where_the_gain_is(
    make_config: Callable[..., Config], base: BaseModel
) -> None:
    """A guided target trains cond to be uncond + 2 (noise - uncond): the noise is at a guidance of 1 / 2."""
    module = make_module(make_config(*SETTINGS, "loss.guidance_target=2"), base)
    batch = items(module, 0)
    with torch.no_grad():
        uncond, cond, noise = module.branches(batch, 0.5, module.base_alphas_cumprod)
        wanted = ((uncond + cond) / 2 - noise).square().mean()
        assert torch.allclose(held_out_loss(module, batch), wanted, rtol=1e-5)
