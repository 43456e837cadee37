"""Adapter files of every kind and layout with one thing wrong: one line that names the key."""

import json
import struct
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import KINDS, adapter_state, fits
from safetensors.torch import load_file, save_file

from ghibli.adapters import lora
from ghibli.adapters.files import read_adapter
from ghibli.adapters.layers import LoRA
from ghibli.adapters.names import kohya_name, named_layers
from ghibli.adapters.read import sort_keys
from ghibli.config.schema import LoraConfig
from ghibli.models.base import BaseModel
from ghibli.models.original import original_unet_layers
from ghibli.runtime.errors import UserError

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet.down_blocks.1.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
VARIANTS = ("lora", "dora", "loha", "lokr", "oft")  # those with a file in diffusers' or PEFT's names
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {  # layout -> (a name in kohya's or diffusers', its own)
    "LyCORIS": (("lora_unet_", "lycoris_"), ("lora_te_", "lycoris_")),
    "PEFT": (("unet.", "base_model.model.unet."), ("text_encoder.", "base_model.model.text_encoder.")),
    "older": (("lora_A", "lora.down"), ("lora_B", "lora.up")),
    "linear": (("lora_A", "lora_linear_layer.down"), ("lora_B", "lora_linear_layer.up")),
    "2023": (("to_k.lora_A", "processor.to_k_lora.down"), ("to_k.lora_B", "processor.to_k_lora.up"),
             ("q_proj.lora_A", "to_q_lora.down"), ("q_proj.lora_B", "to_q_lora.up")),
}  # fmt: skip
FILES = [
    *(f"{layout} {kind}" for layout in ("kohya", "LyCORIS", "ComfyUI") for kind in KINDS),
    *(f"{layout} {variant}" for layout in ("diffusers", "PEFT") for variant in VARIANTS),
    "older lora", "linear lora", "2023 lora",
]  # fmt: skip
MAY_BE_MISSING = (".alpha", ".dora_scale")  # without them, another adapter, as whole as this one
Tensors = dict[str, torch.Tensor]


def content_of(what: str, model: BaseModel, folder: Path) -> tuple[Tensors, dict[str, str]]:
    """Return tensors and metadata of a file of one kind: linear, convolution, and of the text encoder."""
    layout, _, kind = what.partition(" ")
    if layout in ("kohya", "LyCORIS", "ComfyUI"):
        shapes = {name: named_layers(model)[name].weight.shape for name in (LINEAR, CONV, TEXT)}
        state = adapter_state(model, {name: kind for name, shape in shapes.items() if fits(kind, shape)})
        return as_comfyui_names(state, model) if layout == "ComfyUI" else renamed(state, layout), {}
    targets = [LINEAR, *([CONV] if kind != "oft" else [])]
    options = LoraConfig(
        rank=4, alpha=6.0, dropout=0.0, targets=[name.removeprefix("unet.") for name in targets],
        text_encoder=True, text_encoder_targets=["layers.0.self_attn.q_proj"], variant=kind, init=None,
    )  # fmt: skip
    base = deepcopy(model)
    lora.add_lora(base, options, 0)
    file = lora.save_adapter(base, folder)
    adapter = read_adapter(file, model, "it")
    assert len(adapter.layers) == len(targets) + 1
    if layout == "diffusers":
        return load_file(file), adapter.metadata
    settings = json.loads(adapter.metadata["lora_adapter_metadata"])
    beside = {key.removeprefix("unet."): each for key, each in settings.items() if key.startswith("unet.")}
    (folder / "adapter_config.json").write_text(json.dumps(beside))
    return renamed(load_file(file), layout), {}


def as_comfyui_names(state: Tensors, model: BaseModel) -> Tensors:
    """Give the tensors of a file in kohya's layout the names of the original code."""
    names = {kohya_name(TEXT): f"text_encoders.clip_l.transformer.{TEXT.removeprefix('text_encoder.')}"}
    for path in (LINEAR.removeprefix("unet."), CONV.removeprefix("unet.")):
        original = original_unet_layers(model, [path])[path]
        names[kohya_name(f"unet.{path}")] = f"diffusion_model.{original}"
    return {names[key.partition(".")[0]] + key[key.index(".") :]: tensor for key, tensor in state.items()}


def renamed(state: Tensors, layout: str) -> Tensors:
    """Give the tensors the names of another layout."""
    found = {}
    for key, tensor in state.items():
        for old, new in RENAMED.get(layout, ()):
            key = key.replace(old, new)
        found[key] = tensor
    return found


def refusal(state: Tensors, metadata: dict[str, str], model: BaseModel, folder: Path) -> str:
    """Save and read a file; return its one line without the file's name."""
    save_file(state, folder / "damaged.safetensors", metadata)
    with pytest.raises(UserError) as caught:
        read_adapter(folder / "damaged.safetensors", model, "adapter")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"adapter {folder / 'damaged.safetensors'}")


def of_the_same_layer(key: str, state: Tensors, model: BaseModel) -> list[str]:
    """The keys of a key's layer."""
    layers = sort_keys(state, model, "it").values()
    return next(list(layer.keys.values()) for layer in layers if key in layer.keys.values())


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
def test_every_key_in_turn(what: str, model: BaseModel, tmp_path: Path) -> None:
    state, metadata = content_of(what, model, tmp_path)
    save_file(state, tmp_path / "whole.safetensors", metadata)
    assert len(read_adapter(tmp_path / "whole.safetensors", model, "adapter").layers) >= 1
    assert len(state) >= 2
    for key, tensor in state.items():
        nan = tensor.clone()
        nan.view(-1)[-1] = torch.nan
        assert f"`{key}` has values that are not finite" in refusal(
            state | {key: nan}, metadata, model, tmp_path
        )
        wider = torch.ones([*tensor.shape[:-1], *(size + 1 for size in tensor.shape[-1:])] or [2])
        assert f"`{key}`" in refusal(state | {key: wider}, metadata, model, tmp_path)
        rest = [other for other in of_the_same_layer(key, state, model) if other != key]
        if rest and not key.endswith(MAY_BE_MISSING):  # else the layer is gone as a whole
            others = {other: value for other, value in state.items() if other != key}
            text = refusal(others, metadata, model, tmp_path)
            assert any(f"`{other}`" in text for other in rest), f"without {key}: {text}"


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what in FILES if what.startswith(("kohya", "diffusers"))])
def test_values_that_no_key_can_have(what: str, model: BaseModel, tmp_path: Path) -> None:
    state, metadata = content_of(what, model, tmp_path)
    for key, tensor in state.items():
        infinite = tensor.clone()
        infinite.view(-1)[0] = torch.inf
        assert f"`{key}` has values that are not finite" in refusal(
            state | {key: infinite}, metadata, model, tmp_path
        )
        nothing = torch.ones([*tensor.shape[:-1], 0])
        assert f"`{key}` is empty" in refusal(state | {key: nothing}, metadata, model, tmp_path)
        for dtype in (torch.int8, torch.bool) if not key.endswith(".alpha") else ():
            text = refusal(state | {key: tensor.to(dtype)}, metadata, model, tmp_path)
            assert f"`{key}` is of {str(dtype)[6:]}, not of floating point" in text


@pytest.mark.parametrize("what", FILES)
def test_one_foreign_key(what: str, model: BaseModel, tmp_path: Path) -> None:
    state, metadata = content_of(what, model, tmp_path)
    for key in ("unheard.of", "unet.conv_norm_out.weight", f"{kohya_name(LINEAR)}.unheard", f"{LINEAR}.bias"):
        text = refusal(state | {key: torch.ones(2, 2)}, metadata, model, tmp_path)
        assert f"`{key}`" in text


@pytest.mark.parametrize("what", ["whole", "NaN", "half", "shape", "foreign", "words"])
def test_a_file_of_2022_is_named_for_what_it_is(what: str, model: BaseModel, tmp_path: Path) -> None:
    """cloneofsimo's, whatever is wrong with it: ranks in the metadata, words' embeddings beside."""
    state = {"text_encoder:0:down": torch.ones(4, 64), "text_encoder:0:up": torch.ones(64, 4)}
    metadata = {"text_encoder": '["CLIPAttention"]', "text_encoder:0:rank": "4"}
    if what == "NaN":
        state["text_encoder:0:down"][0] = torch.nan
    elif what == "half":
        del state["text_encoder:0:up"]
    elif what == "shape":
        state["text_encoder:0:down"] = torch.ones(7)
    elif what == "foreign":
        state["an.odd.key"] = torch.ones(2)
    elif what == "words":
        state["<s1>"], metadata["<s1>"] = torch.ones(64), "<embed>"
    text = refusal(state, metadata, model, tmp_path)
    assert "`text_encoder:0:down` is a numbered layer of cloneofsimo's lora of 2022" in text


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_a_layer_under_two_names(kind: str, model: BaseModel, tmp_path: Path) -> None:
    """As two programs name it; whichever came last would win without a word."""
    state = adapter_state(model, {LINEAR: kind})
    first = next(iter(state))
    twin = f"lycoris_{first.removeprefix('lora_unet_')}"
    text = refusal(state | {twin: state[first].clone()}, {}, model, tmp_path)
    assert f"`{first}`" in text and f"`{twin}`" in text and "twice" in text


def test_a_rank_above_the_layers_size_is_read_as_it_is(model: BaseModel, tmp_path: Path) -> None:
    """500 where the layer has 64 inputs and 128 outputs: no reason to refuse, nor to cut."""
    state = {
        f"{kohya_name(LINEAR)}.lora_down.weight": 0.1 * torch.randn(500, 64),
        f"{kohya_name(LINEAR)}.lora_up.weight": 0.1 * torch.randn(128, 500),
        f"{kohya_name(LINEAR)}.alpha": torch.tensor(250.0),
    }
    save_file(state, tmp_path / "it.safetensors")
    layer = read_adapter(tmp_path / "it.safetensors", model, "it").layers[LINEAR]
    assert isinstance(layer, LoRA) and layer.rank == 500
    down, up, _ = (tensor.double() for tensor in state.values())
    weight = named_layers(model)[LINEAR].weight.double()
    torch.testing.assert_close(layer.delta(weight), 0.5 * up @ down, rtol=1e-12, atol=1e-12)


def test_a_file_that_is_cut_off_anywhere(model: BaseModel, tmp_path: Path) -> None:
    """In the length, the header or the numbers; also one whose header promises more than any disk holds."""
    save_file(adapter_state(model, {LINEAR: "lora"}), tmp_path / "whole.safetensors")
    whole, file = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    header = int.from_bytes(whole[:8], "little")
    for end in (0, 4, 8, 8 + header // 2, 8 + header, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"^adapter: .*cut.safetensors is cut off or damaged; [^\n]*$"):
            read_adapter(file, model, "adapter")
    huge = (
        b'{"a.lora_up.weight":{"dtype":"F32","shape":[9000000000000,64],"data_offsets":[0,2304000000000000]}}'
    )
    for content in (struct.pack("<Q", 2**62), struct.pack("<Q", len(huge)) + huge):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is cut off or damaged"):
            read_adapter(file, model, "adapter")


def test_one_name_twice_in_a_header(model: BaseModel, tmp_path: Path) -> None:
    """The library would have to drop one of the two."""
    entry = '"a.alpha":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (tmp_path / "it.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="is cut off or damaged"):
        read_adapter(tmp_path / "it.safetensors", model, "adapter")
