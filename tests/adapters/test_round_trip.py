"""Written by us, read by us, written again: the same bytes, and the noise that the live model predicts."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import KINDS, adapter_state, fits
from safetensors.torch import save_file

from ghibli.adapters import kohya, lora
from ghibli.adapters.apply import add_to_weights, load_adapters
from ghibli.adapters.factorize import Size, combine, extract, resize
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Layer
from ghibli.adapters.names import named_layers
from ghibli.adapters.start import start_from
from ghibli.adapters.subset import write_subset
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel

RANK = 4
BLOCK = "up_blocks.2.attentions.1.transformer_blocks.0"
LINEAR = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "mid_block.attentions.0.proj_in"]
KERNELS = ["down_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv2"]
OF_TEXT = ["layers.0.self_attn.q_proj", "layers.1.mlp.fc1"]
PLACES = [
    *(f"unet.{name}" for name in LINEAR + KERNELS),
    *(f"text_encoder.encoder.{name}" for name in OF_TEXT),
]
VARIANTS = ("lora", "rslora", "dora", "loha", "lokr", "oft")
PARTS = {"both": ("unet", "text_encoder"), "UNet": ("unet",), "text encoder": ("text_encoder",)}


def options_of(variant: str, parts: tuple[str, ...]) -> LoraConfig:
    """Settings whose scale is not 1, but for oft, which has none."""
    targets = LINEAR + (KERNELS if variant != "oft" else []) if "unet" in parts else []
    rank = 3 if variant == "rslora" else RANK  # whose root no float holds
    return LoraConfig(
        rank=rank, alpha=rank if variant == "oft" else 6.0, dropout=0.1, targets=targets,
        text_encoder="text_encoder" in parts, text_encoder_targets=OF_TEXT, variant=variant, init=None,
    )  # fmt: skip


def trained(model: BaseModel, options: LoraConfig) -> BaseModel:
    """The live model of a run: PEFT's layers on a copy of the base, all their weights random."""
    base = deepcopy(model)
    lora.add_lora(base, options, 0)
    draw = torch.Generator().manual_seed(5)
    for parameter in lora.trainable(base).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return base


@torch.no_grad()
def noise_pred(base: BaseModel) -> torch.Tensor:
    """Predict two latents at two timesteps, each with a prompt: (2, 4, 8, 8)."""
    for part in base.adaptable.values():
        part.eval()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    embeds = base.encode_prompts(base.tokenize(["a girl standing in a greenhouse", ""]))
    return base.unet(latents, torch.tensor([100, 800]), embeds).sample


def check_noise(adapter: Adapter, model: BaseModel, wanted: torch.Tensor) -> None:
    """Assert that an adapter beside the base predicts this noise, and the base another."""
    beside, limit = deepcopy(model), 1e-5 * wanted.abs().max().item()
    assert (noise_pred(beside) - wanted).abs().max() > 100 * limit
    load_adapters(beside, [(adapter, 1.0)])
    torch.testing.assert_close(noise_pred(beside), wanted, rtol=0, atol=limit)


def written_in_kohyas_layout(
    layers: dict[str, Layer], metadata: dict[str, str], model: BaseModel, folder: Path
) -> Adapter:
    """Write layers, read them, write what was read: assert the same bytes, and return what was read."""
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    kohya.write_kohya(Adapter(first, "", layers, {}), first, metadata, model)
    again = read_adapter(first, model, "it")
    assert (again.layout, again.layers.keys(), again.metadata) == ("kohya", layers.keys(), metadata)
    kohya.write_kohya(again, second, again.metadata, model)
    assert first.read_bytes() == second.read_bytes()
    return again


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_trained_adapter(variant: str, parts: str, model: BaseModel, tmp_path: Path) -> None:
    """Through diffusers' layout by fresh layers of a run, as with lora.init, and through kohya's."""
    options = options_of(variant, PARTS[parts])
    live = trained(model, options)
    wanted = noise_pred(live)
    file = lora.save_adapter(live, tmp_path / "first")
    adapter = read_adapter(file, model, "it")
    assert {name.partition(".")[0] for name in adapter.layers} == set(PARTS[parts])
    check_noise(adapter, model, wanted)
    for again in {variant, "lora" if variant == "rslora" else variant}:
        # the scale is in a factor: alpha / rank is 1 now, and rslora's alpha / sqrt(rank)
        alpha = options.rank**0.5 if again == "rslora" else float(options.rank)
        further = replace(options, variant=again, alpha=alpha)
        fresh = deepcopy(model)
        lora.add_lora(fresh, further, 1)
        start_from(adapter, lora.trainable(fresh), further)
        assert lora.save_adapter(fresh, tmp_path / again).read_bytes() == file.read_bytes()
    in_kohyas = written_in_kohyas_layout(adapter.layers, {"ss_network_dim": "4"}, model, tmp_path)
    check_noise(in_kohyas, model, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_part_of_a_trained_adapter(variant: str, model: BaseModel, tmp_path: Path) -> None:
    """As `ghibli slim` writes it: every second layer."""
    file = lora.save_adapter(trained(model, options_of(variant, PARTS["both"])), tmp_path)
    whole = read_adapter(file, model, "it")
    layers = {name: whole.layers[name] for name in list(whole.layers)[::2]}
    for adapter, name in ((whole, "first"), (None, "second")):
        adapter = adapter or read_adapter(tmp_path / "first.safetensors", model, "it")
        write_subset(
            adapter, {each: adapter.layers[each] for each in layers}, model, tmp_path / f"{name}.safetensors"
        )
    first, second = (tmp_path / f"{name}.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    check_noise(read_adapter(first, model, "it"), model, noise_of(layers, model))


@torch.no_grad()
def noise_of(layers: dict[str, Layer], model: BaseModel) -> torch.Tensor:
    """Predict noise with W' of each layer computed in float64 and put in place of W."""
    base = deepcopy(model)
    for name, layer in named_layers(base).items():
        if name in layers:
            weight = layer.weight.double()
            layer.weight.copy_((weight + layers[name].delta(weight)).float())
    return noise_pred(base)


def file_of(
    kind: str, model: BaseModel, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """A file of one kind as LyCORIS writes it, small enough for the model to go on working."""
    shapes = {name: named_layers(model)[name].weight.shape for name in PLACES}
    kinds = {name: kind for name, shape in shapes.items() if fits(kind, shape)}
    small = ("lora_up.weight", "hada_w1_a", "lokr_w1", "diff", "oft_blocks")
    state = {
        key: ((0.2 if key.endswith(small) else 1) * value).to(dtype)
        for key, value in adapter_state(model, kinds, seed).items()
    }
    save_file(state, folder / f"{kind}{seed}.safetensors")
    return read_adapter(folder / f"{kind}{seed}.safetensors", model, "it")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_every_kind(kind: str, model: BaseModel, tmp_path: Path) -> None:
    adapter = file_of(kind, model, tmp_path)
    assert len(adapter.layers) >= 2
    again = written_in_kohyas_layout(adapter.layers, {}, model, tmp_path)
    check_noise(again, model, noise_of(adapter.layers, model))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "oft", "dora_in"])
def test_a_file_of_16_bits(kind: str, model: BaseModel, tmp_path: Path) -> None:
    """Factors stay as they are."""
    for dtype in (torch.float16, torch.bfloat16):
        adapter = file_of(kind, model, tmp_path, dtype=dtype)
        again = written_in_kohyas_layout(adapter.layers, {}, model, tmp_path)
        assert {layer.dtype for layer in again.layers.values()} == {dtype}
        for name, layer in adapter.layers.items():
            weight = named_layers(model)[name].weight.double()
            assert torch.equal(again.layers[name].delta(weight), layer.delta(weight))


@pytest.mark.parametrize("kind", ["tucker", "loha_tucker", "lokr_tucker"])
def test_a_decomposition_in_16_bits(kind: str, model: BaseModel, tmp_path: Path) -> None:
    """A core is multiplied into a factor, which is rounded once."""
    for dtype in (torch.float16, torch.bfloat16):
        adapter = file_of(kind, model, tmp_path, dtype=dtype)
        again = written_in_kohyas_layout(adapter.layers, {}, model, tmp_path)
        for name, layer in adapter.layers.items():
            weight = named_layers(model)[name].weight.double()
            wanted = layer.delta(weight)
            apart = (again.layers[name].delta(weight) - wanted).norm() / wanted.norm()
            assert again.layers[name].dtype == dtype and 0 < apart < torch.finfo(dtype).eps


def resized(model: BaseModel, folder: Path) -> dict[str, Layer]:
    return resize(file_of("loha", model, folder), model, Size(keep=0.9)).layers


def added(model: BaseModel, folder: Path) -> dict[str, Layer]:
    pair = [(file_of("lora", model, folder), 0.7), (file_of("lora", model, folder, 9), -0.5)]
    return combine(pair, model, None).layers


def added_as_differences(model: BaseModel, folder: Path) -> dict[str, Layer]:
    pair = [(file_of("lora", model, folder), 0.7), (file_of("dora_out", model, folder, 9), 0.5)]
    return combine(pair, model, None).layers


def added_at_a_rank(model: BaseModel, folder: Path) -> dict[str, Layer]:
    pair = [(file_of("lokr", model, folder), 0.7), (file_of("tucker", model, folder, 9), 0.5)]
    return combine(pair, model, Size(rank=2)).layers


def extracted(model: BaseModel, folder: Path) -> dict[str, Layer]:
    tuned = deepcopy(model)
    add_to_weights(tuned, file_of("full", model, folder), 1.0)
    return extract(tuned, model, Size(rank=5))[0].layers


@pytest.mark.slow
@pytest.mark.parametrize("make", [resized, added, added_as_differences, added_at_a_rank, extracted])
def test_a_file_of_our_commands(
    make: Callable[[BaseModel, Path], dict[str, Layer]], model: BaseModel, tmp_path: Path
) -> None:
    """As `ghibli resize`, `merge` and `extract` write it."""
    layers = make(model, tmp_path)
    again = written_in_kohyas_layout(layers, {"ss_seed": "3", "ss_output_name": "it"}, model, tmp_path)
    check_noise(again, model, noise_of(layers, model))
