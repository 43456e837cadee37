"""The adapter: which layers, how scaled, the same as merged weights, in a file that others can load."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.commands import run_python
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ghibli.adapters import apply, lora
from ghibli.adapters.files import read_adapter
from ghibli.config import schema
from ghibli.config.paths import ADAPTER_FILE, DEMO
from ghibli.config.schema import TEXT_ENCODER_TARGETS, LoraConfig
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, ALPHA = 4, 12.0  # neither alpha = rank nor the usual 2 x rank, so that a forgotten alpha shows
SCALE = ALPHA / RANK


def options_of(**changes: object) -> LoraConfig:
    options = {
        "rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS, "text_encoder": True,
        "text_encoder_targets": "attention", "variant": "lora", "init": None,
    }  # fmt: skip
    return LoraConfig(**(options | changes))


def attach(base: BaseModel, seed: int = 0, **changes: object) -> BaseModel:
    lora.add_lora(base, options_of(**changes), seed)
    return base


def test_layers_that_clip_skip_skips_are_not_trained(base: BaseModel, tmp_path: Path) -> None:
    """They would get no gradient. The file names the clip skip, and all others are trained as without it."""
    base.clip_skip = 2
    attach(base)
    text = {name.split("encoder.layers.")[1][0] for name in lora.trainable(base) if "encoder.layers." in name}
    assert text == {"0", "1"} and base.text_encoder.config.num_hidden_layers == 3
    assert sum(".lora_A." in name for name in lora.trainable(base) if name.startswith("text")) == 2 * 4
    base.unet(
        torch.randn(1, 4, 8, 8), torch.tensor([5]), base.encode_captions(["a lake"])
    ).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.trainable(base).values())
    with safe_open(lora.save_adapter(base, tmp_path), "pt") as file:
        assert file.metadata()["ss_clip_skip"] == "2"


def randomise(base: BaseModel) -> BaseModel:
    """Fill every A and B with random numbers, as after training."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in lora.trainable(base).items():
        change = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + change if "magnitude" in name else change
    return base


def inputs(base: BaseModel) -> dict[str, torch.Tensor]:
    """Make fixed inputs for one forward pass of text encoder and UNet."""
    generator = torch.Generator().manual_seed(6)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([100, 800]),
        "input_ids": base.tokenize(["a girl standing in a greenhouse", ""]),
    }


@torch.no_grad()
def noise_pred(base: BaseModel) -> torch.Tensor:
    given = inputs(base)
    embeds = base.encode_prompts(given["input_ids"])
    return base.unet(given["latents"], given["timesteps"], embeds).sample


@torch.no_grad()
def add_by_hand(base: BaseModel, weights: dict[str, torch.Tensor], scale: float) -> None:
    """Add scale B A to W in every layer that has an A and a B."""
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            part, layer = name.split(".lora_A.")[0].split(".", 1)
            getattr(base, part).get_submodule(layer).weight += scale * b @ a


def text_layers(base: BaseModel) -> list[str]:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [n for n, m in base.text_encoder.named_modules() if n.rsplit(".", 1)[-1] in names]


# Which layers


def test_every_attention_layer_gets_a_and_b_and_nothing_else(base: BaseModel) -> None:
    attentions = [n for n, m in base.unet.named_modules() if n.endswith((".attn1", ".attn2"))]
    layers = [f"unet.{name}.{target}" for name in attentions for target in TARGETS]
    layers += [f"text_encoder.{name}" for name in text_layers(base)]
    # Two attentions in each of the UNet's transformer blocks; four layers in each of the encoder's.
    blocks = [n for n, m in base.unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(attentions) == 2 * len(blocks) > 0
    assert len(text_layers(base)) == 4 * base.text_encoder.config.num_hidden_layers
    expected = {f"{name}.lora_{ab}.default.weight" for name in layers for ab in "AB"}
    assert set(lora.trainable(attach(base))) == expected


def test_without_text_encoder_and_with_fewer_targets(base: BaseModel) -> None:
    names = lora.trainable(attach(base, text_encoder=False, targets=["to_v", "conv1"]))
    assert all(name.startswith("unet.") for name in names)
    endings = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert endings == {"to_v", "conv1"}
    assert not hasattr(base.text_encoder, "peft_config")


def test_only_adapters_are_trainable_and_they_are_fp32(base: BaseModel) -> None:
    base.unet.half()  # as if the frozen weights were stored in 16 bits
    attach(base)
    for name, parameter in [*base.unet.named_parameters(), *base.text_encoder.named_parameters()]:
        assert parameter.requires_grad == ("lora_" in name), name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    assert not any(p.requires_grad for p in base.vae.parameters())


def test_shapes_are_rank_rows_of_a_and_columns_of_b(base: BaseModel) -> None:
    widths = {
        n: (m.in_features, m.out_features) for n, m in base.unet.named_modules() if isinstance(m, nn.Linear)
    }
    for name, parameter in lora.trainable(attach(base, text_encoder=False)).items():
        layer, ab = name.removeprefix("unet.").split(".lora_")
        n_in, n_out = widths[layer]
        assert parameter.shape == ((RANK, n_in) if ab.startswith("A") else (n_out, RANK)), name


def test_a_fresh_adapter_changes_no_bit(base: BaseModel) -> None:
    before = noise_pred(base)
    attach(base, dropout=0.1)
    weights = lora.trainable(base)
    assert all((p == 0).all() for n, p in weights.items() if ".lora_B." in n)
    assert all((p != 0).any() for n, p in weights.items() if ".lora_A." in n)
    assert torch.equal(noise_pred(base), before)


def test_the_seed_alone_decides_the_initial_a(model: BaseModel) -> None:
    def first_weights(seed: int, disturb: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(disturb)
        torch.rand(disturb)
        return lora.trainable(attach(deepcopy(model), seed=seed))

    one, same, other = first_weights(1, 3), first_weights(1, 4), first_weights(2, 3)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if ".lora_A." in name)


def test_attaching_leaves_the_global_generator_as_it_was(base: BaseModel) -> None:
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    attach(base)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_target_is_refused_by_name(base: BaseModel) -> None:
    with pytest.raises(
        UserError, match=r"lora\.targets: .* to_qq; there are .*to_k.*to_out\.0.*to_q"
    ) as caught:
        attach(base, targets=["to_q", "to_qq"])
    assert "\n" not in str(caught.value)
    assert not hasattr(base.unet, "peft_config"), "nothing is attached before the check"


# Scaling and merging


@pytest.mark.parametrize(
    ("variant", "scale"),
    [(each, SCALE) for each in ("lora", "dora", "loha", "lokr")] + [("rslora", ALPHA / RANK**0.5)],
)
def test_the_scale_is_alpha_over_rank(variant: str, scale: float, base: BaseModel) -> None:
    """Over the root of the rank for rslora, as PEFT's layers have it."""
    attach(base, variant=variant)
    layers = [
        m for part in (base.unet, base.text_encoder) for m in part.modules() if isinstance(m, BaseTunerLayer)
    ]
    assert {layer.scaling["default"] for layer in layers} == {scale}


def test_one_layer_is_w_x_plus_scaled_b_a_x(base: BaseModel) -> None:
    layer = randomise(attach(base)).unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    x = torch.randn(3, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    written = x @ layer.base_layer.weight.T + SCALE * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), written)


def test_the_adapter_is_the_base_with_w_plus_scaled_b_a(model: BaseModel, base: BaseModel) -> None:
    """Against weights of an untouched base with alpha / rank B A added by hand."""
    weights = lora.trainable(randomise(attach(base)))
    by_hand, before = deepcopy(model), noise_pred(model)
    add_by_hand(by_hand, weights, SCALE)
    ours = noise_pred(base)
    torch.testing.assert_close(ours, noise_pred(by_hand), rtol=0, atol=1e-5)
    assert (ours - before).norm() > 0.05 * before.norm()


def test_the_adapter_is_pefts_merged_weights(base: BaseModel) -> None:
    ours = noise_pred(randomise(attach(base)))
    base.unet.fuse_lora()
    for module in base.text_encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    torch.testing.assert_close(noise_pred(base), ours, rtol=0, atol=1e-5)


def test_dropout_works_in_training_only(base: BaseModel) -> None:
    randomise(attach(base, dropout=0.5))
    still = noise_pred(base)
    base.unet.train()
    torch.manual_seed(0)
    assert not torch.allclose(noise_pred(base), still, atol=1e-3)
    base.unet.eval()
    assert torch.equal(noise_pred(base), still)


# The file

STOCK = """
import sys
import torch
from diffusers import StableDiffusionPipeline

folder, adapter, content = sys.argv[1:]
given = torch.load(content)
pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)

@torch.no_grad()
def noise_pred():
    embeds = pipeline.text_encoder(given["input_ids"])[0]
    return pipeline.unet(given["latents"], given["timesteps"], embeds).sample

found = {"base": noise_pred()}
pipeline.load_lora_weights(adapter)
found["adapter"] = noise_pred()
parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
for name, part in parts.items():
    layers = [m for m in part.modules() if hasattr(m, "lora_A")]
    found[name] = len(layers), sorted({s for m in layers for s in m.scaling.values()})
    part.train()
found["in training mode"] = noise_pred()
assert "ghibli" not in sys.modules
torch.save(found, content)
"""


def test_the_file_gives_the_live_model_in_a_stock_pipeline(base: BaseModel, tmp_path: Path) -> None:
    """Base and adapter are loaded in a fresh process that imports only diffusers and torch."""
    plain = noise_pred(base)
    count = {"unet": 0, "text_encoder": len(text_layers(base))}
    randomise(attach(base, dropout=0.5))
    count["unet"] = len(lora.trainable(base)) // 2 - count["text_encoder"]
    lora.save_adapter(base, tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [ADAPTER_FILE]
    content, script = tmp_path / "content.pt", tmp_path / "stock.py"
    torch.save(inputs(base), content)
    script.write_text(STOCK)
    done = run_python(str(script), str(DEMO), str(tmp_path / "adapter"), str(content), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(content)
    live = noise_pred(base)
    torch.testing.assert_close(found["base"], plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["adapter"], live, rtol=0, atol=1e-5)
    assert (found["adapter"] - found["base"]).norm() > 0.05 * plain.norm()
    assert torch.equal(found["in training mode"], found["adapter"]), "dropout stays off"
    assert {part: found[part] for part in count} == {part: (n, [1.0]) for part, n in count.items()}


def test_the_files_keys_are_the_published_ones(base: BaseModel, tmp_path: Path) -> None:
    """`text_encoder.text_model.` as in every published SD 1.5 adapter; older libraries need it."""
    attach(base)
    with safe_open(lora.save_adapter(base, tmp_path), "pt") as file:
        keys, metadata = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
        assert {file.get_tensor(key).dtype for key in keys} == {torch.float32}
    text = {key for key in keys if key.startswith("text_encoder.")}
    assert len(keys) == len(lora.trainable(base))
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in text)
    assert all(key.startswith("unet.") for key in keys - text)
    for part in ("unet", "text_encoder"):
        assert metadata[f"{part}.r"] == RANK
        assert metadata[f"{part}.lora_alpha"] == RANK  # the scale is multiplied into B
        assert not metadata[f"{part}.use_rslora"]
        assert metadata[f"{part}.lora_dropout"] == 0
        assert metadata[f"{part}.base_model_name_or_path"] is None  # no path of this machine
    assert metadata["unet.target_modules"] == sorted(TARGETS)  # a set's order would differ between runs
    assert metadata["text_encoder.target_modules"] == sorted(TEXT_ENCODER_TARGETS["attention"])


ALL = schema.TARGETS["all"]


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    """The pipeline of diffusers, to be copied."""
    return StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "targets"), [("lora", ALL), ("dora", ALL), ("rslora", TARGETS), ("lora", ["proj_in", "to_q"])]
)
def test_diffusers_loads_all_of_it_at_its_strength(
    variant: str, targets: list[str], stock: StableDiffusionPipeline, model: BaseModel, base: BaseModel,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Whatever its first key is; DoRA's magnitudes of both parts; alpha is the rank.

    Also without metadata, as before diffusers 0.34.
    """
    plain = noise_pred(model)
    randomise(attach(base, variant=variant, targets=targets, text_encoder_targets="all"))
    live = noise_pred(base)
    assert (live - plain).norm() > 0.05 * plain.norm()
    file = lora.save_adapter(base, tmp_path)
    for _ in ("with metadata", "without"):
        pipeline = StableDiffusionPipeline(**deepcopy(stock.components), requires_safety_checker=False)
        pipeline.load_lora_weights(tmp_path)
        theirs = replace(model, unet=pipeline.unet.eval(), text_encoder=pipeline.text_encoder.eval())
        torch.testing.assert_close(noise_pred(theirs), live, rtol=0, atol=1e-5 * live.abs().max().item())
        save_file(load_file(file), file)


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_our_reader_reads_it_as_it_was_trained(
    variant: str, model: BaseModel, base: BaseModel, tmp_path: Path
) -> None:
    randomise(attach(base, variant=variant, targets=ALL, text_encoder_targets="all"))
    adapter = read_adapter(lora.save_adapter(base, tmp_path), base, "adapter")
    assert adapter.kinds == ["DoRA" if variant == "dora" else "LoRA"]
    fresh, live = deepcopy(model), noise_pred(base)
    wanted = lora.layers_to_train(fresh, options_of(targets=ALL, text_encoder_targets="all"))
    assert adapter.layers.keys() == wanted
    apply.load_adapters(fresh, [(adapter, 1.0)])
    torch.testing.assert_close(noise_pred(fresh), live, rtol=0, atol=1e-5 * live.abs().max().item())


def test_a_file_of_an_earlier_version_reads_as_before(
    model: BaseModel, base: BaseModel, tmp_path: Path
) -> None:
    """B unscaled, alpha in the metadata alone, older names for attention, magnitudes without `.weight`."""
    live = randomise(attach(base, variant="dora"))
    names = {"lora_A": "lora.down", "lora_B": "lora.up"}
    state, settings = {}, {}
    for part, module in live.adaptable.items():
        for key, value in get_peft_model_state_dict(module, adapter_name="default").items():
            old = key.removeprefix("text_model.")
            old = old.replace(".weight", "") if "magnitude" in old else old
            for new, older in names.items() if part == "unet" else ():
                old = old.replace(new, older)
            state[f"{part}.{'' if part == 'unet' else 'text_model.'}{old}"] = value
        settings |= {f"{part}.r": RANK, f"{part}.lora_alpha": ALPHA, f"{part}.use_dora": True}
    assert any(key.endswith("lora.up.weight") for key in state)
    save_file(state, tmp_path / ADAPTER_FILE, {"lora_adapter_metadata": json.dumps(settings)})
    fresh, wanted = deepcopy(model), noise_pred(live)
    apply.merge(fresh, tmp_path, 1.0)
    torch.testing.assert_close(noise_pred(fresh), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# Merging a file into a base


def test_merge_adds_scaled_b_a_and_leaves_an_ordinary_base(
    model: BaseModel, base: BaseModel, tmp_path: Path
) -> None:
    scale = 0.4
    weights = lora.trainable(randomise(attach(base)))
    lora.save_adapter(base, tmp_path)
    merged, by_hand = deepcopy(model), deepcopy(model)
    names = [set(part.state_dict()) for part in (merged.unet, merged.text_encoder)]
    add_by_hand(by_hand, weights, scale * SCALE)
    apply.merge(merged, tmp_path, scale)
    torch.testing.assert_close(noise_pred(merged), noise_pred(by_hand), rtol=0, atol=1e-5)
    assert [set(part.state_dict()) for part in (merged.unet, merged.text_encoder)] == names
    before = noise_pred(merged)
    assert torch.equal(noise_pred(attach(merged)), before), "a new adapter starts from the merged base"


def test_merge_refuses_what_does_not_fit(model: BaseModel, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.adapter=.*: no pytorch_lora_weights"):
        apply.merge(base, tmp_path / "nothing", 1)
    fitting = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"

    def adapter_of(layer: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{layer}.down.weight": torch.zeros(4, width), f"{layer}.up.weight": torch.zeros(width, 4)}

    unfit = [
        adapter_of(fitting, 999),
        adapter_of("unet.no_such_block.to_q.lora", 8),
        {"something": torch.zeros(3)},
    ]
    for number, content in enumerate(unfit):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(content, folder / ADAPTER_FILE)
        with pytest.raises(UserError, match=r"model\.adapter=.* does not fit"):
            apply.merge(deepcopy(model), folder, 1)
