"""Every key of a file is used, or the file is refused in one line that names the first that is not."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_files import KINDS, RANK, adapter_state, fits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Full, LoKr
from ghibli.adapters.names import kohya_name, named_layers
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
Q, K, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "unet.down_blocks.1.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.mlp.fc1"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def state(model: BaseModel) -> Tensors:
    return adapter_state(model, {Q: "lora", K: "dora_out", CONV: "tucker", TEXT: "loha"})


def read(state: Tensors, base: BaseModel, folder: Path, metadata: dict[str, str] | None = None) -> Adapter:
    save_file(state, folder / "it.safetensors", metadata)
    return read_adapter(folder / "it.safetensors", base, "adapter")


def refusal(state: Tensors, base: BaseModel, folder: Path, metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(state, base, folder, metadata)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"adapter {folder / 'it.safetensors'}")


def used(adapter: Adapter) -> int:
    """Count the tensors of a file that its layers hold."""
    scales = [
        each for each in adapter.layers.values() if not isinstance(each, Full) and each.alpha is not None
    ]
    magnitudes = [each for each in adapter.layers.values() if each.magnitude is not None]
    return sum(len(each.tensors) for each in adapter.layers.values()) + len(scales) + len(magnitudes)


FOREIGN = {  # a key -> what the message says of it
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "is an adapter for SDXL",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "is an adapter for SDXL",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.lora_up.weight": "for SDXL",
    "lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.alpha": "for SDXL",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "for SDXL",
    "transformer.single_blocks.0.attn.to_q.lora_A.weight": "for Flux or SD 3",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "for Flux or SD 3",
    "emb_params": "is a textual inversion",
    "<s1>": "is a textual inversion",
    "clip_l": "is a textual inversion",
    "bundle_emb.token.string_to_param.*": "is a textual inversion",
    "unet:0:up": "is a numbered layer of cloneofsimo's lora of 2022",
    "text_encoder:3:down": "is a numbered layer of cloneofsimo's lora of 2022",
    "model.diffusion_model.input_blocks.0.0.weight": "is of a whole model",
    f"{kohya_name(Q)}.diff_b": "is an update of a bias",
    f"{Q}.lora_B.bias": "is an update of a bias",
    f"{kohya_name(BLOCK + '.norm1')}.w_norm": "is an update of a normalisation",
    f"{kohya_name(Q)}.on_input": "is of IA3",
    f"{kohya_name(Q)}.a1.weight": "is of GLoRA",
    "oft_unet_mid_block_attentions_0_proj_in.oft_blocks": "is of sd-scripts' own OFT",
    f"{kohya_name(Q)}.lora_unheard.weight": "is of a kind that is not supported",
    "unet.no_such_block.to_q.lora_A.weight": "is not a LoRA of this base: it has",
    "line\nbreak": "is not a LoRA of this base: it has `line\\nbreak`",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_foreign_key_is_named_for_what_it_is(
    key: str, state: Tensors, model: BaseModel, tmp_path: Path
) -> None:
    text = refusal(state | {key: torch.ones(2, 2)}, model, tmp_path)
    assert FOREIGN[key] in text and f"`{key}`".replace("\n", "\\n") in text


def test_the_whole_file_is_used(state: Tensors, model: BaseModel, tmp_path: Path) -> None:
    found = read(state, model, tmp_path)
    assert used(found) == len(state)
    assert sorted(found.kinds) == ["DoRA", "LoCon", "LoHa", "LoRA"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_one_part_alone(dtype: torch.dtype, model: BaseModel, tmp_path: Path) -> None:
    for name in (Q, TEXT):
        own = {key: value.to(dtype) for key, value in adapter_state(model, {name: "lora"}).items()}
        layer = read(own, model, tmp_path).layers[name]
        weight = named_layers(model)[name].weight.double()
        values = {key.partition(".")[2]: value.double() for key, value in own.items()}
        wanted = values["alpha"] / RANK * values["lora_up.weight"] @ values["lora_down.weight"]
        torch.testing.assert_close(layer.delta(weight), wanted, rtol=1e-12, atol=1e-12)


UP, DOWN, SCALE = "lora_up.weight", "lora_down.weight", "alpha"  # of a layer with 128 inputs and outputs
BROKEN: dict[str, tuple[dict[str, Any], str]] = {  # tensors to put (None: to remove) -> what the message says
    "half": ({UP: None}, "without `{k}.lora_up.weight`"),
    "other half": ({DOWN: None}, "without `{k}.lora_down.weight`"),
    "alpha alone": ({UP: None, DOWN: None}, "`{k}.alpha` is there without the matrices"),
    "NaN": ({UP: torch.full((128, RANK), torch.nan)}, "`{k}.lora_up.weight` has values that are not finite"),
    "infinity": ({DOWN: torch.full((RANK, 128), -torch.inf)}, "`{k}.lora_down.weight` has values that"),
    "NaN alpha": ({SCALE: torch.tensor(torch.nan)}, "`{k}.alpha` has values that are not finite"),
    "alpha 0": ({SCALE: torch.tensor(0.0)}, "`{k}.alpha` is 0"),
    "two alphas": ({SCALE: torch.ones(2)}, "`{k}.alpha` should be one number"),
    "empty": ({UP: torch.ones(128, 0)}, "`{k}.lora_up.weight` is empty"),
    "integers": ({UP: torch.ones(128, RANK, dtype=torch.int8)}, "`{k}.lora_up.weight` is of int8"),
    "shape": ({UP: torch.ones(9, RANK)}, "`{k}.lora_up.weight` of (9, 3)"),
    "ranks": ({UP: torch.ones(128, 7)}, "`{k}.lora_up.weight` of (128, 7)"),
    "two kinds": ({"diff": torch.ones(128, 128)}, "two kinds of update for one layer: `{k}."),
    "magnitudes": ({"dora_scale": torch.ones(5, 1)}, "`{k}.dora_scale` has the shape (5, 1)"),
    "BOFT": ({UP: None, DOWN: None, "oft_blocks": torch.ones(2, 32, 4, 4)}, "`{k}.oft_blocks` is of BOFT"),
    "scaled difference": ({UP: None, DOWN: None, "diff": torch.ones(128, 128)}, "`{k}.alpha` would scale"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(what: str, state: Tensors, model: BaseModel, tmp_path: Path) -> None:
    changes, message = BROKEN[what]
    for ending, tensor in changes.items():
        state[f"{kohya_name(Q)}.{ending}"] = tensor
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    assert message.format(k=kohya_name(Q)) in refusal(state, model, tmp_path)


def test_an_empty_file_and_a_layer_under_two_names(state: Tensors, model: BaseModel, tmp_path: Path) -> None:
    assert "holds no tensors" in refusal({}, model, tmp_path)
    state[f"{Q}.lora_B.weight"] = torch.ones(128, RANK)
    pair = sorted([f"{kohya_name(Q)}.lora_up.weight", f"{Q}.lora_B.weight"])
    assert f"twice, as `{pair[0]}` and `{pair[1]}`" in refusal(state, model, tmp_path)


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, str], int, str, int]:
    """Random kinds of random layers, a seed, a defect, and a number that chooses the key."""
    names = draw(st.lists(st.sampled_from((Q, K, CONV, TEXT)), min_size=1, unique=True))
    shapes = {Q: (8, 8), K: (8, 8), CONV: (8, 8, 3, 3), TEXT: (8, 8)}
    kinds = {
        name: draw(st.sampled_from([kind for kind in KINDS if fits(kind, torch.Size(shapes[name]))]))
        for name in names
    }
    defect = draw(st.sampled_from(["none", "foreign", "missing", "nan", "inf", "shape", "half"]))
    return kinds, draw(st.integers(0, 100)), defect, draw(st.integers(0, 1000))


@given(case=files(), foreign=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_key_of_a_random_file_is_used_or_named(
    case: tuple[dict[str, str], int, str, int], foreign: str, model: BaseModel, tmp_path_factory: Any
) -> None:
    kinds, seed, defect, choice = case
    state = adapter_state(model, kinds, seed)
    key = list(state)[choice % len(state)]
    if defect == "foreign":
        key = foreign
        state[key] = torch.ones(3)
    elif defect == "missing":
        del state[key]
    elif defect in ("nan", "inf"):
        state[key] = state[key].clone()
        state[key].view(-1)[choice % state[key].numel()] = float(defect)
    elif defect == "shape":
        shape = list(state[key].shape) or [1]
        shape[choice % len(shape)] += 1
        state[key] = torch.ones(shape)
    elif defect == "half":
        state = {key: value.half() for key, value in state.items()}
    folder = tmp_path_factory.mktemp("random", numbered=True)
    try:
        adapter = read(state, model, folder)
    except UserError as error:
        text = str(error)
        printable = "".join(each if each.isprintable() else repr(each)[1:-1] for each in key)
        assert "\n" not in text and defect not in ("none", "half")
        named = printable if defect != "missing" else key.partition(".")[0]
        assert named in text or not state
    else:
        assert defect in ("none", "half", "missing")
        assert used(adapter) == len(state) + sum(
            isinstance(each, LoKr) or each.rank is not None or each.name == "OFT"
            for name, each in adapter.layers.items()
            if not isinstance(each, Full) and f"{kohya_name(name)}.alpha" not in state
        )


# PEFT's settings


def peft_state(model: BaseModel, prefix: str) -> Tensors:
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return {
        f"{prefix}{Q.removeprefix('unet.')}.{names[key.partition('.')[2]]}": value
        for key, value in adapter_state(model, {Q: "lora"}).items()
        if not key.endswith(".alpha")
    }


def test_alpha_of_a_peft_adapter_lies_beside_it(
    model: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = peft_state(model, "base_model.model.")
    with caplog.at_level(logging.WARNING):
        assert read(state, model, tmp_path).alphas == [RANK]
    assert "no adapter_config.json beside it: alpha is taken to be the rank" in caplog.text
    for config, alpha in (
        ({"lora_alpha": 12}, 12.0),
        ({"lora_alpha": 12, "use_rslora": True}, 12 * RANK**0.5),
        ({"lora_alpha": 12, "alpha_pattern": {"attn1.to_q": 6}}, 6.0),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert read(state, model, tmp_path).alphas == [pytest.approx(alpha)]
    for text in ("{", '{"lora_alpha": "much"}', '{"lora_alpha": NaN}', "[1]"):
        (tmp_path / "adapter_config.json").write_text(text)
        assert "its settings are damaged" in refusal(state, model, tmp_path)


def test_settings_that_contradict_the_tensors(model: BaseModel, tmp_path: Path) -> None:
    state = peft_state(model, "unet.")
    settings = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12, "unet.use_dora": True})}
    key = f"{Q}.lora_A.weight"
    assert f"by its settings, but `{key}` is there without magnitudes" in refusal(
        state, model, tmp_path, settings
    )
    settings = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12})}
    assert read(state, model, tmp_path, settings).alphas == [12.0]
    state[f"{Q}.alpha"] = torch.tensor(6.0)
    assert f"`{Q}.alpha` is 6, but the file's settings say 12" in refusal(state, model, tmp_path, settings)
