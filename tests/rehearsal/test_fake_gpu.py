"""The GPU path on fake CUDA tensors: a wrong device or dtype fails.

A training step and the memory are rehearsed at the size of SD 1.5, all else at the demo's: the same code.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ghibli.config.registry import SAMPLERS
from ghibli.config.schema import Config
from ghibli.data import latents as encoder
from ghibli.diffusion.samplers import Cell, in_eval_mode, sample
from ghibli.evaluation.features import FeatureExtractor, style_features
from ghibli.models.base import BaseModel
from ghibli.models.performance import PromptEmbeds
from ghibli.models.sd15 import TEXT_ENCODER, sd15_shapes
from ghibli.prepare import rehearsal
from ghibli.prepare.fake_gpu import CUDA, FakeGpu, fake_gpu, kept_for_backward
from ghibli.prepare.rehearsal import autocast, fake_base, fake_batch, fake_module
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import make_optimizer
from ghibli.training.probe import gather

SIZE = ("model.resolution=512", "data.batch_size=1", "data.accumulate=1", "lora.rank=32")
CLIP_L = {  # openai/clip-vit-large-patch14
    "text_config": TEXT_ENCODER,
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    },
    "projection_dim": 768,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sd15() -> BaseModel:
    return sd15_shapes()


@pytest.fixture
def shapes(base: BaseModel) -> BaseModel:
    return base


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as found:
        yield found


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config()


def rehearsed(config: Config, shapes: BaseModel, gpu: FakeGpu, precision: str = "bf16-mixed") -> GhibliModule:
    return fake_module(config, shapes, precision, gpu)


def step(module: GhibliModule, precision: str, size: int = 1) -> dict[str, torch.Tensor]:
    with autocast(precision):
        return module.training_step(fake_batch(module, size), 0)


# The fake itself


def test_mixed_devices_raise(gpu: FakeGpu) -> None:
    there = torch.zeros(3).to(CUDA)
    with pytest.raises(RuntimeError, match="found at least two devices"):
        there + torch.zeros(3)
    assert torch.equal(torch.zeros(3) + 1, torch.ones(3))  # what is on the CPU is computed


def test_what_the_cpu_asks_for_is_counted(gpu: FakeGpu) -> None:
    there = torch.ones(3).to(CUDA)
    there = there * 2
    assert gpu.waits == []
    assert there.sum().item() == 1.0
    assert there.isfinite().all()
    assert torch.equal(there.cpu(), torch.zeros(3))
    assert gpu.waits == ["item", "item", "cpu"]


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


# Training


@pytest.mark.parametrize(("guidance", "precision"), [(1, "bf16-mixed"), (7.5, "16-mixed"), (7.5, "32-true")])
def test_a_training_step(
    make_config: Callable[..., Config], shapes: BaseModel, gpu: FakeGpu, guidance: float, precision: str
) -> None:
    module = rehearsed(make_config(f"loss.guidance={guidance}"), shapes, gpu, precision)
    found = step(module, precision)
    assert found["loss"].device == CUDA and found["loss"].dtype == torch.float32
    assert found["loss"].requires_grad
    assert gpu.waits == []
    weights = {p.dtype for name, p in module.unet.named_parameters() if ".lora_" in name}
    assert weights == {torch.float32}


def test_a_training_step_at_full_size(
    make_config: Callable[..., Config], sd15: BaseModel, gpu: FakeGpu
) -> None:
    module = rehearsed(make_config(*SIZE, "loss.guidance=7.5"), sd15, gpu)
    found = step(module, "bf16-mixed")
    assert found["loss"].device == CUDA and found["loss"].dtype == torch.float32
    assert gpu.waits == []


def test_what_it_keeps_is_what_was_counted_elsewhere(
    make_config: Callable[..., Config], sd15: BaseModel, gpu: FakeGpu
) -> None:
    """0.803 GB an image, as counted on meta tensors for rank 16, and 0.227 for dropout, within a tenth."""
    kept = []
    for dropout in (0, 0.1):
        module = rehearsed(
            make_config(*SIZE, f"lora.dropout={dropout}", "lora.text_encoder=false"), sd15, gpu
        )
        module.known_prompts = PromptEmbeds(module.base, module.empty_ids, lambda done, total: None)
        before = gpu.now
        with autocast("bf16-mixed"):
            result, _ = kept_for_backward(lambda m=module: m.losses(fake_batch(m, 1)))
        kept.append((gpu.now - before) / 1e9)
        del result, module
    assert kept[0] == pytest.approx(0.803, rel=0.1)
    assert kept[1] - kept[0] == pytest.approx(0.227, rel=0.25)


@pytest.mark.parametrize(
    "words",
    [("compute.channels_last=true",), ("compute.checkpoint_every=1",), ("compute.checkpoint_every=2",)],
)
def test_each_compute_option(
    make_config: Callable[..., Config], shapes: BaseModel, gpu: FakeGpu, words: tuple[str, ...]
) -> None:
    config = make_config(*words)
    module = GhibliModule(config, fake_base(shapes, gpu), base_hash="rehearsed")
    rehearsal.shrink_frozen(module.base, "bf16-mixed")
    module.to(CUDA).train()
    module.probe.expected = torch.ones(1000).to(CUDA)
    assert step(module, "bf16-mixed")["loss"].device == CUDA
    assert gpu.waits == []


def test_the_optimiser_steps_on_the_gpu(config: Config, shapes: BaseModel, gpu: FakeGpu) -> None:
    module = rehearsed(config, shapes, gpu)
    for parameter in module.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(config.optimizer, module.trainable, on_gpu=True)
    torch.nn.utils.clip_grad_norm_(module.trainable.values(), 1.0, foreach=True)
    optimizer.step()
    assert gpu.waits == []
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert {value.device.type for value in state} == {"cuda"}


def test_steps_ask_nothing_of_the_gpu(config: Config, shapes: BaseModel, gpu: FakeGpu) -> None:
    """Neither .item(), .cpu(), bool() nor a copy to the CPU, with everything that listens to a step."""
    module = rehearsed(config, shapes, gpu)
    heard: list[torch.Tensor] = []
    module.loss_listeners.append(lambda batch, losses: heard.append(losses))
    batch = fake_batch(module, 1)
    for _ in range(3):
        with autocast("bf16-mixed"):
            module.training_step(batch, 0)
    assert len(heard) == 3 and gpu.waits == []


# The probe, sampling, evaluation


@pytest.mark.parametrize("guidance", [1, 7.5])
def test_the_probe(config: Config, shapes: BaseModel, gpu: FakeGpu, guidance: float) -> None:
    module = rehearsed(config, shapes, gpu).eval()
    with torch.no_grad(), autocast("bf16-mixed"):
        scores = module.scores(fake_batch(module, 4), guidance, module.base_alphas_cumprod)
    assert scores.shape == (2, 4) and scores.device == CUDA and scores.dtype == torch.float32


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_sampling(config: Config, shapes: BaseModel, gpu: FakeGpu, sampler: str) -> None:
    module = rehearsed(config, shapes, gpu)
    plain_sample = inspect.unwrap(sample)  # without inference mode, which fakes do not follow
    with torch.no_grad(), in_eval_mode(module.base), autocast("bf16-mixed"):
        images = plain_sample(
            module.base, ["a house", "a train"], Cell(sampler, 7.5), num_inference_steps=2, seeds=[0, 1],
            resolution=64,
        )  # fmt: skip
    assert images.shape == (2, 3, 64, 64) and images.device.type == "cpu"
    assert next(module.base.vae.parameters()).device.type == "cpu"  # back at home


def test_encoding_images(
    shapes: BaseModel, gpu: FakeGpu, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = fake_base(shapes, gpu)
    base.vae.to(CUDA)
    files = sorted(images.rglob("*.[jp]*g"))[:3]
    found = encoder.encode(base, files, resolution=64, resize="squash")
    assert len(found.mean) == 3 and tuple(found.mean[0].shape) == (4, 8, 8)
    assert found.mean[0].device.type == "cpu"


def test_style_features(shapes: BaseModel, gpu: FakeGpu) -> None:
    base = fake_base(shapes, gpu)
    base.vae.to(CUDA)
    assert style_features(base.vae, torch.zeros(2, 3, 64, 64)).device == CUDA


def test_the_caption_score_is_computed_on_the_gpu(
    config: Config, shapes: BaseModel, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CLIP on the CPU the score of an evaluation at 512 px takes hours."""
    base = fake_base(shapes, gpu)
    base.vae.to(CUDA)
    with gpu.all_fake():
        clip = CLIPModel(CLIPConfig(**CLIP_L)).eval()
    seen: list[torch.device] = []
    clip.vision_model.register_forward_hook(lambda _, inputs, output: seen.append(output[0].device))
    monkeypatch.setattr("ghibli.evaluation.features.weights_hash", lambda base: "rehearsed")
    extractor = FeatureExtractor(replace(config, model=replace(config.model, clip=None)), base)
    extractor.clip = clip, CLIPImageProcessor()
    found = extractor.measure(torch.zeros(3, 3, 64, 64), ["a house"] * 3)
    assert seen == [CUDA]
    assert {name: (rows.device.type, len(rows)) for name, rows in found.items()} == {
        "features": ("cpu", 3), "layout": ("cpu", 3), "caption_fit": ("cpu", 3),
    }  # fmt: skip


def test_devices_put_their_scores_together(config: Config, shapes: BaseModel, gpu: FakeGpu) -> None:
    """DDP's gather, with Lightning's collective stood in for: the probe's images in their order."""
    shares = torch.zeros(2, 3, 2, 4).to(CUDA)
    data = SimpleNamespace(probe_batches=[0] * 5)
    module: Any = SimpleNamespace(
        trainer=SimpleNamespace(world_size=2, datamodule=data), all_gather=lambda scores: shares
    )
    found = gather(module, shares[0])
    assert found.device == CUDA and found.shape == (5, 2, 4)


# The prediction


def test_memory_of_a_run(make_config: Callable[..., Config], sd15: BaseModel) -> None:
    """Weights 1.9 GiB (UNet and text encoder in 16 bits), 1.14 GiB kept an image; checkpointing less."""
    found = rehearsal.predict(make_config(*SIZE), sd15, "bf16-mixed")
    gib = 2**30
    assert found.weights / gib == pytest.approx(1.62 + 0.3, rel=0.05)
    assert found.training[0].more / gib == pytest.approx(1.14, rel=0.15)
    assert found.training[1].more < 0.4 * found.training[0].more


def test_fewer_bits_take_less(config: Config, shapes: BaseModel) -> None:
    halved = replace(config, model=replace(config.model, frozen_bits=4))
    plain, small = (rehearsal.predict(c, shapes, "bf16-mixed") for c in (config, halved))
    assert small.weights < plain.weights
    assert small.training[0].more == plain.training[0].more
