"""Names and metadata in kohya's layout, as sd-scripts writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.sd15_random import TEXT_ENCODER, UNET
from transformers import CLIPTextConfig, CLIPTextModel

from ghibli.adapters import files, kohya
from ghibli.adapters.layers import LoRA
from ghibli.adapters.names import named_layers
from ghibli.adapters.sidecar import write_sidecar
from ghibli.models.base import BaseModel


def sd_scripts_names() -> dict[str, tuple[int, int]]:
    """Attention layers as sd-scripts names them for Stable Diffusion 1.5 -> (in, out)."""
    places = {f"down_blocks_{b}_attentions_{a}": 320 * 2**b for b in range(3) for a in range(2)}
    places |= {f"up_blocks_{b}_attentions_{a}": 1280 // 2 ** (b - 1) for b in (1, 2, 3) for a in range(3)}
    places |= {"mid_block_attentions_0": 1280}
    names = {}
    for place, width in places.items():
        block = f"lora_unet_{place}_transformer_blocks_0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            for layer in ("to_q", "to_k", "to_v", "to_out_0"):
                inside = context if layer in ("to_k", "to_v") else width
                names[f"{block}_{attention}_{layer}"] = (inside, width)
    for layer in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names[f"lora_te_text_model_encoder_layers_{layer}_self_attn_{name}"] = (768, 768)
    return names


def test_names_and_shapes_are_those_of_sd_scripts_at_real_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    whole = BaseModel(None, text_encoder, None, unet, {})
    endings = (".to_q", ".to_k", ".to_v", ".to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    layers = {
        name: LoRA(torch.zeros(8, module.in_features), torch.zeros(module.out_features, 8), 16)
        for name, module in named_layers(whole).items()
        if name.endswith(endings)
    }
    state = kohya.to_kohya(files.Adapter(Path("x"), "diffusers", layers, {}))
    expected = {}
    for name, (inside, outside) in sd_scripts_names().items():
        expected |= {
            f"{name}.lora_down.weight": (8, inside),
            f"{name}.lora_up.weight": (outside, 8),
            f"{name}.alpha": (),
        }
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def base_of(width: int, prediction_type: str) -> BaseModel:
    unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width))
    return BaseModel(None, None, None, unet, {"prediction_type": prediction_type})


@pytest.mark.parametrize(
    ("width", "prediction_type", "expected"),
    [  # as sd-scripts' get_model_version_str_for_sd1_sd2 and library/sai_model_spec.py write them
        (768, "epsilon", ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon", "SD1")),
        (768, "v_prediction", ("sd_v1_v", "False", "stable-diffusion-v1/lora", "v", "SD1")),
        (1024, "epsilon", ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon", "SD2")),
        (1024, "v_prediction", ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v", "SD2")),
    ],
)
def test_metadata_are_those_of_the_base(
    make_config: Callable, tmp_path: Path, width: int, prediction_type: str, expected: tuple[str, ...]
) -> None:
    base, config = base_of(width, prediction_type), make_config("data.style=', in ink'")
    layers = {"unet.x": LoRA(down=torch.zeros(4, 8), up=torch.zeros(8, 4), alpha=2)}
    adapter = files.Adapter(Path("x"), "diffusers", layers, {})
    found = kohya.metadata_of(adapter, base, config, {}, "lora.rank=4, <a>: b")
    write_sidecar(tmp_path / "it.safetensors", config, base)
    sidecar = json.loads((tmp_path / "it.json").read_text())
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
    assert (*(found[key] for key in keys), sidecar["sd version"]) == expected
    assert found["ss_output_name"] == "lora.rank_4_a_b"
    assert found["modelspec.title"].startswith("in ink: LoRA rank")
    assert sidecar["activation text"] == found["modelspec.trigger_phrase"] == "in ink"
    assert "ss_clip_skip" not in found and sidecar["notes"] == ""
    config = make_config("model.clip_skip=2")
    assert kohya.metadata_of(adapter, base, config, {}, "it")["ss_clip_skip"] == "2"
    write_sidecar(tmp_path / "two.safetensors", config, base)
    assert json.loads((tmp_path / "two.json").read_text())["notes"] == "clip skip 2"


def test_layers_that_differ_are_dynamic(make_config: Callable) -> None:
    layers = {f"unet.{n}": LoRA(down=torch.zeros(n, 8), up=torch.zeros(8, n), alpha=n / 2) for n in (2, 4)}
    adapter = files.Adapter(Path("x"), "diffusers", layers, {})
    found = kohya.metadata_of(adapter, base_of(768, "epsilon"), make_config(), {}, "x")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_a_core_that_is_not_square_keeps_its_strength() -> None:
    """LoCon's Tucker decomposition between two ranks: alpha / rank is of the inner one, that of A."""
    draw = torch.Generator().manual_seed(0)
    up, mid, down = (torch.randn(*shape, generator=draw) for shape in ((6, 2), (2, 5, 3, 3), (5, 4)))
    layer = LoRA(down=down[..., None, None], up=up[..., None, None], alpha=3.0, mid=mid)
    written = kohya.written_layers(files.Adapter(Path("x"), "kohya", {"unet.conv1": layer}, {}))["unet.conv1"]
    wanted = 3 / 5 * torch.einsum("op,pqxy,qi->oixy", up.double(), mid.double(), down.double())
    assert isinstance(written, LoRA) and written.is_plain and written.rank == 2
    torch.testing.assert_close(written.delta(torch.zeros(6, 4, 3, 3).double()), wanted, rtol=1e-6, atol=1e-6)
