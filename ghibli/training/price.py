"""What the base was made for: a second fixed set of items, on which the probe measures what a style cost.

Of most bases nobody knows what they were made for better than themselves: they are sampled for everyday
captions. The demo base was made for photo-like scenes, so scenes are drawn that it never saw. Either set is
made once for a base, and read from the cache afterwards.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch

from ghibli.adapters import lora
from ghibli.config.schema import Config
from ghibli.data.everyday import measured_captions
from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments
from ghibli.data.validation_items import make_items
from ghibli.demo.scenes.scene import PRICE_SEEDS, compose, draw
from ghibli.diffusion.samplers import Cell, NotFinite, in_eval_mode, sample, steps_key
from ghibli.models.base import BaseModel, part_hash
from ghibli.runtime.cache import cached
from ghibli.runtime.console import counted
from ghibli.runtime.resources import device_name
from ghibli.runtime.wording import number_of

logger = logging.getLogger(__name__)

VERSION = 1  # part of the cache key; raise it when the set changes
CELL, STEPS = Cell("dpmpp_2m", 7.5), 20  # how a base is sampled: as people do


class Untouched(Protocol):
    """What is asked of a module whose base is on its device, and still untouched."""

    config: Config
    base: BaseModel
    results_key: str
    trainer: L.Trainer
    device: torch.device

    @property
    def num_train_timesteps(self) -> int:
        """Return T of the noise schedule."""


def price_items(module: Untouched, count: int) -> tuple[list[CaptionedImage], list[dict[str, torch.Tensor]]]:
    """Return groups of K images, and a batch of K items for each; none if the base's images are not finite.

    Item k of a group is its image k, at a timestep of the k-th part of all: so a group costs what a
    held-out image costs, and holds K scenes. The last group is filled up with the first images.

    Args:
        count: images, at least 1.
    """
    config, base = module.config, module.base
    items, captions = config.validation.items_per_image, measured_captions(config, count)
    moments = price_moments(module, captions)
    if moments is None:
        return [], []
    images = [CaptionedImage(Path(text), text, name_of(row, text)) for row, text in enumerate(captions)]
    batches = make_items(
        images, moments, base.tokenize(captions), items_per_image=items,
        num_train_timesteps=module.num_train_timesteps, scaling_factor=base.vae.config.scaling_factor,
    )  # fmt: skip
    groups = [[(start + k) % count for k in range(items)] for start in range(0, count, items)]
    mixed = [
        {name: torch.stack([batches[row][name][k] for k, row in enumerate(group)]) for name in batches[0]}
        for group in groups
    ]
    return [as_one([images[row] for row in group], i) for i, group in enumerate(groups)], mixed


def name_of(row: int, caption: str) -> str:
    """Return a hash that stands for an image of the set: of what it is made from, not of its values.

    The values' last bits depend on the machine, and its timesteps and noise must not.
    """
    return hashlib.sha256(f"{VERSION}\n{row}\n{caption}".encode()).hexdigest()


def as_one(images: list[CaptionedImage], index: int) -> CaptionedImage:
    """Describe a group as one image of no file: for the cache of the base's scores, and for messages."""
    content = hashlib.sha256("\n".join(image.content_hash for image in images).encode()).hexdigest()
    captions = "\n".join(image.caption for image in images)
    return CaptionedImage(Path(f"group {index + 1} of what the base was made for"), captions, content)


def price_moments(module: Untouched, captions: list[str]) -> Moments | None:
    """Return the VAE moments of the set; None if the base samples images with NaN or inf in them.

    With several devices the first one makes the set and tells the others.
    """
    trainer, config = module.trainer, module.config
    if not trainer.is_global_zero:
        found = trainer.strategy.broadcast(None)
    else:
        key: dict[str, Any] = {
            "version": VERSION, "captions": captions, "resolution": config.model.resolution,
            "vae": part_hash(module.base.vae), "device": device_name(module.device),
        }  # fmt: skip
        if config.model.made_for == "samples":
            key |= {
                "base": module.results_key, "cell": asdict(CELL), "steps": steps_key(module.base, STEPS),
                "precision": str(trainer.precision), "frozen_bits": config.model.frozen_bits,
            }  # fmt: skip
        try:
            found = cached(Path(config.cache_dir) / "price", key, lambda: make_moments(module, captions))
        except NotFinite as error:  # in 16 bits, say: training goes on without a price
            logger.warning(f"no price: {error}")
            found = None
        found = trainer.strategy.broadcast(found)
    return None if found is None else Moments(**found)


def make_moments(module: Untouched, captions: list[str]) -> dict[str, torch.Tensor]:
    """Draw or sample the set, and encode it in fp32.

    Raises:
        NotFinite: the base samples images with NaN or inf in them.
    """
    with in_eval_mode(module.base):
        make = drawn if module.config.model.made_for == "scenes" else sampled
        images = [2 * image[None] - 1 for image in make(module, captions)]
        found = [module.base.vae.encode(image.to(module.device)).latent_dist for image in images]
    return {name: torch.cat([getattr(one, name).cpu() for one in found]) for name in ("mean", "logvar")}


def drawn(module: Untouched, captions: list[str]) -> torch.Tensor:
    """Draw photo-like scenes of PRICE_SEEDS, whose captions these are: (N, 3, H, W) in 0 .. 1."""
    scenes = [compose(PRICE_SEEDS.start + i) for i in range(len(captions))]
    pixels: list[np.ndarray] = []
    with counted("drawing what the base was made for") as on_progress:
        for scene in scenes:
            pixels.append(np.asarray(draw(scene, "photo", module.config.model.resolution)))
            on_progress(len(pixels), len(scenes))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def sampled(module: Untouched, captions: list[str]) -> torch.Tensor:
    """Sample the base without any adapter, an image at a time: (N, 3, H, W) in 0 .. 1.

    Raises:
        NotFinite: NaN or inf in one of them.
    """
    logger.info(
        f"sampling {number_of(len(captions), 'image')} of the base, once, to measure what training costs it: "
        "validation.price_images=0 leaves this out"
    )
    with (
        counted("sampling what the base was made for") as on_progress,
        module.trainer.precision_plugin.forward_context(),
        lora.without_adapters(module.base),
    ):
        step = counter(on_progress, len(captions) * STEPS)
        images = [
            sample(
                module.base, [caption], CELL, num_inference_steps=STEPS, seeds=[seed],
                resolution=module.config.model.resolution, on_step=step,
            )
            for seed, caption in enumerate(captions)
        ]  # fmt: skip
    return torch.cat(images)


def counter(on_progress: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """Return what to call after each of `total` steps."""
    done = [0]

    def step() -> None:
        done[0] += 1
        on_progress(done[0], total)

    return step
