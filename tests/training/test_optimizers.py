"""Optimisers, learning rates by kind of weight, and LoRA's variants and targets."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ghibli.adapters import apply, lora
from ghibli.config.registry import OPTIMIZERS, eight_bit_state, factored_state
from ghibli.config.schema import TARGETS, Config, LoraConfig
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runtime.errors import UserError
from ghibli.training.optimizers import groups_of, make_optimizer, use_average


@pytest.fixture
def weights() -> dict[str, nn.Parameter]:
    names = [
        "unet.q.lora_A.default.weight",
        "unet.q.lora_B.default.weight",
        "text_encoder.q.lora_B.default.weight",
    ]
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(4, 3, generator=generator)) for name in names}


def rates(groups: list[dict]) -> list[tuple[float, int]]:
    return [(round(group["lr"], 9), len(group["params"])) for group in groups]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [(1e-3, 3)]),
        (["optimizer.text_encoder_lr=1e-5"], [(1e-3, 2), (1e-5, 1)]),
        (["optimizer.lora_plus=16"], [(1e-3, 1), (16e-3, 2)]),
        (["optimizer.lora_plus=4", "optimizer.text_encoder_lr=1e-4"], [(1e-3, 1), (4e-3, 1), (4e-4, 1)]),
    ],
)
def test_each_kind_of_weight_learns_at_its_own_rate(
    make_config: Callable[..., Config], weights: dict[str, nn.Parameter], words: list[str], expected: list
) -> None:
    options = make_config("optimizer.lr=1e-3", *words).optimizer
    assert rates(groups_of(options, weights)) == expected
    assert rates(make_optimizer(options, weights, on_gpu=False).param_groups) == expected


def step(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    for parameter in weights.values():
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    use_average(optimizer, wanted=False)
    for _ in range(3):
        optimizer.step()
    use_average(optimizer, wanted=True)
    return [parameter.detach().clone() for parameter in weights.values()]


def reference(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same from its package, as that package's own documentation sets it up."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05, betas=(0.9, 0.99))
    if name == "prodigy":
        package = pytest.importorskip("prodigyopt", reason="extra of this project")
        return package.Prodigy(parameters, lr=1e-2, weight_decay=0.05, betas=(0.9, 0.99))
    if name == "torch.optim:NAdam":
        return torch.optim.NAdam(parameters, lr=1e-2, weight_decay=0.05, betas=(0.9, 0.99))
    if name == "torch.optim:Rprop":
        return torch.optim.Rprop(parameters, lr=1e-2)
    if name == "muon":
        return torch.optim.Muon(parameters, lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    if name == "adamw_schedulefree":
        package = pytest.importorskip("schedulefree", reason="extra of this project")
        return package.AdamWScheduleFree(parameters, lr=1e-2, weight_decay=0.05, betas=(0.9, 0.99))
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=1e-2, weight_decay=0.05, scale_parameter=False, relative_step=False, warmup_init=False
    )


BY_PATH = ["torch.optim:NAdam", "torch.optim:Rprop"]  # the second has neither betas nor weight decay


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "adamw_schedulefree", "muon", *BY_PATH])
def test_steps_as_its_package_does(
    make_config: Callable[..., Config], weights: dict[str, nn.Parameter], name: str
) -> None:
    copies = {key: nn.Parameter(value.detach().clone()) for key, value in weights.items()}
    wanted = step(reference(name, list(copies.values())), copies)
    words = ("optimizer.lr=1e-2", "optimizer.weight_decay=0.05", "optimizer.betas=[0.9,0.99]")
    options = make_config(f"optimizer.name={name}", "optimizer.schedule=constant", *words).optimizer
    ours = step(make_optimizer(options, weights, on_gpu=False), weights)
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "adamw_schedulefree"])
def test_its_state_is_as_large_as_the_estimate_says(make_config: Callable[..., Config], name: str) -> None:
    """Of a matrix, a convolution and a vector; single numbers such as the step are not counted."""
    extra = OPTIMIZERS[name].extra
    if extra is not None:
        pytest.importorskip({"prodigy": "prodigyopt"}.get(extra, extra), reason="extra of this project")
    shapes = [(32, 320), (8, 4, 3, 3), (40,)]
    weights = {str(shape): nn.Parameter(torch.ones(shape)) for shape in shapes}
    options = make_config(f"optimizer.name={name}", "optimizer.schedule=constant").optimizer
    optimizer = make_optimizer(options, weights, on_gpu=False)
    step(optimizer, weights)
    for shape, parameter in zip(shapes, weights.values(), strict=True):
        kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        size = sum(value.nbytes for value in kept if value.ndim > 0)
        assert OPTIMIZERS[name].state_bytes(shape) == size, shape


def test_factored_and_8_bit_states() -> None:
    """As transformers' Adafactor and bitsandbytes allocate them: by hand, on no GPU."""
    assert factored_state((32, 320)) == 4 * (32 + 320)
    assert factored_state((8, 4, 3, 3)) == 4 * (8 * 4 * 3 + 8 * 4 * 3)
    assert factored_state((40,)) == 4 * 40
    assert eight_bit_state((4, 320)) == 8 * 1280
    assert eight_bit_state((32, 320)) == 2 * 10240 + 2 * 4 * 40


@pytest.mark.parametrize("word", ["optimizer.lora_plus=16", "optimizer.text_encoder_lr=1e-5"])
def test_prodigy_takes_a_single_learning_rate(make_config: Callable[..., Config], word: str) -> None:
    """It raises in its first step otherwise."""
    with pytest.raises(UserError, match=f"{word.split('=')[0]}=.*null, since prodigy takes a single"):
        make_config("optimizer.name=prodigy", word)


def test_a_missing_package_is_named_with_its_extra(
    make_config: Callable[..., Config], weights: dict[str, nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    options = make_config("optimizer.name=prodigy").optimizer
    with pytest.raises(
        UserError, match=r"^prodigyopt is not installed: python -m pip install -e '.\[prodigy\]'$"
    ):
        make_optimizer(options, weights, on_gpu=False)


def test_its_options_reach_a_class_and_what_it_lacks_is_told(
    make_config: Callable[..., Config], weights: dict[str, nn.Parameter], caplog: pytest.LogCaptureFixture
) -> None:
    words = ("optimizer.name=torch.optim:SGD", "+optimizer.options={momentum: 0.7, nesterov: true}")
    options = make_config(*words).optimizer
    with caplog.at_level("INFO", "ghibli"):
        group = make_optimizer(options, weights, on_gpu=False).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, True, 0.01)
    assert "SGD has no optimizer.betas: not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch.optim:NoSuch", "{}", "^optimizer.name=torch.optim:NoSuch: .*has no attribute"),
        ("no_such_package:Lion", "{}", "^optimizer.name=no_such_package:Lion: No module named"),
        ("os:system", "{}", "^optimizer.name=os:system is no torch.optim.Optimizer$"),
        ("torch.nn:Linear", "{}", "^optimizer.name=torch.nn:Linear is no torch.optim.Optimizer$"),
        ("adamw", "{momentom: 1}", "^optimizer.name=adamw refuses this: .*momentom"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_line(
    make_config: Callable[..., Config],
    weights: dict[str, nn.Parameter],
    name: str,
    options: str,
    message: str,
) -> None:
    config = make_config(f"optimizer.name={name}", f"+optimizer.options={options}")
    with pytest.raises(UserError, match=message):
        make_optimizer(config.optimizer, weights, on_gpu=False)


def test_muon_refuses_what_is_no_matrix(make_config: Callable[..., Config]) -> None:
    options = make_config("optimizer.name=muon").optimizer
    with pytest.raises(UserError, match="^optimizer.name=muon refuses this: Muon only supports 2D"):
        make_optimizer(options, {"bias": nn.Parameter(torch.zeros(3))}, on_gpu=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("+optimizer.options.lr=1",), "^optimizer.options: set the learning rate with optimizer.lr"),
        (("optimizer.name=adamv",), "optimizer.name=adamv is unknown: .*did you mean adamw"),
        (("optimizer.ema_decay=1",), "optimizer.ema_decay=1.*between 0 and 1"),
        (
            ("optimizer.name=adamw_schedulefree", "optimizer.schedule=constant", "optimizer.ema_decay=0.9"),
            "optimizer.ema_decay=0.9.*averages by itself",
        ),
    ],
)
def test_optimiser_settings_that_contradict_are_refused(
    make_config: Callable[..., Config], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*words)


def test_schedule_free_wants_no_schedule(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="optimizer.schedule.*constant"):
        make_config("optimizer.name=adamw_schedulefree")


def test_eight_bits_without_a_gpu_are_refused(
    make_config: Callable[..., Config], weights: dict[str, nn.Parameter]
) -> None:
    options = make_config("optimizer.name=adamw8bit").optimizer
    with pytest.raises(UserError, match="optimizer.name=adamw8bit needs a GPU"):
        make_optimizer(options, weights, on_gpu=False)


@pytest.mark.parametrize("words", [["optimizer.name=adamm"], ["optimizer.lora_plus=0"], ["lora.variant=loro"],
                                   ["lora.targets=attention+fff"], ["lora.targets=7"]])  # fmt: skip
def test_an_error_names_its_key(make_config: Callable[..., Config], words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0].split("=")[0]):
        make_config(*words)


@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_a_variant_is_saved_and_merged_as_it_was_trained(variant: str, tmp_path: Path) -> None:
    live = load("demo")
    options = LoraConfig(
        rank=4, alpha=8.0, dropout=0.1, targets=TARGETS["attention"], text_encoder=True,
        text_encoder_targets="attention", variant=variant, init=None,
    )  # fmt: skip
    lora.add_lora(live, options, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in lora.trainable(live).items():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    layer = live.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling[lora.ADAPTER_NAME] == (8 / 4**0.5 if variant == "rslora" else 8 / 4)
    lora.save_adapter(live, tmp_path)
    merged = load("demo")
    untouched = predicted(merged)
    apply.merge(merged, tmp_path, 1.0)
    torch.testing.assert_close(predicted(merged), predicted(live), rtol=1e-4, atol=1e-5)
    assert (predicted(merged) - untouched).abs().max() > 0.01


@torch.no_grad()
def predicted(base: BaseModel) -> torch.Tensor:
    embeds = base.encode_prompts(base.tokenize(["a girl standing in a greenhouse"]))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    return base.unet(latents, torch.tensor([500]), embeds).sample


@pytest.mark.parametrize(
    ("name", "ends"), [("attention+ff", {"ff.net.2"}), ("all", {"ff.net.2", "conv1", "proj_in"})]
)
def test_targets_by_name(make_config: Callable[..., Config], base: BaseModel, name: str, ends: set) -> None:
    config = make_config(f"lora.targets={name}", "lora.rank=2")
    lora.add_lora(base, config.lora, seed=0)
    adapted = {key.split(".lora_A.")[0] for key in lora.trainable(base) if ".lora_A." in key}
    every = {f"unet.{key}".replace(".base_layer", "") for key, _ in base.unet.named_modules()}
    for end in ends | {"to_q", "to_out.0"}:
        assert {key for key in every if key.endswith(f".{end}")} <= adapted
