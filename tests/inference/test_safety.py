"""The safety checker: what it blacks out, and that a damaged one is refused rather than trusted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from ghibli.inference.safety import SafetyChecker, has_checker
from ghibli.runtime.errors import UserError


@pytest.fixture
def checker() -> StableDiffusionSafetyChecker:
    """A tiny checker of SD 1.5's own class."""
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=layers, vision_config=layers | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    return StableDiffusionSafetyChecker(config)


def save(checker: StableDiffusionSafetyChecker, folder: Path) -> str:
    """Save a checker as in the folder of a base; return the folder as model.path."""
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(folder / "feature_extractor")
    return str(folder)


@pytest.mark.parametrize(("threshold", "unsafe"), [(-2.0, 2), (2.0, 0)])
def test_the_checker_blacks_out(
    checker: StableDiffusionSafetyChecker, tmp_path: Path, threshold: float, unsafe: int
) -> None:
    """Once with thresholds that every image exceeds, once with those that none does."""
    images = [Image.new("RGB", (40, 24), colour) for colour in ("red", "blue")]
    checker.concept_embeds_weights.data.fill_(threshold)
    base = save(checker, tmp_path)
    assert has_checker(base)
    checked, blacked_out = SafetyChecker(base).black_out(images)
    assert blacked_out == unsafe
    for before, after in zip(images, checked, strict=True):
        assert after.size == before.size
        assert (np.asarray(after).max() == 0) == bool(unsafe)


def test_a_base_without_a_checker() -> None:
    assert not has_checker("demo")
    with pytest.raises(UserError, match="demo has no safety_checker/ folder"):
        SafetyChecker("demo")


def test_a_checker_with_a_missing_weight_is_refused(
    checker: StableDiffusionSafetyChecker, tmp_path: Path
) -> None:
    """transformers would fill it with random numbers."""
    base = save(checker, tmp_path)
    file = tmp_path / "safety_checker" / "model.safetensors"
    weights: dict[str, torch.Tensor] = load_file(file)
    del weights["concept_embeds"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="safety_checker/ lacks weights .*: concept_embeds"):
        SafetyChecker(base)
