"""What a run will need: memory, measured on the model itself at a small size, and disk."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghibli.config.schema import Config
from ghibli.data.latents import CHUNK
from ghibli.training.module import GhibliModule

CHECKPOINTS = 4  # last, previous, best, and the one that is being written
CUDA_CONTEXT = 2**29  # bytes that a GPU's own libraries take
FRAGMENTS = 1.35  # what a process takes for a byte of live tensors: room between them, the libraries' own
MIXED = 0.53  # what mixed precision keeps for training of what fp32 keeps, counted on the demo
BESIDE = 40 * 2**20  # bytes, whatever the tensors: what Lightning and the loggers load as training starts


class Live(TorchDispatchMode):
    """Inside it, counts the bytes of the tensors that operations make, and when they go again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), counted=False)  # weights, and what else was there before
        result = func(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._known:
                self._add(value.untyped_storage(), counted)

    def _add(self, storage: torch.UntypedStorage, counted: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counted else 0

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Cost:
    """Bytes of one step: for each example and for each px of its image."""

    example: float
    pixel: float

    def at(self, side: int, batch: int) -> float:
        return batch * (self.example + self.pixel * side**2)


def measured(step: Callable[[int, int], Any], side: int) -> Cost:
    """The cost of step(height, width), which works on one example, from its need at two small sizes.

    Every layer's tensors grow with the batch, and with the image's area or not at all: attention
    is computed in blocks and keeps no table of all pairs.
    """

    def bytes_of(height: int, width: int) -> int:
        with Live() as live:
            kept = step(height, width)
        del kept
        return live.peak

    one, two = bytes_of(side, side), bytes_of(side, 2 * side)
    return Cost(2 * one - two, (two - one) / side**2)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes at its highest, beside the weights of the base."""

    kept: float  # gradients, the optimiser's two moments, the latents: throughout training
    phases: dict[str, float]  # encoding, training, probe, sampling: one at a time

    @property
    def highest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def total(self) -> float:
        return BESIDE + FRAGMENTS * (self.kept + self.phases[self.highest])


def memory(module: GhibliModule, images: int, precision: str) -> Memory:
    """What training, probe and grids of this run will take beside what the process holds already.

    The model is run on 64 x 64 and 64 x 128 px; what its operations keep alive is counted and scaled
    up, then multiplied by FRAGMENTS. That and BESIDE were fitted to the demo on a CPU, whose process
    held 985 MiB when it was asked and grew by 97, 302 and 1104 MiB with batch 1, 18 and 72; this says
    98, 321 and 1124. Elsewhere expect to be wrong by a third: SD 1.5 at 64 px and batch 1 was said to
    take 0.25 GiB more than the 5.2 it held and took 0.1 more, while loading it had taken 6.5 (and 6.9
    on another machine) before anything could be asked. On a GPU it was never compared.

    Args:
        module: on the CPU, before training; left as it was.
        images: whose latents are kept.
        precision: Lightning's, such as 32-true or bf16-mixed.
    """
    config, side = module.config, module.config.model.resolution
    cost, loss = costs(module), config.loss
    weights = sum(p.numel() for p in module.trainable.values())
    latents = latents_size(config, images)
    branches = 1 if loss.guidance == 1 else 2
    phases = {
        "encoding the images": cost["encode"].at(side, CHUNK),
        "the probe": cost["score"].at(side, branches * config.validation.items_per_image),
    }
    if config.finetune != "none":
        phases["training"] = cost["train"].at(side, branches * config.data.batch_size)
        if precision.endswith("mixed"):
            phases["training"] *= MIXED
    if config.sample.every_n_epochs > 0:
        both = 1 if max(config.sample.guidance) == 1 else 2
        denoising = cost["score"].at(side, both * len(config.sample.prompts))
        phases["drawing the grid"] = max(denoising, cost["decode"].at(side, 1))
    return Memory(12.0 * weights + latents, phases)


def latents_size(config: Config, images: int) -> int:
    """Bytes of the images' codes, in memory and in the cache: mean and log-variance, fp32."""
    return (2 if config.data.flip else 1) * images * 2 * 4 * 4 * (config.model.resolution // 8) ** 2


def costs(module: GhibliModule) -> dict[str, Cost]:
    """The cost of each kind of step in fp32, measured on the CPU; leaves no trace in a random generator."""
    base, channels = module.base, module.base.vae.config.latent_channels
    was_training = module.unet.training, module.text_encoder.training

    def latents(height: int, width: int) -> torch.Tensor:
        return torch.zeros(1, channels, height // base.vae_factor, width // base.vae_factor)

    def predict(height: int, width: int) -> torch.Tensor:
        prompt_embeds = base.encode_prompts(module.empty_ids)
        timestep = torch.zeros(1, dtype=torch.long)
        return base.unet(latents(height, width), timestep, prompt_embeds, return_dict=False)[0]

    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            found = {
                "encode": measured(lambda h, w: base.vae.encode(torch.zeros(1, 3, h, w)).latent_dist, 32),
                "decode": measured(lambda h, w: base.decode(latents(h, w)), 32),
                "score": measured(predict, 64),
            }
        if module.trainable:
            module.unet.train()
            module.text_encoder.train()
            found["train"] = measured(predict, 64)
            module.unet.train(was_training[0])
            module.text_encoder.train(was_training[1])
    return found


def on_device(module: GhibliModule, device: torch.device, precision: str) -> float:
    """Bytes that the model itself takes there, where it is not on the CPU, which holds it already.

    In 16-bit training that is half for what is frozen (compute.shrink_frozen).
    """
    if device.type == "cpu":
        return 0.0
    frozen = 2 if precision.endswith("mixed") else 4
    parts = (module.base.unet, module.base.text_encoder)
    held = sum(p.numel() * (4 if p.requires_grad else frozen) for part in parts for p in part.parameters())
    return CUDA_CONTEXT + held + sum(4 * p.numel() for p in module.base.vae.parameters())


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes."""

    checkpoints: int
    adapters: int  # and the whole UNet of a full fine-tuning
    grids: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.adapters + self.grids


def disk(config: Config, weights: int, epochs: int, cells: int) -> Disk:
    """What the run folder takes: checkpoints (3, and one in the making), adapters (best, last, kohya), grids.

    Args:
        weights: trained numbers; a checkpoint has them and AdamW's two moments, 12 bytes each.
        epochs: at most.
        cells: columns of a grid.
    """
    every, side = config.sample.every_n_epochs, config.model.resolution
    tile = (side if side >= 256 else 2 * side) ** 2
    grids = 0 if every == 0 else 1 + epochs // every
    images = grids * 2 * cells * len(config.sample.prompts)
    return Disk(CHECKPOINTS * 12 * weights, 3 * 4 * weights, int(1.5 * tile * images))  # a PNG's pixel
