"""lora.variant=loha, lokr, oft: what PEFT trains is saved, read, merged, exported and trained further."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.oft.layer import OFTLayer
from safetensors.torch import load_file, save_file
from torch import nn

from ghibli.adapters import lora
from ghibli.adapters.apply import load_adapters, merge
from ghibli.adapters.describe import describe_adapter
from ghibli.adapters.files import read_adapter
from ghibli.adapters.kohya import to_kohya
from ghibli.adapters.layers import InputOFT
from ghibli.adapters.names import named_layers
from ghibli.adapters.start import check_same_shape, start_from
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CASES = [("loha", ["to_q", "conv1", "proj_in"]), ("lokr", ["to_q", "conv1", "proj_in"]), ("oft", ATTENTION)]


@dataclass
class Case:
    """A kind that no test changes: a base with an adapter of it, and the file of that adapter."""

    variant: str
    targets: list[str]
    live: BaseModel
    file: Path


def options_of(variant: str, targets: list[str], **changes: object) -> LoraConfig:
    options = {
        "rank": 4, "alpha": 4.0 if variant == "oft" else 6.0, "dropout": 0.0, "targets": targets,
        "text_encoder": True, "text_encoder_targets": "attention", "variant": variant, "init": None,
    }  # fmt: skip
    return LoraConfig(**(options | changes))


def trained(base: BaseModel, variant: str, targets: list[str]) -> BaseModel:
    """Add an adapter of this kind to a base, its weights random, as after training."""
    lora.add_lora(base, options_of(variant, targets), 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora.trainable(base).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return base


@pytest.fixture(scope="module", params=CASES, ids=[variant for variant, _ in CASES])
def case(request: pytest.FixtureRequest, model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    variant, targets = request.param
    live = trained(deepcopy(model), variant, targets)
    return Case(variant, targets, live, lora.save_adapter(live, tmp_path_factory.mktemp(variant)))


@torch.no_grad()
def noise_pred(base: BaseModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = base.encode_prompts(base.tokenize(["a girl standing in a greenhouse", ""]))
    return base.unet(latents, torch.tensor([100, 800]), embeds).sample


def peft_layers(base: BaseModel) -> dict[str, LycorisLayer | OFTLayer]:
    return {
        f"{part}.{name.removeprefix('text_model.')}": layer
        for part, module in base.adaptable.items()
        for name, layer in module.named_modules()
        if isinstance(layer, LycorisLayer | OFTLayer)
    }


def test_it_starts_as_the_base_and_changes_it_then(case: Case, base: BaseModel) -> None:
    before = noise_pred(base)
    lora.add_lora(base, options_of(case.variant, case.targets), 0)
    torch.testing.assert_close(noise_pred(base), before, rtol=0, atol=2e-6)
    assert (noise_pred(case.live) - before).norm() > 0.03 * before.norm()


def test_the_file_is_what_peft_merges(case: Case, model: BaseModel) -> None:
    """Each layer's difference, read from the file, beside PEFT's own merged weight."""
    live = deepcopy(case.live)
    adapter = read_adapter(case.file, model, "adapter")
    layers = peft_layers(live)
    wanted = lora.layers_to_train(live, options_of(case.variant, case.targets))
    assert set(adapter.layers) == set(layers) == wanted
    plain = named_layers(model)
    for name, layer in layers.items():
        weight = plain[name].weight.detach()
        ours = adapter.layers[name].delta(weight.double())
        layer.merge()
        theirs = layer.get_base_layer().weight.detach().double() - weight.double()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        assert theirs.abs().max() > 1e-3


def test_pefts_own_loader_reads_the_file(case: Case, base: BaseModel) -> None:
    """diffusers has none for these kinds: fresh layers of PEFT by the file's settings, and its tensors."""
    live, fresh = deepcopy(case.live), base
    adapter = read_adapter(case.file, live, "adapter")
    settings = json.loads(adapter.metadata["lora_adapter_metadata"])
    state = load_file(adapter.file)
    for part, module in fresh.adaptable.items():
        own = {key.removeprefix(f"{part}."): each for key, each in settings.items() if key.startswith(part)}
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[own.pop("peft_type")]
        inject_adapter_in_model(config_class(**own), module)
        tensors = {
            key.removeprefix(f"{part}.").removeprefix("text_model."): tensor
            for key, tensor in state.items() if key.startswith(part)
        }  # fmt: skip
        assert not set_peft_model_state_dict(module, tensors).unexpected_keys
    layers = peft_layers(live)
    for name, layer in peft_layers(fresh).items():
        layer.merge()
        layers.pop(name).merge()
    assert not layers
    torch.testing.assert_close(noise_pred(fresh), noise_pred(live), rtol=0, atol=1e-5)


def test_added_merged_and_through_kohyas_file_it_is_the_live_model(
    case: Case, model: BaseModel, tmp_path: Path
) -> None:
    wanted = noise_pred(case.live)
    again, merged, from_kohya = (deepcopy(model) for _ in range(3))
    adapter = read_adapter(case.file, again, "adapter")
    save_file(to_kohya(adapter, again), tmp_path / "kohya.safetensors")
    load_adapters(again, [(adapter, 1.0)])
    torch.testing.assert_close(noise_pred(again), wanted, rtol=0, atol=1e-5)
    merge(merged, case.file.parent, 1.0)
    torch.testing.assert_close(noise_pred(merged), wanted, rtol=0, atol=1e-5)
    load_adapters(from_kohya, [(read_adapter(tmp_path / "kohya.safetensors", from_kohya, "file"), 1.0)])
    torch.testing.assert_close(noise_pred(from_kohya), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trained_further_it_starts_where_the_file_ends(case: Case, model: BaseModel, tmp_path: Path) -> None:
    """Written again, the file has the same bytes; with another alpha, it is the same model."""
    file, wanted = case.file, noise_pred(case.live)
    for alpha in (4.0, 10.0):
        base = deepcopy(model)
        options = options_of(case.variant, case.targets, init=str(file), alpha=alpha)
        adapter = read_adapter(file, base, "lora.init")
        check_same_shape(adapter, options, base)
        lora.add_lora(base, options, 1)
        start_from(adapter, lora.trainable(base), options)
        torch.testing.assert_close(noise_pred(base), wanted, rtol=0, atol=1e-5)
        again = lora.save_adapter(base, tmp_path / f"again {alpha}")
        if alpha == 4.0:  # then no factor is rescaled
            assert load_file(again).keys() == load_file(file).keys()
            assert all(torch.equal(load_file(again)[key], value) for key, value in load_file(file).items())


def test_import_prints_settings_that_take_the_file(case: Case, model: BaseModel) -> None:
    adapter = read_adapter(case.file, model, "file")
    line = next(line for line in describe_adapter(adapter, model, []) if line.startswith("train "))
    assert f"lora.variant={case.variant}" in line and "lora.rank=4" in line


def test_another_variant_is_refused_by_the_key(model: BaseModel, base: BaseModel, tmp_path: Path) -> None:
    adapter = read_adapter(lora.save_adapter(trained(base, "loha", ATTENTION), tmp_path), model, "file")
    with pytest.raises(UserError, match=r"lora\.variant of this run differ"):
        check_same_shape(adapter, options_of("lokr", ATTENTION, init="FILE"), model)


def test_oft_refuses_blocks_that_do_not_fit_and_kernels(base: BaseModel) -> None:
    with pytest.raises(UserError, match=r"lora\.rank=7 is, .* it takes one of 1, 2, 4"):
        lora.add_lora(base, options_of("oft", ATTENTION, rank=7), 0)
    with pytest.raises(UserError, match=r"lora\.variant=oft .* is a convolution with a kernel"):
        lora.add_lora(base, options_of("oft", ["to_q", "conv1"]), 0)


def test_why_oft_refuses_kernels() -> None:
    """PEFT's own layer, around a convolution with a kernel, is not the weights that it merges."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False))
    options = OFTConfig(r=4, oft_block_size=0, target_modules=["0"], use_cayley_neumann=False)
    inject_adapter_in_model(options, model)
    model[0].oft_R["default"].weight.data.normal_(std=0.1)
    image = torch.randn(1, 4, 8, 8)
    before = model(image)
    model[0].merge()
    assert (model(image) - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("terms", [None, 1, 2, 3, 4, 5, 7])
def test_rotations_of_pefts_oft_layer(terms: int | None) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 5, bias=False))
    weight = model[0].weight.detach().clone().double()
    options = OFTConfig(
        r=3, oft_block_size=0, target_modules=["0"], use_cayley_neumann=terms is not None,
        num_cayley_neumann_terms=terms or 5,
    )  # fmt: skip
    inject_adapter_in_model(options, model)
    angles = model[0].oft_R["default"].weight.data.normal_(std=0.3)
    values = torch.randn(7, 12)
    changed = weight + InputOFT(angles=angles, terms=terms).delta(weight)
    torch.testing.assert_close(
        model(values).detach().double(), values.double() @ changed.T, rtol=0, atol=1e-5
    )


def test_lokrs_convolutions_in_kohyas_file_have_two_factors_as_lycoris_reads_them(
    model: BaseModel, base: BaseModel, tmp_path: Path
) -> None:
    """LyCORIS's `lokr.py`, and ComfyUI's, in float64: kron(w1, w2_a w2_b) alpha / rank, without a core.

    ComfyUI's torch.kron fails on most cores, and stable-diffusion.cpp reads none.
    """
    file = lora.save_adapter(trained(base, "lokr", ["to_q", "conv1"]), tmp_path)
    adapter = read_adapter(file, model, "adapter")
    convolutions = [name for name, layer in adapter.layers.items() if getattr(layer, "t2", None) is not None]
    assert convolutions, "PEFT trains a core"
    state = to_kohya(adapter, model)
    assert not [key for key in state if key.endswith("_t2")]
    for name in convolutions:
        weight = named_layers(model)[name].weight.detach().double()
        own = {key.partition(".")[2]: value.double() for key, value in state.items() if key.startswith(
            f"lora_{name.replace('.', '_')}.")}  # fmt: skip
        scale = own["alpha"] / own["lokr_w2_b"].shape[0]
        whole = torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"]) * scale
        wanted = adapter.layers[name].delta(weight)
        torch.testing.assert_close(
            whole.reshape(weight.shape), wanted, rtol=0, atol=1e-6 * wanted.abs().max()
        )
    save_file(state, tmp_path / "kohya.safetensors")
    again = read_adapter(tmp_path / "kohya.safetensors", model, "file")
    assert all(torch.equal(value, to_kohya(again, model)[key]) for key, value in state.items())
    line = next(line for line in describe_adapter(again, model, []) if line.startswith("train "))
    assert "not possible: lora.variant=lokr trains convolutions decomposed over the kernel" in line


def test_dora_of_convolutions_is_what_peft_merges(model: BaseModel, base: BaseModel, tmp_path: Path) -> None:
    live = base
    options = options_of("dora", ["to_q", "conv1", "proj_in"])
    lora.add_lora(live, options, 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora.trainable(live).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter = read_adapter(lora.save_adapter(live, tmp_path), model, "adapter")
    known = named_layers(model)
    for part, module in live.adaptable.items():
        for path, layer in module.named_modules():
            if isinstance(layer, LoraLayer):
                name = f"{part}.{path.removeprefix('text_model.')}"
                weight = known[name].weight.detach().double()
                layer.merge()
                theirs = layer.get_base_layer().weight.detach().double() - weight
                torch.testing.assert_close(adapter.layers[name].delta(weight), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "loha", "lokr", "oft"])
def test_the_settings_in_a_file_are_those_that_older_pefts_know(variant: str) -> None:
    """diffusers 0.34 and later hand them to PEFT's class, which takes no unknown name: 0.35.2 with 0.17.1."""
    known = {  # fields of LoraConfig, LoHaConfig and LoKrConfig in PEFT 0.14.0, and of OFTConfig in 0.17.1
        "lora": "peft_type r lora_alpha lora_dropout target_modules use_rslora use_dora rank_pattern "
        "alpha_pattern base_model_name_or_path",
        "lycoris": "peft_type r alpha rank_dropout module_dropout target_modules use_effective_conv2d "
        "rank_pattern alpha_pattern base_model_name_or_path",
        "oft": "peft_type r oft_block_size module_dropout target_modules use_cayley_neumann "
        "base_model_name_or_path",
    }
    kind = variant if variant == "oft" else "lycoris" if variant in ("loha", "lokr") else "lora"
    published = lora.published_settings(lora.peft_config(options_of(variant, ["to_q"]), ["to_q"]))
    assert set(published) == set(known[kind].split())


@pytest.mark.parametrize(
    "options",
    [
        LoHaConfig(r=4, alpha=10, target_modules=["to_q"]),
        LoKrConfig(r=2, alpha=10, target_modules=["to_q"]),
        LoKrConfig(r=64, alpha=10, target_modules=["to_q"]),  # both matrices whole: PEFT scales these too
    ],
    ids=["loha", "lokr", "whole lokr"],
)
def test_files_that_peft_wrote_have_pefts_strength(
    options: PeftConfig, model: BaseModel, base: BaseModel, tmp_path: Path
) -> None:
    """Its alpha is in adapter_config.json, under another name than that of a LoRA."""
    live = base
    inject_adapter_in_model(options, live.unet)
    generator = torch.Generator().manual_seed(2)
    for layer in peft_layers(live).values():
        for parameter in layer.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    state = get_peft_model_state_dict(live.unet, adapter_name="default")
    tensors = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    options.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", model, "file")
    assert adapter.layers.keys() == peft_layers(live).keys()
    for name, layer in peft_layers(live).items():
        theirs = layer.get_delta_weight("default").detach().double()
        weight = layer.get_base_layer().weight.detach().double()
        torch.testing.assert_close(adapter.layers[name].delta(weight), theirs, rtol=1e-5, atol=1e-7)


def test_an_absurd_series_is_refused(model: BaseModel, base: BaseModel, tmp_path: Path) -> None:
    file = lora.save_adapter(trained(base, "oft", ATTENTION), tmp_path)
    state = load_file(file)
    for terms in ("five", 10**9, 0, None):
        settings = {"unet.use_cayley_neumann": True, "unet.num_cayley_neumann_terms": terms}
        save_file(state, file, {"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(UserError, match=r"oft_R.*num_cayley_neumann_terms=.* must be from 1 to 50"):
            read_adapter(file, model, "file")
