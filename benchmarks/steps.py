"""Time training steps, Lightning's overhead, encoding and sampling, in this process."""

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ghibli.adapters import apply
from ghibli.data.datamodule import GhibliDataModule
from ghibli.diffusion.process import guided_noise, predict_branches
from ghibli.diffusion.samplers import Cell, in_eval_mode, sample
from ghibli.models.performance import PromptEmbeds, is_frozen, shrink_frozen
from ghibli.runs.compose import compose_config
from ghibli.runs.folder import RunDir
from ghibli.runtime.resources import peak_memory, reset_peak_memory
from ghibli.training.callbacks.checkpoints import CleanStop
from ghibli.training.loggers import choice
from ghibli.training.module import GhibliModule
from ghibli.training.trainer import choose_precision, make_callbacks, make_trainer

SAMPLING_STEPS = 10


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_calls(work: Callable[[], Any], repeats: int) -> list[float]:
    """Call a function repeatedly; return the seconds of each call."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the floating-point operations per second of a large matrix product, best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / min(time_calls(lambda: left @ right, 10))


def dtype_of(overrides: list[str]) -> torch.dtype | None:
    """Return the 16-bit dtype in which `train.py OVERRIDES` computes; None = fp32."""
    config = compose_config(overrides)
    precision = choose_precision(str(config.trainer["precision"]), "auto")
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def computing(overrides: list[str], device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which `train.py OVERRIDES` computes: autocast for 16-bit precision."""
    dtype = dtype_of(overrides)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def make_module(overrides: list[str]) -> GhibliModule:
    """Make the module of `train.py OVERRIDES` on the GPU, if there is one, in training mode."""
    config = compose_config(overrides)
    module = GhibliModule(config, apply.load_base(config.model))
    shrink_frozen(module.base, choose_precision(str(config.trainer["precision"]), "auto"))
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    if is_frozen(module.text_encoder):
        with torch.no_grad(), computing(overrides, module.device):
            module.known_prompts = PromptEmbeds(module.base, module.empty_ids, lambda done, total: None)
    return module.train()


def make_batch(module: GhibliModule, batch_size: int) -> dict[str, Any]:
    """Make a batch of noise with empty captions; its content does not affect the timing."""
    side = module.config.model.resolution // module.base.vae_factor
    shape = (batch_size, module.base.unet.config.in_channels, side, side)
    return {
        "latents": torch.randn(shape, device=module.device),
        "noise": torch.randn(shape, device=module.device),
        "timesteps": torch.randint(0, 1000, (batch_size,), device=module.device),
        "input_ids": module.empty_ids.expand(batch_size, -1),
    }  # fmt: skip


def time_training(overrides: list[str], batch_size: int, repeats: int, rate: float) -> dict[str, Any]:
    """Measure a bare training step (forward, backward, AdamW) of `train.py OVERRIDES`: a row of the table.

    Args:
        rate: matmul_rate of this machine at this precision.
    """
    module = make_module(overrides)
    batch = make_batch(module, batch_size)
    dtype = dtype_of(overrides)
    optimizer = torch.optim.AdamW(module.trainable.values(), fused=module.device.type == "cuda" or None)

    def step() -> None:
        with computing(overrides, module.device):
            loss = module.losses(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, and allocates the moments of the optimiser
    reset_peak_memory()
    each = time_calls(step, repeats)
    peak = peak_memory()
    with FlopCounterMode(display=False) as flops:
        module.losses(batch).mean().backward() if dtype is None else step()
    activities = [ProfilerActivity.CUDA if module.device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        step()
    return {
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "images_per_second": batch_size / median(each),
        "peak_gib": None if peak is None else peak / 2**30,
        "kernels": len(profiled.events()),
        "of_matmul_rate": flops.get_total_flops() / median(each) / rate,
    }


class Paired(L.Callback):
    """After every step of the trainer, time the bare forward and backward pass of the same batch.

    A trainer's step is the time from the end of one bare pass to the end of the next batch; it includes the
    data loader, all callbacks, logging, gradient clipping and the optimiser.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.bare: list[float] = []
        self.mark: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: GhibliModule) -> None:
        self.mark = None  # the probe is not part of a step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: GhibliModule, *args: Any) -> None:
        synchronize()
        ended = time.perf_counter()
        batch = args[1]
        embeds = pl_module.embed(batch["input_ids"], pl_module.config.loss.guidance)
        (bare,) = time_calls(lambda: self.forward_backward(trainer, pl_module, batch, embeds), 1)
        for parameter in pl_module.trainable.values():
            parameter.grad = None
        if self.mark is not None:
            self.steps.append(ended - self.mark)
            self.bare.append(bare)
        self.mark = time.perf_counter()

    @staticmethod
    def forward_backward(
        trainer: L.Trainer, module: GhibliModule, batch: dict[str, Any], embeds: Any
    ) -> None:
        """Run the UNet, a mean squared error and the backward pass, nothing else."""
        with trainer.precision_plugin.forward_context():
            uncond, cond = predict_branches(
                module._predict_compiled, batch["noise"], batch["timesteps"], *embeds
            )
            guidance = module.config.loss.guidance
            noise_pred = cond if uncond is None else guided_noise(uncond, cond, guidance)
            loss = torch.nn.functional.mse_loss(noise_pred.float(), batch["latents"])
        loss.backward()


def time_overhead(overrides: list[str]) -> tuple[float, float]:
    """Measure (trainer's step, bare step) in seconds: medians over a run of `train.py OVERRIDES`."""
    config = compose_config([*overrides, "wandb.mode=offline"])
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.status.update(state="running")
        base = apply.load_base(config.model)
        module = GhibliModule(config, base)
        data = GhibliDataModule(config, base, run, module.num_train_timesteps)
        with CleanStop(run) as stop:
            trainer = make_trainer(config, run, make_callbacks(config, run, stop))
            trainer.loggers = choice.start(config, run)
            paired = Paired()
            trainer.callbacks.append(paired)
            trainer.fit(module, data)
        choice.close_all()
    return median(paired.steps), median(paired.bare)


def time_encoding(overrides: list[str], batch_size: int) -> dict[str, float]:
    """Measure the seconds that it takes to encode one image and one caption."""
    module = make_module(overrides)
    vae, side = module.base.vae, module.config.model.resolution
    pixels = torch.randn(batch_size, 3, side, side, device=module.device)
    input_ids = module.empty_ids.expand(batch_size, -1)
    with torch.no_grad(), computing(overrides, module.device):
        image = median(time_calls(lambda: vae.encode(pixels), 5)) / batch_size
        caption = median(time_calls(lambda: module.text_encoder(input_ids), 5)) / batch_size
    return {"image": image, "caption": caption}


def time_sampling(overrides: list[str], count: int) -> dict[str, float]:
    """Measure UNet evaluations and images per second of guided DDIM sampling."""
    module = make_module(overrides)
    module.known_prompts = None
    module.base.unet.to(memory_format=torch.channels_last)

    def draw() -> None:
        with torch.no_grad(), computing(overrides, module.device), in_eval_mode(module.base):
            sample(
                module.base, ["an image"] * count, Cell("ddim", 7.5), num_inference_steps=SAMPLING_STEPS,
                seeds=list(range(count)), resolution=module.config.model.resolution,
            )  # fmt: skip

    draw()
    each = median(time_calls(draw, 3))
    steps = module.config.sample.num_inference_steps
    return {
        "evaluations_per_second": 2 * count * SAMPLING_STEPS / each,
        "images_per_second": count / (each * steps / SAMPLING_STEPS),
    }
