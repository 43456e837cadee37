"""`ghibli export --merge`: the complete model, in a folder and in one file, as others read it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from helpers.sd15_random import TEXT_ENCODER, UNET, VAE, published
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ghibli.config.paths import DEMO
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.original import original_weights


@pytest.mark.slow
def test_the_complete_model_has_the_published_layout(exported: tuple[Path, list], base: BaseModel) -> None:
    """Older transformers read nothing else: prefix `text_model.`, and a tokenizer of two plain files."""
    merged, text = exported[0] / "merged", base.text_encoder.state_dict()
    stored = load_file(merged / "text_encoder" / "model.safetensors")
    assert stored.keys() == {published("text_encoder", key) for key in text}
    assert json.loads((merged / "tokenizer" / "vocab.json").read_text()) == json.loads(
        (DEMO / "tokenizer" / "vocab.json").read_text()
    )
    rows = [(place / "tokenizer" / "merges.txt").read_text().split("\n") for place in (merged, DEMO)]
    assert [row for row in rows[0] if row] == [row for row in rows[1] if row]
    captions = ["A girl standing, in a Greenhouse! 42 naïve", ""]
    assert torch.equal(load(str(merged)).tokenize(captions), base.tokenize(captions))
    texts = [file.read_text() for file in exported[0].glob("**/*.json")]
    assert not any("_name_or_path" in text or str(exported[0]) in text for text in texts)
    assert len({file.stat().st_mode for file in exported[0].glob("**/*.*") if file.is_file()}) == 1


@pytest.mark.slow
def test_one_file_is_read_by_diffusers_as_the_same_model(exported: tuple[Path, list]) -> None:
    folder, file = exported[0] / "merged", exported[0] / "run_merged.safetensors"
    one = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None
    )
    whole = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = (getattr(pipeline, part).state_dict() for pipeline in (one, whole))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), part


ORIGINAL = {  # of v1-5-pruned-emaonly.safetensors, which holds 1131 weights
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (320, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
    "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
}


def test_the_single_files_names_at_real_size() -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    weights = original_weights(BaseModel(None, text_encoder, vae, unet, {}))
    assert len(weights) == 1131
    assert {key: tuple(weights[key].shape) for key in ORIGINAL} == ORIGINAL
