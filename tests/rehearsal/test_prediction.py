"""What a run is predicted to take on a card, against numbers that were counted in other ways."""

from collections.abc import Callable

import pytest
from helpers.commands import GRIDS

from ghibli.config.schema import Config
from ghibli.models import sd15
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.models.quantize import quantize_frozen, weight_bytes
from ghibli.prepare import rehearsal
from ghibli.prepare.fake_gpu import fake_gpu, kept_for_backward, storage_bytes
from ghibli.training.module import GhibliModule

GIB = 2**30
LAYERS = "layers_per_block"
SD15 = ("model.resolution=512", "data.batch_size=1", "data.accumulate=1", "lora.rank=32")


def test_memory_of_a_run(make_config: Callable[..., Config]) -> None:
    """UNet and text encoder in 16 bits, 1.14 GiB kept an image at rank 32."""
    with fake_gpu() as gpu:
        module = rehearsal.fake_module(make_config(*SD15), sd15.sd15_shapes(), "bf16-mixed", gpu)
        weights = gpu.now
        one, two = (rehearsal.training_bytes(module, "bf16-mixed", gpu, size).peak for size in (1, 2))
    assert weights / GIB == pytest.approx(1.62 + 0.3, rel=0.05)
    assert (two - one) / GIB == pytest.approx(1.14, rel=0.15)


def test_a_prediction_of_every_phase(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few blocks and layers: what they weigh and keep; checkpointing keeps less."""
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        monkeypatch.setitem(sd15.UNET, name, (sd15.UNET[name][0], sd15.UNET[name][-1]))
    for part, name in ((sd15.UNET, LAYERS), (sd15.VAE, LAYERS), (sd15.TEXT_ENCODER, "num_hidden_layers")):
        monkeypatch.setitem(part, name, 1)
    config, like = make_config(*SD15, *GRIDS), sd15.sd15_shapes()
    found = rehearsal.predict(config, like, "bf16-mixed")
    with fake_gpu() as gpu:
        module = rehearsal.fake_module(config, like, "bf16-mixed", gpu)
        one, two = kept_by_a_step(module, 1), kept_by_a_step(module, 2)
    parts = module.base.adaptable.values()
    assert found.weights == pytest.approx(
        sum(w.nbytes for part in parts for w in part.parameters()), rel=0.01
    )
    assert found.training[0].more == pytest.approx(two - one, rel=0.15)
    assert found.training[1].more < 0.4 * found.training[0].more
    assert found.others.keys() == {"the probe", "drawing the grid", "encoding the images"}


def kept_by_a_step(module: GhibliModule, size: int) -> int:
    """Bytes of what autograd itself says that it keeps of a batch."""
    batch = rehearsal.fake_batch(module, size)
    with rehearsal.autocast("bf16-mixed"):
        _, kept = kept_for_backward(lambda: module.training_step(batch, 0))
    return storage_bytes(kept)


@pytest.fixture(scope="module")
def saved(make_config: Callable[..., Config]) -> dict[int | None, float]:
    """What fewer bits save of the demo, as predicted."""
    with fake_gpu() as gpu:
        module = rehearsal.fake_module(make_config("lora.rank=4"), load("demo"), "32-true", gpu)
        return {bits: rehearsal.saved_by_bits(module, bits, "32-true") for bits in (None, 8, 4)}


@pytest.mark.parametrize("bits", [8, 4])
def test_what_fewer_bits_save(saved: dict[int | None, float], base: BaseModel, bits: int) -> None:
    """As much as bitsandbytes' weights with their scales are smaller, and nothing without them."""
    pytest.importorskip("bitsandbytes", reason="extra of this project")
    before = sum(weight_bytes(part) for part in base.adaptable.values())
    quantize_frozen(base, bits)
    after = sum(weight_bytes(part) for part in base.adaptable.values())
    assert saved[bits] == pytest.approx(before - after, rel=0.02) and saved[None] == 0
