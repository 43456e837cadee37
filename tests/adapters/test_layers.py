"""W' - W of every kind of update, against LyCORIS's modules, PEFT's layers and the formulas in float64."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_files import ALPHA, KINDS, RANK, adapter_state, fits, layer_tensors
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from ghibli.adapters import apply, kohya
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Layer, same_update, to_factors
from ghibli.adapters.names import kohya_name, named_layers
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 64 inputs, 128 outputs
CONV = "unet.down_blocks.1.resnets.0.conv1"
CASES = [(kind, name) for kind in KINDS for name in (LINEAR, CONV) if "tucker" not in kind or name == CONV]


def read(base: BaseModel, state: dict[str, torch.Tensor], folder: Path) -> Adapter:
    save_file(state, folder / "it.safetensors")
    return read_adapter(folder / "it.safetensors", base, "adapter")


def layer_of(
    base: BaseModel, kind: str, name: str, folder: Path
) -> tuple[Layer, Any, dict[str, torch.Tensor]]:
    """Return a layer as read, the base's layer, and the layer's tensors by their endings."""
    target = deepcopy(named_layers(base)[name])
    layer = read(base, adapter_state(base, {name: kind}), folder).layers[name]
    return layer, target, layer_tensors(kind, target.weight.shape, 0)


@torch.no_grad()
def lycoris_output(kind: str, target: Any, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute a layer's output with LyCORIS's own module around it."""
    lycoris = pytest.importorskip("lycoris.modules")
    options = {
        "use_tucker": "tucker" in kind,
        "weight_decompose": "dora" in kind,
        "wd_on_out": kind != "dora_in",
    }
    classes = {"loha": lycoris.LohaModule, "lokr": lycoris.LokrModule, "full": lycoris.FullModule}
    module_class = classes.get(kind.split("_")[0], lycoris.LoConModule)
    if module_class is lycoris.LokrModule:
        options |= {"factor": 2, "full_matrix": kind == "lokr_whole"}
    if kind == "oft":
        module = lycoris.DiagOFTModule("x", target, 1.0, 4)
    else:
        module = module_class("x", target, 1.0, RANK, ALPHA, **options)
    own = (
        {"weight": tensors["diff"]} if kind == "full" else {k: v for k, v in tensors.items() if k != "alpha"}
    )
    parameters = dict(module.named_parameters())
    for ending, tensor in own.items():
        parameters[ending].copy_(tensor.reshape(parameters[ending].shape))
    module.org_forward = target.forward
    return module.eval()(x)


@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_every_kind_is_what_lycoris_computes(kind: str, name: str, model: BaseModel, tmp_path: Path) -> None:
    layer, target, tensors = layer_of(model, kind, name, tmp_path)
    shape = (2, target.weight.shape[1], 6, 6) if target.weight.ndim == 4 else (3, target.weight.shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    theirs, untouched = lycoris_output(kind, target, tensors, x), target(x)
    assert (theirs - untouched).abs().max() > 0.1 * untouched.abs().max(), "the update is there to be seen"
    target.weight += layer.delta(target.weight.double()).float()
    torch.testing.assert_close(target(x), theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", [LINEAR, CONV])
@torch.no_grad()
def test_dora_is_pefts_layer(name: str, model: BaseModel, tmp_path: Path) -> None:
    """The norm over the inputs of each output, as in the paper: what PEFT merges is W'."""
    layer, target, tensors = layer_of(model, "dora_out", name, tmp_path)
    wanted = layer.delta(target.weight.double())
    holder = nn.Sequential(target)
    config = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True)
    theirs: Any = inject_adapter_in_model(config, holder)[0]
    weight = target.weight.double().clone()
    theirs.lora_A["default"].weight.copy_(tensors["lora_down.weight"])
    theirs.lora_B["default"].weight.copy_(tensors["lora_up.weight"])
    magnitude = theirs.lora_magnitude_vector["default"].weight
    magnitude.copy_(tensors["dora_scale"].reshape(magnitude.shape))
    theirs.merge()
    torch.testing.assert_close(theirs.get_base_layer().weight.double() - weight, wanted, rtol=0, atol=1e-5)


def test_dora_is_its_formula(model: BaseModel, tmp_path: Path) -> None:
    """m V / |V|, V = W + s B A, written out in float64: |V| over a row for one magnitude an output."""
    for kind, axis in (("dora_out", 1), ("dora_in", 0)):
        layer, target, tensors = layer_of(model, kind, LINEAR, tmp_path)
        weight, up, down, m = (
            each.detach().double()
            for each in (
                target.weight,
                tensors["lora_up.weight"],
                tensors["lora_down.weight"],
                tensors["dora_scale"],
            )
        )
        v = weight + ALPHA / RANK * up @ down
        wanted = m * v / (v**2).sum(axis, keepdim=True).sqrt() - weight
        torch.testing.assert_close(layer.delta(weight), wanted, rtol=1e-12, atol=1e-12)


def test_oft_keeps_lengths_and_angles(model: BaseModel, tmp_path: Path) -> None:
    layer, target, _ = layer_of(model, "oft", LINEAR, tmp_path)
    before = target.weight.detach().double().reshape(-1, 4, target.weight.shape[1])
    after = before + layer.delta(target.weight.double()).detach().reshape(before.shape)
    gram = [each.transpose(1, 2) @ each for each in (before, after)]
    torch.testing.assert_close(gram[1], gram[0], rtol=1e-9, atol=1e-9)
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_factors_are_the_difference(kind: str, name: str, model: BaseModel, tmp_path: Path) -> None:
    layer, target, _ = layer_of(model, kind, name, tmp_path)
    down, up = to_factors(layer, target.weight)
    torch.testing.assert_close(
        (up.flatten(1) @ down.flatten(1)).reshape(target.weight.shape),
        layer.delta(target.weight.double()).detach().float(), rtol=0, atol=1e-6,
    )  # fmt: skip
    assert down.shape[0] <= min(target.weight.flatten(1).shape)
    assert down.shape[1:] == target.weight.shape[1:] and up.shape[0] == target.weight.shape[0]


# On a base


@torch.no_grad()
def predict(base: BaseModel) -> torch.Tensor:
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(2))
    prompt_embeds = base.encode_prompts(base.tokenize(["a panda on a train", "a red boat"]))
    return base.unet(latents, torch.tensor([10, 700]), prompt_embeds, return_dict=False)[0]


def all_kinds(base: BaseModel, only: str | None = None) -> dict[str, str]:
    """A kind for every third layer of the base, all of them in turn or one."""
    kinds = {}
    for number, (name, layer) in enumerate(list(named_layers(base).items())[::3]):
        kind = only or KINDS[number % len(KINDS)]
        if fits(kind, layer.weight.shape):
            kinds[name] = kind
    return kinds


def scaled_down(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the updates so small that 50 of them leave a working model: all but DoRA's magnitudes."""
    small = ("lora_up.weight", "hada_w1_a", "lokr_w1", "diff", "oft_blocks")
    return {key: 0.05 * value if key.endswith(small) else value for key, value in state.items()}


@pytest.fixture
def every_kind(base: BaseModel, tmp_path: Path) -> Adapter:
    return read(base, scaled_down(adapter_state(base, all_kinds(base))), tmp_path)


def test_weight_0_is_the_base_bit_for_bit(base: BaseModel, every_kind: Adapter) -> None:
    """Also for DoRA, whose magnitudes would stay if PEFT applied them."""
    assert len(every_kind.kinds) >= 6
    before = predict(base)
    apply.load_adapters(base, [(every_kind, 1.0)])
    assert (predict(base) - before).abs().max() > 0.1 * before.abs().max()
    apply.set_weights(base, [0.0])
    assert torch.equal(predict(base), before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_is_finite(weight: float, base: BaseModel, every_kind: Adapter) -> None:
    with pytest.raises(UserError, match=f"an adapter cannot have the weight {weight}: give a finite number"):
        apply.load_adapters(base, [(every_kind, weight)])


def test_an_update_that_overflows_is_named(base: BaseModel, tmp_path: Path) -> None:
    """Every number of the file is finite; what they multiply to is not."""
    state = {key: 1e30 * value for key, value in adapter_state(base, {LINEAR: "loha"}).items()}
    adapter = read(base, state, tmp_path)
    for use in (
        lambda: apply.load_adapters(base, [(adapter, 1.0)]),
        lambda: apply.add_to_weights(base, adapter, 1.0),
    ):
        with pytest.raises(UserError, match="attn2.to_k: its update is not finite"):
            use()


def test_merged_is_what_is_added_beside(base: BaseModel, every_kind: Adapter) -> None:
    """At a weight that is not 1, against the sum W + 0.6 (W' - W) made by hand in float64."""
    untouched = {name: layer.weight.detach().clone() for name, layer in named_layers(base).items()}
    apply.load_adapters(base, [(every_kind, 0.6)])
    beside = predict(base)
    for name, layer in named_layers(base).items():
        assert torch.equal(layer.weight, untouched[name])
        if name in every_kind.layers:
            change = every_kind.layers[name].delta(untouched[name].double())
            layer.weight.data = (untouched[name].double() + 0.6 * change).float()
    apply.set_weights(base, [0.0])
    torch.testing.assert_close(beside, predict(base), rtol=0, atol=1e-5 * beside.abs().max().item())


def test_two_of_any_kind_add_up(
    base: BaseModel, every_kind: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a library say a word: PEFT would warn of every second adapter."""
    folder = tmp_path / "other"
    folder.mkdir()
    other = read(base, adapter_state(base, {LINEAR: "dora_in", CONV: "loha"}, seed=50), folder)
    layer = named_layers(base)[LINEAR]
    expected = layer.weight.double().detach().clone()
    expected += sum(
        weight * each.layers[LINEAR].delta(layer.weight.double()).detach()
        for each, weight in ((every_kind, 0.7), (other, -0.4))
        if LINEAR in each.layers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply.load_adapters(base, [(every_kind, 0.7), (other, -0.4)])
    assert not caplog.records
    adapted = base.unet.get_submodule(LINEAR.removeprefix("unet."))
    x = torch.randn(3, layer.weight.shape[1])
    torch.testing.assert_close(adapted(x).double(), x.double() @ expected.T, rtol=0, atol=1e-4)


def test_the_same_adapter_with_other_alphas_draws_the_same(base: BaseModel, tmp_path: Path) -> None:
    """Double alpha, halve B in every second layer, as resizing to dynamic ranks leaves files: bit for bit."""
    state = scaled_down(adapter_state(base, all_kinds(base, "lora")))
    twin = dict(state)
    for key in [key for key in state if key.endswith(".alpha")][::2]:
        twin[key] = 2 * state[key]
        twin[key.replace(".alpha", ".lora_up.weight")] = state[key.replace(".alpha", ".lora_up.weight")] / 2
    drawn = []
    for number, each in enumerate((state, twin)):
        folder = tmp_path / str(number)
        folder.mkdir()
        adapter = read(base, each, folder)
        assert adapter.alphas == ([ALPHA] if number == 0 else [ALPHA, 2 * ALPHA])
        apply.load_adapters(base, [(adapter, 1.0)])
        drawn.append(predict(base))
        apply.set_weights(base, [0.0])
    before = predict(base)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], before)


# Written again


def test_written_in_kohyas_layout_and_read_again(
    base: BaseModel, every_kind: Adapter, tmp_path: Path
) -> None:
    """The same updates and the same bytes, with what others read wrongly in another form.

    DoRA per output is a difference, and a Tucker decomposition two factors.
    """
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    kohya.write_kohya(every_kind, first, {}, base)
    again = read_adapter(first, base, "adapter")
    assert again.layers.keys() == every_kind.layers.keys()
    for name, layer in every_kind.layers.items():
        weight = named_layers(base)[name].weight.double()
        if layer.per_output:
            assert again.layers[name].kind == "full difference"
        else:
            assert again.layers[name].kind == layer.kind.replace("LoCon", "LoRA")
            has_core = not {"mid", "t1", "t2"}.isdisjoint(layer.tensors)
            assert same_update(again.layers[name], layer) != has_core
        torch.testing.assert_close(again.layers[name].delta(weight), layer.delta(weight), rtol=0, atol=1e-6)
    kohya.write_kohya(again, second, {}, base)
    assert first.read_bytes() == second.read_bytes()


def norm_of_comfyui(weight: torch.Tensor, change: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Apply DoRA as ComfyUI does: with one magnitude an output, by the norm of W, without the change."""
    v, per_output = weight + change, m.shape[0] == weight.shape[0]
    flat = weight.flatten(1) if per_output else v.transpose(0, 1).flatten(1)
    norm = flat.norm(dim=1).reshape(m.shape)
    return v * m / norm


def norm_of_a1111(weight: torch.Tensor, change: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Apply DoRA as A1111 does: always by the norm of what each input gives."""
    v = weight + change
    norm = v.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (v.ndim - 2))
    return v * (m / norm)


@pytest.mark.parametrize("program", [norm_of_comfyui, norm_of_a1111])
@pytest.mark.parametrize("kind", ["dora_in", "dora_out"])
@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_dora_in_kohyas_layout_is_read_right_by_others(
    program: Any, kind: str, name: str, model: BaseModel, tmp_path: Path
) -> None:
    adapter = read(model, adapter_state(model, {name: kind}), tmp_path)
    weight, prefix = named_layers(model)[name].weight.detach().double(), kohya_name(name)
    wanted = weight + adapter.layers[name].delta(weight)
    written = {
        key.removeprefix(f"{prefix}."): value.double()
        for key, value in kohya.to_kohya(adapter, model).items()
    }
    if "diff" in written:
        found = weight + written["diff"]
    else:
        change = written["lora_up.weight"].flatten(1) @ written["lora_down.weight"].flatten(1)
        found = program(
            weight, (change * written["alpha"] / RANK).reshape(weight.shape), written["dora_scale"]
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
