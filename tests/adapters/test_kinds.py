"""The table of kinds in docs/export.md by its cells: a kind in a use, against its formula in float64."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import KINDS, adapter_state, difference, fits, layer_tensors
from safetensors.torch import save_file
from torch.nn import functional

from ghibli.adapters import kohya
from ghibli.adapters.apply import load_adapters, merge
from ghibli.adapters.factorize import Size, combine, resize
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.names import kohya_name, named_layers
from ghibli.config.paths import ADAPTER_FILE
from ghibli.models.base import BaseModel

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 64 inputs, 128 outputs
CONV = "unet.down_blocks.1.resnets.0.conv1"
ROWS = [*KINDS, "oft of PEFT"]
Differences = dict[str, torch.Tensor]  # W' - W by layer, float64


@pytest.fixture
def base(model: BaseModel) -> BaseModel:
    """A base whose UNet may be changed."""
    return replace(model, unet=deepcopy(model.unet))


def file_of(kind: str, base: BaseModel, folder: Path, seed: int = 0) -> tuple[Adapter, Differences]:
    """Write and read a file of one kind, for a linear layer and a convolution; return what it should be."""
    weights = {name: named_layers(base)[name].weight.detach().double() for name in (LINEAR, CONV)}
    if kind == "oft of PEFT":
        return oft_of_peft(weights[LINEAR], base, folder)
    names = [name for name, weight in weights.items() if fits(kind, weight.shape)]
    save_file(adapter_state(base, dict.fromkeys(names, kind), seed), folder / ADAPTER_FILE)
    wanted = {
        name: difference(kind, weights[name], layer_tensors(kind, weights[name].shape, seed + number))
        for number, name in enumerate(names)
    }
    return read_adapter(folder, base, "adapter"), wanted


def oft_of_peft(weight: torch.Tensor, base: BaseModel, folder: Path) -> tuple[Adapter, Differences]:
    """Its file and its W' - W: W R^T with R = (1 - Q) (1 + Q)^-1 in blocks, here 4 of 16 inputs.

    `test_variants.py` compares the same with PEFT's layer, and the series, which is PEFT's default.
    """
    angles = 0.3 * torch.randn(4, 120, generator=torch.Generator().manual_seed(1))
    settings = {"lora_adapter_metadata": '{"unet.use_cayley_neumann": false}'}
    save_file({f"{LINEAR}.oft_R.weight": angles}, folder / ADAPTER_FILE, settings)
    skew = torch.zeros(4, 16, 16).double()
    rows, columns = torch.triu_indices(16, 16, 1)
    skew[:, rows, columns], skew[:, columns, rows] = angles.double(), -angles.double()
    one = torch.eye(16).double()
    rotation = torch.block_diag(*((one - each) @ torch.linalg.inv(one + each) for each in skew))
    return read_adapter(folder, base, "adapter"), {LINEAR: weight @ rotation.T - weight}


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest, model: BaseModel, tmp_path: Path) -> tuple[Adapter, Differences]:
    """A file of one kind, and its W' - W."""
    return file_of(request.param, model, tmp_path)


@pytest.fixture
def other(model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Differences]:
    """A plain LoRA of the same layers."""
    return file_of("lora", model, tmp_path_factory.mktemp("other"), seed=50)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Assert that two tensors agree to 1e-5 of the largest value, which is not 0."""
    largest = wanted.abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(found.detach().double(), wanted, rtol=0, atol=1e-5 * largest)


def output(layer: Callable, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return a layer's output without its bias, and that of a weight, for the same random inputs."""
    shape = (2, weight.shape[1], 6, 6) if weight.ndim == 4 else (3, weight.shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    apply = functional.linear if weight.ndim == 2 else lambda *given: functional.conv2d(*given, padding=1)
    return layer(x), apply(x.double(), weight, None if bias is None else bias.double())


def test_import(case: tuple[Adapter, Differences], model: BaseModel) -> None:
    adapter, wanted = case
    assert adapter.layers.keys() == wanted.keys()
    for name, expected in wanted.items():
        found = adapter.layers[name].delta(named_layers(model)[name].weight.double())
        torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2], ids=["generate", "combine"])
def test_beside_the_base(
    count: int, case: tuple[Adapter, Differences], other: tuple[Adapter, Differences], base: BaseModel
) -> None:
    """What the layers compute: with one adapter at 0.7, and with a second at -0.4."""
    files = [(case, 0.7), (other, -0.4)][:count]
    layers = dict(named_layers(base))
    weights = {name: layers[name].weight.detach().double() for name in case[1]}
    for (_, wanted), scale in files:
        weights = {name: weight + scale * wanted[name] for name, weight in weights.items()}
    load_adapters(base, [(adapter, scale) for (adapter, _), scale in files])
    for name, weight in weights.items():
        adapted = base.unet.get_submodule(name.removeprefix("unet."))
        close(*output(adapted, weight, layers[name].bias))


def test_merge(case: tuple[Adapter, Differences], base: BaseModel) -> None:
    """Into the base's weights, at 0.7."""
    adapter, wanted = case
    before = {name: layer.weight.detach().double() for name, layer in named_layers(base).items()}
    merge(base, adapter.file.parent, 0.7)
    for name, layer in named_layers(base).items():
        if name in wanted:
            close(layer.weight - before[name], 0.7 * wanted[name])
        else:
            assert torch.equal(layer.weight.double(), before[name])


def test_kohyas_layout(
    case: tuple[Adapter, Differences], model: BaseModel, request: pytest.FixtureRequest
) -> None:
    """The written tensors are those that were read, but for what others read wrongly: DoRA, OFT, Tucker."""
    adapter, wanted = case
    kind = request.node.callspec.params["case"]
    state = kohya.to_kohya(adapter, model)
    whole = ("dora_out", "loha_dora", "oft of PEFT")
    without_core = {"tucker": "lora", "loha_tucker": "loha", "lokr_tucker": "lokr"}
    written = "full" if kind in whole else without_core.get(kind, kind)
    for name, expected in wanted.items():
        prefix = f"{kohya_name(name)}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        weight = named_layers(model)[name].weight.detach().double()
        assert own.keys() == layer_tensors(written, weight.shape, 0).keys()
        close(difference(written, weight, own), expected)


def test_resize(case: tuple[Adapter, Differences], model: BaseModel) -> None:
    """To rank 2: the distance is the norm of the singular values left out."""
    adapter, wanted = case
    found = resize(adapter, model, Size(rank=2)).layers
    for name, expected in wanted.items():
        exact = expected.flatten(1)
        small = found[name].delta(named_layers(model)[name].weight.double()).detach().flatten(1)
        left_out = torch.linalg.svdvals(exact)[2:].norm()
        assert found[name].kind == "LoRA" and found[name].rank == 2
        assert float((small - exact).norm()) == pytest.approx(float(left_out), rel=1e-5)


def test_merge_of_files(
    case: tuple[Adapter, Differences], other: tuple[Adapter, Differences], model: BaseModel
) -> None:
    """Exactly, the kind at 0.7 and a plain LoRA at -0.4."""
    found = combine([(case[0], 0.7), (other[0], -0.4)], model, None).layers
    for name, expected in other[1].items():
        expected = 0.7 * case[1][name] - 0.4 * expected if name in case[1] else -0.4 * expected
        close(found[name].delta(named_layers(model)[name].weight.double()), expected)
