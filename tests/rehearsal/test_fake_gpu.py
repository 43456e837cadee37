"""The fake GPU itself: what it refuses, what it counts."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ghibli.prepare.fake_gpu import CUDA, FakeGpu, fake_gpu, kept_for_backward, storage_bytes


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as found:
        yield found


def test_mixed_devices_raise(gpu: FakeGpu) -> None:
    there = torch.zeros(3).to(CUDA)
    with pytest.raises(RuntimeError, match="found at least two devices"):
        there + torch.zeros(3)
    with pytest.raises(RuntimeError, match="indexed by one on another device"):
        torch.zeros(3)[there.long()]
    assert there[torch.zeros(2, dtype=torch.long)].device == CUDA  # which a GPU does too
    assert torch.equal(torch.zeros(3) + 1, torch.ones(3))  # what is on the CPU is computed


def test_mixed_dtypes_raise(gpu: FakeGpu) -> None:
    inputs = torch.zeros(2, 4, 1, 1).to(CUDA)
    for layer in (nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Conv2d(4, 4, 1)):
        layer.to(CUDA, torch.bfloat16)
        values = inputs if isinstance(layer, nn.Conv2d) else inputs[:, :, 0, 0]
        with pytest.raises(RuntimeError, match="dtypes|should be the same"):
            layer(values)
        with torch.autocast("cuda", torch.bfloat16):
            assert layer(values).dtype == torch.bfloat16


def test_what_the_cpu_asks_for_is_counted(gpu: FakeGpu) -> None:
    there = torch.ones(3).to(CUDA)
    there = there * 2
    assert gpu.waits == []
    assert there.sum().item() == 1.0
    assert there.isfinite().all()
    assert torch.equal(there.cpu(), torch.zeros(3))
    torch.cuda.synchronize()
    assert gpu.waits == ["item", "item", "cpu", "synchronize"]


def test_bytes_are_those_of_the_live_tensors(gpu: FakeGpu) -> None:
    there = torch.zeros(1024).to(CUDA)
    assert gpu.now == 4096
    view, more = there.view(2, 512), there + 1
    assert gpu.now == 8192
    del there, more
    assert (gpu.now, gpu.peak) == (4096, 8192)
    del view
    assert gpu.now == 0
    odd = torch.zeros(3).to(CUDA)
    assert gpu.now == 512 and odd.nbytes == 12


def test_what_backward_would_keep(gpu: FakeGpu) -> None:
    """Of two linear layers without biases: the first one's input and weight, the second one's."""
    layers = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)).to(CUDA)
    inputs = torch.zeros(8, 256).to(CUDA)
    _, kept = kept_for_backward(lambda: layers(inputs))
    weights = {id(parameter.untyped_storage()) for parameter in layers.parameters()}
    beside = [tensor for tensor in kept if id(tensor.untyped_storage()) not in weights]
    assert storage_bytes(beside) == 2 * 8 * 256 * 4


def test_everything_is_as_before_afterwards() -> None:
    before = nn.functional.scaled_dot_product_attention, nn.Module._apply, torch.cuda.synchronize
    with fake_gpu():
        assert nn.Module._apply is not before[1]
    assert before == (nn.functional.scaled_dot_product_attention, nn.Module._apply, torch.cuda.synchronize)
    assert torch.zeros(3).device.type == "cpu"
