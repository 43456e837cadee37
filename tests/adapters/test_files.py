"""Reading adapter files: every tensor reaches a layer of the base, or the file is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghibli.adapters import apply, kohya
from ghibli.adapters.apply import adapted_layers, load_adapters
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.config.paths import DEMO
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError


@pytest.fixture
def adapter(base: BaseModel) -> Adapter:
    return read_adapter(DEMO / "near", base, "adapter")


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("key", ["unet.mid_block.hada_w1_a", "lora_unet_mid_block_x.lora_mid.weight", "emb"])
def test_a_tensor_that_no_layer_takes_is_named(
    adapter: Adapter, base: BaseModel, tmp_path: Path, layout: str, key: str
) -> None:
    """diffusers would log it, if anything, and apply the rest."""
    file = tmp_path / "more.safetensors"
    state = load_file(adapter.file) if layout == "diffusers" else kohya.to_kohya(adapter)
    save_file(state | {key: torch.zeros(4)}, file)
    with pytest.raises(
        UserError, match="adapter .*more.safetensors (holds more than LoRA layers|is not)"
    ) as e:
        read_adapter(file, base, "adapter")
    assert "\n" not in str(e.value)


def test_half_a_layer_is_named(adapter: Adapter, base: BaseModel, tmp_path: Path) -> None:
    state = load_file(adapter.file)
    lost = next(key for key in state if key.endswith("lora.up.weight") or key.endswith("lora_B.weight"))
    del state[lost]
    there = lost.replace("lora.up", "lora.down").replace("lora_B", "lora_A")
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=f"is incomplete: `{there}` is there without `{lost}`"):
        read_adapter(tmp_path / "half.safetensors", base, "adapter")


def test_every_layer_of_the_file_is_on_the_base(adapter: Adapter, base: BaseModel) -> None:
    load_adapters(base, [(adapter, 1.0)])
    assert adapted_layers(base, "adapter_0") == set(adapter.layers)


def test_a_layer_that_peft_leaves_out_is_named(
    adapter: Adapter, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were PEFT to match names otherwise one day, nothing would be drawn without that layer."""
    arrived = set(adapter.layers) - {max(adapter.layers)}
    monkeypatch.setattr(apply, "adapted_layers", lambda base, name: arrived)
    with pytest.raises(UserError, match=f"PEFT did not add its layer {max(adapter.layers)}"):
        load_adapters(base, [(adapter, 1.0)])
