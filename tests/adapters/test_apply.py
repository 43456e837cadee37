"""model.adapter: an adapter merged into the base when it is loaded."""

from pathlib import Path

import pytest
import torch

from ghibli.adapters import apply, lora
from ghibli.config.schema import LoraConfig
from ghibli.diffusion.samplers import Cell, sample
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runtime.errors import UserError

OPTIONS = LoraConfig(
    rank=4, alpha=8, dropout=0.1, targets=["to_q", "to_v"], text_encoder=True,
    text_encoder_targets="attention", variant="lora", init=None,
)  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, BaseModel]:
    """A folder with an adapter whose B is not zero, and the model that it was saved from."""
    live = load("demo")
    lora.add_lora(live, OPTIONS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.trainable(live).items():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    lora.save_adapter(live, tmp_path)
    return tmp_path, live


@torch.no_grad()
def predict(base: BaseModel) -> torch.Tensor:
    base.unet.eval()
    base.text_encoder.eval()
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(2))
    prompt_embeds = base.encode_prompts(base.tokenize(["a panda on a train", "a red boat"]))
    return base.unet(latents, torch.tensor([10, 700]), prompt_embeds, return_dict=False)[0]


def test_merged_base_equals_base_with_adapter(adapter: tuple, base: BaseModel) -> None:
    folder, live = adapter
    before = predict(base)
    apply.merge(base, folder, 1.0)
    torch.testing.assert_close(predict(base), predict(live), atol=1e-5, rtol=1e-4)
    assert (predict(base) - before).abs().max() > 1e-3
    assert not lora.trainable(base)
    assert not [name for name, _ in base.unet.named_parameters() if "lora" in name]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_merged_base_draws_the_images_of_base_with_adapter(
    adapter: tuple, base: BaseModel, sampler: str
) -> None:
    """30 steps at guidance 7.5 could amplify small differences: none exceeds one of 255 levels."""
    folder, live = adapter
    live.unet.eval()
    live.text_encoder.eval()
    apply.merge(base, folder, 1.0)
    options = {"num_inference_steps": 30, "seeds": [3], "resolution": 128}
    attached, merged = (
        sample(model, ["a panda on a train"], Cell(sampler, 7.5), **options) for model in (live, base)
    )
    assert (attached - merged).abs().max() <= 1 / 255
    assert attached.std() > 0.05  # an image, not a flat colour


def test_scale_zero_is_the_base(adapter: tuple, base: BaseModel) -> None:
    before = predict(base)
    apply.merge(base, adapter[0], 0.0)
    assert torch.equal(predict(base), before)


def test_a_missing_adapter_is_named(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pytorch_lora_weights[.]safetensors there"):
        apply.merge(base, tmp_path, 1.0)
