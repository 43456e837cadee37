"""What a run is predicted to take on a card, against numbers that were counted in other ways."""

from collections.abc import Callable

import pytest

from ghibli.config.schema import Config
from ghibli.models.load import load
from ghibli.models.quantize import quantize_frozen, weight_bytes
from ghibli.models.sd15 import sd15_shapes
from ghibli.prepare import rehearsal
from ghibli.prepare.fake_gpu import fake_gpu

GIB = 2**30


def test_memory_of_a_run(make_config: Callable[..., Config]) -> None:
    """UNet and text encoder in 16 bits, 1.14 GiB kept an image at rank 32; checkpointing keeps less."""
    words = ("model.resolution=512", "data.batch_size=1", "data.accumulate=1", "lora.rank=32")
    found = rehearsal.predict(make_config(*words), sd15_shapes(), "bf16-mixed")
    assert found.weights / GIB == pytest.approx(1.62 + 0.3, rel=0.05)
    assert found.training[0].more / GIB == pytest.approx(1.14, rel=0.15)
    assert found.training[1].more < 0.4 * found.training[0].more
    assert found.others.keys() == {"the probe", "drawing the grid", "encoding the images"}


@pytest.mark.parametrize("bits", [8, 4])
def test_what_fewer_bits_save(make_config: Callable[..., Config], bits: int) -> None:
    """As much as bitsandbytes' weights with their scales are smaller, and nothing without them."""
    pytest.importorskip("bitsandbytes", reason="extra of this project")
    base = load("demo")
    before = sum(weight_bytes(part) for part in base.adaptable.values())
    with fake_gpu() as gpu:
        module = rehearsal.fake_module(make_config("lora.rank=4"), base, "32-true", gpu)
        saved = rehearsal.saved_by_bits(module, bits, "32-true")
        assert rehearsal.saved_by_bits(module, None, "32-true") == 0
    quantize_frozen(base, bits)
    after = sum(weight_bytes(part) for part in base.adaptable.values())
    assert saved == pytest.approx(before - after, rel=0.02)
