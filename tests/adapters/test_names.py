"""One adapter in every layout that people have: the same layers, found by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from helpers.adapter_files import ALPHA, RANK, adapter_state
from helpers.original_layout import unet_weights
from helpers.sd15_random import TEXT_ENCODER, UNET
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ghibli.adapters.apply import load_adapters
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.names import kohya_name, layer_paths, named_layers, names_in_files
from ghibli.config.paths import DEMO
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.original import original_unet_layers

TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
LAYERS = [
    "unet.conv_in", "unet.down_blocks.0.resnets.0.time_emb_proj", "unet.down_blocks.1.resnets.0.conv1",
    "unet.down_blocks.0.downsamplers.0.conv", "unet.mid_block.attentions.0.proj_in",
    "unet.mid_block.resnets.1.conv2", "unet.up_blocks.0.upsamplers.0.conv",
    "unet.up_blocks.1.upsamplers.0.conv", "unet.up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "unet.up_blocks.3.resnets.1.conv_shortcut", TEXT, "text_encoder.encoder.layers.1.mlp.fc1",
]  # fmt: skip
ATTENTION = [
    f"unet.mid_block.attentions.0.transformer_blocks.0.attn{n}.{each}"
    for n in "12"
    for each in ("to_q", "to_out.0")
]  # fmt: skip


@pytest.mark.parametrize("size", ["demo", "real"])
def test_original_names_are_those_that_diffusers_converts(size: str, model: BaseModel) -> None:
    base = model
    if size == "real":
        with torch.device("meta"):
            text = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
            base = BaseModel(None, text, None, UNet2DConditionModel(**UNET), {})
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in unet_weights(base).items()}
    converted = convert_ldm_unet_checkpoint(dict(checkpoint), dict(base.unet.config))
    layers = [name.removeprefix("unet.") for name in named_layers(base) if name.startswith("unet.")]
    assert len(layers) > 100
    for path in layers:
        original = original_unet_layers(base, [path])[path]
        assert checkpoint[f"model.diffusion_model.{original}.weight"] is converted[f"{path}.weight"], path


def test_no_two_layers_share_a_name(model: BaseModel) -> None:
    names = names_in_files(model)
    assert set(names.values()) == set(named_layers(model))
    for name in named_layers(model):
        assert names[kohya_name(name)] == name and names[name] == name


def split(state: dict[str, torch.Tensor], names: list[str]) -> list[tuple[str, str, str, torch.Tensor]]:
    """Split kohya's keys into (part, layer's own path with text_model., ending, tensor)."""
    of = {kohya_name(name): name for name in names}
    rows = []
    for key, tensor in state.items():
        prefix, _, ending = key.partition(".")
        part, _, path = of[prefix].partition(".")
        rows.append((part, path if part == "unet" else f"text_model.{path}", ending, tensor))
    return rows


def dotted(unet: str, text: str, down: str, up: str) -> Callable:
    """Make a renaming: prefixes of the two parts, endings of the two factors."""
    endings = {"lora_down.weight": down, "lora_up.weight": up, "alpha": "alpha"}

    def rename(part: str, path: str, ending: str, base: BaseModel) -> str:
        return f"{unet if part == 'unet' else text}{path}.{endings[ending]}"

    return rename


def comfyui(part: str, path: str, ending: str, base: BaseModel) -> str:
    if part == "text_encoder":
        return f"text_encoders.clip_l.transformer.{path}.{ending}"
    return f"diffusion_model.{original_unet_layers(base, [path])[path]}.{ending}"


def original_kohya(part: str, path: str, ending: str, base: BaseModel) -> str:
    own = original_unet_layers(base, [path])[path] if part == "unet" else path
    return f"lora_{'unet' if part == 'unet' else 'te'}_{own.replace('.', '_')}.{ending}"


def processors(part: str, path: str, ending: str, base: BaseModel) -> str:
    end = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight", "alpha": "alpha"}[ending]
    if part == "text_encoder":
        return f"text_encoder.{path.replace('q_proj', 'to_q_lora')}.{end}"
    return f"unet.{path.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{end}"


def older_diffusers(part: str, path: str, ending: str, base: BaseModel) -> str:
    factor = "lora" if part == "unet" else "lora_linear_layer"
    endings = {"lora_down.weight": f"{factor}.down.weight", "lora_up.weight": f"{factor}.up.weight"}
    return f"{part}.{path}.{endings.get(ending, ending)}"


LAYOUTS: dict[str, tuple[Callable, str]] = {
    "diffusers": (dotted("unet.", "text_encoder.", "lora_A.weight", "lora_B.weight"), "diffusers"),
    "older diffusers": (older_diffusers, "diffusers"),
    "lora_linear_layer": (
        dotted("unet.", "text_encoder.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        "diffusers",
    ),
    "UNet alone, bare": (dotted("", "", "lora_A.weight", "lora_B.weight"), "diffusers"),
    "PEFT": (dotted("base_model.model.", "base_model.model.", "lora_A.weight", "lora_B.weight"), "PEFT"),
    "PEFT, named": (
        dotted("base_model.model.unet.", "base_model.model.text_encoder.", "lora_A.default.weight",
               "lora_B.default.weight"), "PEFT",
    ),
    "ComfyUI": (comfyui, "ComfyUI"),
    "kohya, original names": (original_kohya, "kohya"),
    "LyCORIS": (
        lambda part, path, ending, base: f"lycoris_{path.replace('.', '_')}.{ending}", "kohya",
    ),
}  # fmt: skip


def save_and_read(state: dict[str, torch.Tensor], base: BaseModel, folder: Path) -> Adapter:
    save_file(state, folder / "it.safetensors")
    return read_adapter(folder / "it.safetensors", base, "adapter")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_adapter(layout: str, model: BaseModel, tmp_path: Path) -> None:
    """With `.alpha`, which counts in all of them: the scale is not alpha / rank by chance."""
    state = adapter_state(model, dict.fromkeys(LAYERS, "lora"))
    rename, name = LAYOUTS[layout]
    renamed = {
        rename(part, path, ending, model): tensor for part, path, ending, tensor in split(state, LAYERS)
    }
    found = save_and_read(renamed, model, tmp_path)
    assert found.layout == name and found.layers.keys() == set(LAYERS)
    for layer_name, layer in found.layers.items():
        own = {
            key.partition(".")[2]: value
            for key, value in state.items()
            if key.startswith(f"{kohya_name(layer_name)}.")
        }
        assert torch.equal(layer.down, own["lora_down.weight"]) and torch.equal(
            layer.up, own["lora_up.weight"]
        )
        assert (layer.alpha, layer.rank) == (ALPHA, RANK)


def test_the_attention_processors_of_2023(model: BaseModel, tmp_path: Path) -> None:
    names = [*ATTENTION, TEXT]
    state = adapter_state(model, dict.fromkeys(names, "lora"))
    renamed = {processors(part, path, end, model): tensor for part, path, end, tensor in split(state, names)}
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in renamed
    found = save_and_read(renamed, model, tmp_path)
    assert found.layers.keys() == set(names)


@torch.no_grad()
def noise_pred(base: BaseModel) -> torch.Tensor:
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(2))
    embeds = base.encode_prompts(base.tokenize(["a panda on a train", "a red boat"]))
    return base.unet(latents, torch.tensor([10, 700]), embeds, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "older diffusers"])
@torch.no_grad()
def test_a_plain_lora_is_what_diffusers_loads(layout: str, base: BaseModel, tmp_path: Path) -> None:
    """Attention of UNet and text encoder: what diffusers' loader knows in each of these layouts."""
    names = [name for name in named_layers(base) if ".attn" in name or "self_attn" in name]
    state = {
        key: 0.3 * value if key.endswith("up.weight") else value
        for key, value in adapter_state(base, dict.fromkeys(names, "lora")).items()
        if layout == "kohya" or not key.endswith(".alpha")
    }
    if layout != "kohya":
        rows = split(state, names)
        state = {LAYOUTS[layout][0](part, path, end, base): tensor for part, path, end, tensor in rows}
    adapter = save_and_read(state, base, tmp_path)
    before = noise_pred(base)
    load_adapters(base, [(adapter, 1.0)])
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name="it.safetensors")
    theirs = load("demo")
    theirs.unet, theirs.text_encoder = pipeline.unet.eval(), pipeline.text_encoder.eval()
    ours = noise_pred(base)
    assert (ours - before).abs().max() > 0.05 * before.abs().max()
    torch.testing.assert_close(ours, noise_pred(theirs), rtol=0, atol=1e-5 * ours.abs().max().item())


def test_paths_are_the_bases_own(base: BaseModel, tmp_path: Path) -> None:
    """Also once adapters are around the layers."""
    paths, layers = layer_paths(base), named_layers(base)
    load_adapters(base, [(save_and_read(adapter_state(base, {TEXT: "lora"}), base, tmp_path), 1.0)])
    assert layer_paths(base) == paths
    assert all(layer is layers[name] for name, layer in named_layers(base).items())
