"""A run rehearsed on a GPU that is not there (prepare.fake_gpu): the memory that each of its phases takes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import CLIPTextModel

from ghibli.adapters import lora
from ghibli.config.schema import Config, at_full_precision
from ghibli.data.latents import chunk_size
from ghibli.data.validation_items import items_in_a_pass
from ghibli.models.base import BaseModel
from ghibli.models.performance import recompute, shrink_frozen
from ghibli.prepare.fake_gpu import CUDA, FakeGpu, fake_gpu
from ghibli.prepare.memory import optimizer_state_size
from ghibli.training.module import GhibliModule
from ghibli.training.price import CELL

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
CUDA_CONTEXT = 2**29  # bytes that the GPU's own libraries take; assumed, not measured
RESERVED = 1.04  # bytes that the CUDA allocator holds for each byte of tensors; assumed, not measured
WEIGHT_BITS = {8: 8, 4: 4 + 8 / 64 + 32 / 64 / 256}  # of a quantised weight, with its share of 4 bits' scales


def fake_base(like: BaseModel, gpu: FakeGpu) -> BaseModel:
    """Make a base of the same shapes, on the CPU, whose weights are fakes and take no memory."""
    with gpu.all_fake():
        parts = (
            CLIPTextModel(like.text_encoder.config),
            AutoencoderKL.from_config(like.vae.config),
            UNet2DConditionModel.from_config(like.unet.config),
        )
    for part in parts:
        part.requires_grad_(False).eval()
    return BaseModel(like.tokenizer, *parts, like.scheduler_config)


def fake_module(config: Config, like: BaseModel, precision: str, gpu: FakeGpu) -> GhibliModule:
    """Make the module of a run as its setup leaves it on the GPU, in training mode."""
    plain = at_full_precision(replace(config, lora=replace(config.lora, init=None)))
    plain = replace(plain, compute=replace(config.compute, compile=False))
    module = GhibliModule(plain, fake_base(like, gpu), base_hash="rehearsed")
    shrink_frozen(module.base, precision)
    module.to(CUDA)
    module.trainable = lora.trainable(module.base)  # moved fakes are new parameters
    module.probe.expected = torch.ones(module.num_train_timesteps).to(CUDA)
    return module.train()


def fake_batch(module: GhibliModule, size: int) -> dict[str, Any]:
    """Make a training batch on the GPU."""
    side = module.config.model.resolution // module.base.vae_factor
    latents = torch.zeros(size, module.base.unet.config.in_channels, side, side).to(CUDA)
    captions, besides = module.empty_ids.expand(size, -1), {}
    if module.config.data.regularization is not None:
        besides = {"latents": latents, "noise": torch.zeros_like(latents), "ids": captions}
    return {
        **{f"regularization_{name}": value for name, value in besides.items()},
        "latents": latents, "noise": torch.zeros_like(latents),
        "timesteps": torch.zeros(size, dtype=torch.long).to(CUDA),
        "input_ids": captions, "keep_ids": captions, "example": list(range(size)), "name": [""] * size,
    }  # fmt: skip


def autocast(precision: str) -> Any:
    """Return the context in which a step computes on a GPU at Lightning's precision flag."""
    return torch.autocast("cuda", DTYPES[precision]) if precision in DTYPES else nullcontext()


@dataclass(frozen=True)
class Line:
    """Bytes that grow by the same amount with every further example of a batch."""

    one: float  # with a batch of 1
    more: float  # for every further example

    def at(self, batch: int) -> float:
        """Return the bytes with this batch."""
        return self.one + (batch - 1) * self.more


@dataclass(frozen=True)
class Prediction:
    """Bytes of GPU memory that each phase of a run takes, weights included."""

    weights: float  # of UNet, text encoder and adapter
    training: dict[int, Line]  # compute.checkpoint_every -> with a batch of so many examples
    others: dict[str, float]  # encoding, the probe, drawing

    def phases(self, checkpoint_every: int, batch: int) -> dict[str, float]:
        """Return what each phase takes on a card, with what CUDA and its allocator take beside tensors."""
        tensors = {"training": self.training[checkpoint_every].at(batch), **self.others}
        return {name: CUDA_CONTEXT + RESERVED * size for name, size in tensors.items()}

    def peak(self, checkpoint_every: int, batch: int) -> float:
        """Return the bytes of the phase that takes most."""
        return max(self.phases(checkpoint_every, batch).values())


def predict(config: Config, like: BaseModel, precision: str) -> Prediction:
    """Rehearse the phases of a run that trains, with and without gradient checkpointing.

    A backward pass does not run without a GPU: what it adds to what the forward pass keeps is taken as two
    of the largest tensors and, with checkpointing, what the largest block keeps once it is computed again.
    That, CUDA_CONTEXT and RESERVED are assumptions, which were never compared with a GPU.

    Args:
        like: the base, of whose weights only the shapes count.
        precision: Lightning's flag: bf16-mixed, 16-mixed or 32-true.
    """
    shapes_only = replace(config, compute=replace(config.compute, checkpoint_every=0))
    with fake_gpu() as gpu:
        module = fake_module(shapes_only, like, precision, gpu)
        saved = saved_by_bits(module, config.model.frozen_bits, precision)
        weights = gpu.now - saved
        beside = optimizer_bytes(module) - saved
        plain = [training_bytes(module, precision, gpu, size) for size in (1, 2)]
        training = {0: line([beside + step.peak for step in plain])}
        every = config.compute.checkpoint_every or 1
        recompute(module.base, every)
        again = [training_bytes(module, precision, gpu, size) for size in (1, 2)]
        training[every] = line([beside + a.peak + p.largest_block for a, p in zip(again, plain, strict=True)])
        others = {name: beside + size for name, size in idle_phases(module, precision, gpu).items()}
        others["encoding the images"] = encoding_bytes(module, gpu)
    return Prediction(weights, training, others)


def line(sizes: list[float]) -> Line:
    """Return the line through the bytes with batches of 1 and 2."""
    return Line(sizes[0], sizes[1] - sizes[0])


def optimizer_bytes(module: GhibliModule) -> float:
    """Return the bytes of the gradients and of the optimiser's state."""
    shapes = [tuple(parameter.shape) for parameter in module.trainable.values()]
    gradients = sum(4 * parameter.numel() for parameter in module.trainable.values())
    return gradients + optimizer_state_size(module.config.optimizer, shapes)


def saved_by_bits(module: GhibliModule, bits: int | None, precision: str) -> float:
    """Return the bytes by which model.frozen_bits makes the frozen linear layers smaller; 0 for None."""
    if bits is None:
        return 0.0
    before = 16 if precision in DTYPES else 32
    return sum(
        (before - WEIGHT_BITS[bits]) * layer.weight.numel() / 8 - scales_bytes(layer, bits)
        for part in module.base.adaptable.values()
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    )


def scales_bytes(layer: nn.Linear, bits: int) -> int:
    """Return the bytes of a layer's scale for each row in 8 bits, of its two tables of values in 4 bits."""
    return 4 * layer.out_features if bits == 8 else 4 * (16 + 256)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a training step, weights included."""

    peak: float  # forward pass, or the begin of the backward pass
    largest_block: float  # kept by the block of the UNet that keeps most


def training_bytes(module: GhibliModule, precision: str, gpu: FakeGpu, size: int) -> StepBytes:
    """Rehearse the forward pass of a training step."""
    kept: list[int] = []
    handles = [
        hook
        for block in module.unet.modules()
        if isinstance(block, ResnetBlock2D | BasicTransformerBlock)  # what is computed again at once
        for hook in measured_by(block, gpu, kept)
    ]
    batch = fake_batch(module, size)
    gpu.restart_peak()
    with autocast(precision):
        result = module.training_step(batch, 0)
    backward = gpu.now + 2 * gpu.largest
    del result
    for handle in handles:
        handle.remove()
    return StepBytes(max(gpu.peak, backward), max(kept, default=0))


def measured_by(block: nn.Module, gpu: FakeGpu, kept: list[int]) -> list[Any]:
    """Note what a block leaves on the GPU each time it is called; return the handles that end it."""
    before: list[int] = []
    return [
        block.register_forward_pre_hook(lambda *_: before.append(gpu.now)),
        block.register_forward_hook(lambda *_: kept.append(gpu.now - before.pop())),
    ]


def peak_of(work: Callable[[], Any], gpu: FakeGpu) -> float:
    """Return the peak of the bytes on the GPU during some work without gradients."""
    gpu.restart_peak()
    with torch.no_grad():
        work()
    return gpu.peak


def idle_phases(module: GhibliModule, precision: str, gpu: FakeGpu) -> dict[str, float]:
    """Rehearse the probe and, if grids or samples of the base are wanted, drawing them."""
    config, vae = module.config, module.base.vae
    module.eval()
    guidance = config.loss.own_guidance
    scored = items_in_a_pass(config.model.resolution, config.validation.items_per_image)

    def probe() -> None:
        with autocast(precision):
            module.scores(fake_batch(module, scored), guidance, module.base_alphas_cumprod)

    found = {"the probe": peak_of(probe, gpu)}

    def draw(images: int, scale: float) -> None:
        batch = fake_batch(module, images)
        with autocast(precision):
            module.scores(batch, scale, module.base_alphas_cumprod)
        module.base.decode(batch["latents"][:1])

    if config.sample.every_n_epochs > 0:
        vae.to(CUDA)
        images, scale = len(config.sample.prompts), max(config.sample.guidance)
        found["drawing the grid"] = peak_of(lambda: draw(images, scale), gpu)
    elif config.samples_price:  # one image at a time, so with grids these decide
        vae.to(CUDA)
        found["sampling the base"] = peak_of(lambda: draw(1, CELL.guidance), gpu)
    module.train()
    return found


def encoding_bytes(module: GhibliModule, gpu: FakeGpu) -> float:
    """Rehearse the VAE alone on the card: images are encoded before the other parts come."""
    side, vae = module.config.model.resolution, module.base.vae
    vae.to(CUDA)
    pixels = torch.zeros(chunk_size(side), 3, side, side).to(CUDA)
    beside = gpu.now - sum(parameter.nbytes for parameter in vae.parameters()) - pixels.nbytes
    return peak_of(lambda: vae.encode(pixels).latent_dist.mean, gpu) - beside
