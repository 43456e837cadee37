"""Parts of an adapter, against singular values in float64; their files, as a stock diffusers loads them."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ghibli.adapters import kohya, lora
from ghibli.adapters.apply import load_adapters
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Layer
from ghibli.adapters.names import named_layers
from ghibli.adapters.subset import parameters_of, split, write_subset
from ghibli.config.paths import DEMO
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.models.load import load

OPTIONS = {
    "rank": 6, "alpha": 3.0, "dropout": 0.1, "text_encoder": True, "text_encoder_targets": ["q_proj"],
    "targets": ["to_q", "to_v"], "init": None, "variant": "lora",
}  # fmt: skip


def trained(folder: Path, **changes: object) -> Adapter:
    """An adapter file as a run writes it, with random weights."""
    live = load("demo")
    lora.add_lora(live, LoraConfig(**(OPTIONS | changes)), seed=0)
    draw = torch.Generator().manual_seed(3)
    for weights in lora.trainable(live).values():
        weights.data = weights.data + 0.2 * torch.randn(weights.shape, generator=draw)
    return read_adapter(lora.save_adapter(live, folder), load("demo"), "it")


def cut(adapter: Adapter, base: BaseModel) -> dict[str, Layer]:
    """Every third layer is left out; of the others 1, 2, ... parts stay."""
    parts = split(adapter, base)
    names = [name for place, name in enumerate(parts) if place % 3]
    return {name: parts[name].first(1 + place % 6) for place, name in enumerate(names)}


def test_a_part_is_the_nearest_matrix_of_its_rank(tmp_path: Path, base: BaseModel) -> None:
    adapter = trained(tmp_path)
    for name, parts in split(adapter, base).items():
        weight = named_layers(base)[name].weight.double()
        exact = adapter.layers[name].delta(weight).flatten(1)
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        nearest = (left[:, :2] * values[:2]) @ right[:2]
        torch.testing.assert_close(parts.first(2).delta(weight).flatten(1), nearest, atol=1e-7, rtol=1e-4)
        shares = (values.square() / values.square().sum())[:6].tolist()
        assert parts.shares == pytest.approx(shares, abs=1e-6) and len(parts.shares) == 6
        assert parameters_of(parts.first(2)) == 2 * parts.parameters == 2 * sum(exact.shape)
        torch.testing.assert_close(parts.first(6).delta(weight).flatten(1), exact, atol=1e-7, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "layout"), [("lora", "diffusers"), ("dora", "diffusers"), ("lora", "kohya")]
)
def test_a_stock_pipeline_loads_every_rank_at_its_strength(
    tmp_path: Path, base: BaseModel, variant: str, layout: str
) -> None:
    """diffusers' loader and PEFT's layers give the noise of our own, and of a file without the rest."""
    whole = trained(tmp_path / "whole", variant=variant, text_encoder=layout == "diffusers")
    layers = cut(whole, base)
    assert variant == "dora" or {layer.rank for layer in layers.values()} == {1, 2, 3, 4, 5, 6}
    file = tmp_path / "part.safetensors"
    if layout == "diffusers":
        write_subset(whole, layers, base, file)
        assert set(read_adapter(file, base, "it").layers) == set(layers)
    else:  # of the UNet: diffusers reads no text encoder without out_proj in this layout
        kohya.write_kohya(Adapter(file, "kohya", layers, {}), file, {}, base)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    ids, times = base.tokenize(["a house by a lake", ""]), torch.tensor([250, 750])
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    load_adapters(base, [(Adapter(file, "it", layers, {}), 1.0)])
    with torch.no_grad():
        theirs = pipeline.unet.eval()(latents, times, pipeline.text_encoder.eval()(ids)[0]).sample
        ours = base.unet(latents, times, base.encode_prompts(ids)).sample
        fresh = load("demo")
        untouched = fresh.unet(latents, times, fresh.encode_prompts(ids)).sample
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5
    assert float((untouched - ours).abs().max() / ours.abs().max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dora", "loha", "lokr", "oft"])
def test_of_other_kinds_whole_layers_are_copied(tmp_path: Path, base: BaseModel, variant: str) -> None:
    changes = {"rank": 2, "targets": ["to_q"], "text_encoder_targets": ["q_proj"]}
    whole = trained(tmp_path / "whole", variant=variant, **changes)
    parts = split(whole, base)
    assert all(each.shares == [1.0] and each.first(1) is each.layer for each in parts.values())
    layers = {name: each.first(1) for name, each in list(parts.items())[::2]}
    file = tmp_path / "part.safetensors"
    write_subset(whole, layers, base, file)
    content, before = load_file(file), load_file(whole.file)
    assert all(torch.equal(before[key], tensor) for key, tensor in content.items())
    again = read_adapter(file, base, "it").layers
    assert set(again) == set(layers) and len(content) < len(before)
    for name, layer in layers.items():
        weight = named_layers(base)[name].weight.double()
        assert torch.equal(again[name].delta(weight), layer.delta(weight))
