"""What a run will need: memory, measured on the model itself at a small size, and disk."""

import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghibli.latents import CHUNK
from ghibli.module import GhibliModule
from ghibli.schema import Config

MEMORY_LIMITS = Path("/sys/fs/cgroup")  # of the container this process is in
CHECKPOINTS = 4  # last, previous, best, and the one that is being written
CUDA_CONTEXT = 2**29  # bytes that a GPU's own libraries take


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
    """Bytes of one step as fixed + batch (example + area side^2)."""

    fixed: float
    example: float
    area: float

    def at(self, side: int, batch: int) -> float:
        return self.fixed + batch * (self.example + self.area * side**2)


def measured(step: Callable[[int, int], Any], side: int) -> Cost:
    """The cost of step(side, batch), from its highest need at three small sizes.

    Every layer's tensors grow with the batch, and with the picture's area or not at all: attention
    is computed in blocks and keeps no table of all pairs.
    """

    def bytes_of(side: int, batch: int) -> int:
        with Live() as live:
            kept = step(side, batch)
        del kept
        return live.peak

    one, large, two = bytes_of(side, 1), bytes_of(2 * side, 1), bytes_of(side, 2)
    area = (large - one) / (3 * side**2)
    return Cost(max(0, 2 * one - two), two - one - area * side**2, area)


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
        return self.kept + self.phases[self.highest]


def memory(module: GhibliModule, pictures: int, precision: str) -> Memory:
    """What training, probe and grids of this run will take, at its batch size and resolution.

    The model is run at 64 and 128 px, which takes a second on the demo, and what its operations
    keep alive is counted and scaled up. The rest of the process (libraries and base, 0.7 GB on the
    demo, 5 GB with SD 1.5) is there already when this is asked.

    Args:
        module: on the CPU, before training; left as it was.
        pictures: whose latents are kept.
        precision: Lightning's, such as 32-true or bf16-mixed.
    """
    config, side = module.config, module.config.model.resolution
    cost = costs(module, precision)
    weights = sum(p.numel() for p in module.trainable.values())
    latents = (3 if config.data.flip else 2) * pictures * 2 * 4 * 4 * (side // 8) ** 2  # mean, log-variance
    kept = 12.0 * weights + latents
    phases = {
        "encoding the pictures": cost["encode"].at(side, CHUNK),
        "the probe": cost["score"].at(side, config.validation.items_per_picture),
    }
    if config.finetune != "none":
        phases["training"] = cost["train"].at(side, config.data.batch_size)
    if config.sample.every_n_epochs > 0:
        pair = cost["guided"].at(side, len(config.sample.prompts))
        phases["drawing the grid"] = max(pair, cost["decode"].at(side, 1))
    return Memory(kept, phases)


def costs(module: GhibliModule, precision: str) -> dict[str, Cost]:
    """The cost of each kind of step, measured on the CPU; leaves no trace in any random generator."""
    base, config = module.base, module.config
    was_training = module.unet.training, module.text_encoder.training

    def batch(side: int, size: int) -> dict[str, Any]:
        latents = torch.zeros(size, base.vae.config.latent_channels, side // 8, side // 8)
        return {
            "latents": latents, "noise": latents, "timesteps": torch.zeros(size, dtype=torch.long),
            "input_ids": module.empty_ids.expand(size, -1),
        }  # fmt: skip

    def scores(guidance: float) -> Callable[[int, int], Any]:
        return lambda side, size: module.scores(batch(side, size), guidance, module.base_alphas_cumprod)

    found = {}
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            found["encode"] = measured(lambda s, n: base.vae.encode(torch.zeros(n, 3, s, s)).latent_dist, 32)
            found["decode"] = measured(lambda s, n: base.decode(batch(s, n)["latents"]), 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("mixed")):
            with torch.no_grad():
                found["score"] = measured(scores(config.loss.guidance), 64)
                found["guided"] = measured(scores(2), 64)
            if config.finetune != "none":
                module.unet.train()
                module.text_encoder.train()
                found["train"] = measured(lambda s, n: module.losses(batch(s, n)), 64)
                module.unet.train(was_training[0])
                module.text_encoder.train(was_training[1])
    return found


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        limit = int((MEMORY_LIMITS / "memory.max").read_text())  # `max` where there is none
        used = int((MEMORY_LIMITS / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def on_device(module: GhibliModule, device: torch.device) -> float:
    """Bytes that the model itself takes there, where it is not on the CPU, which holds it already."""
    if device.type == "cpu":
        return 0.0
    parts = (module.base.unet, module.base.text_encoder, module.base.vae)
    return CUDA_CONTEXT + sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


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
    """What the run folder takes: three checkpoints and one in the making, adapters, grids.

    Args:
        weights: trained numbers; a checkpoint has them and AdamW's two moments, 12 bytes each.
        epochs: at most.
        cells: columns of a grid.
    """
    every, side = config.sample.every_n_epochs, config.model.resolution
    tile = (side if side >= 256 else 2 * side) ** 2
    grids = 0 if every == 0 else 1 + epochs // every
    pictures = grids * 2 * cells * len(config.sample.prompts)
    return Disk(CHECKPOINTS * 12 * weights, 2 * 4 * weights, int(1.5 * tile * pictures))  # a PNG's pixel


def free_disk(folder: Path) -> int:
    """Free bytes where the folder is or will be."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
