"""GhibliDataModule: images -> held-out split -> latents in memory -> training examples."""

import hashlib
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ghibli.config.schema import Config
from ghibli.data.dataset import ExampleNumbers, TrainExamples, batches_in, collate, share_of_probe
from ghibli.data.folder import CaptionedImage, ImageFolder, read_folder, summarise
from ghibli.data.latents import Moments, encode
from ghibli.data.sources import draw_missing
from ghibli.data.split import first_by_content, split_apart
from ghibli.data.validation_items import make_items
from ghibli.images.duplicates import thumbnail
from ghibli.images.resize import Size, size_for
from ghibli.models.base import BaseModel, part_hash
from ghibli.runs.folder import RunDir, check_unchanged
from ghibli.runtime.cache import cached_rows
from ghibli.runtime.console import console, counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_json


class GhibliDataModule(L.LightningDataModule):
    """Reads the folder, holds out images, encodes all once, hands out examples and probe items."""

    def __init__(self, config: Config, base: BaseModel, run: RunDir, num_train_timesteps: int):
        super().__init__()
        self.config, self.base, self.run = config, base, run
        self.num_train_timesteps = num_train_timesteps
        self.folder: ImageFolder | None = None
        self.is_ready = False

    def prepare_data(self) -> None:
        """Draws the demo's images when the folder is not there yet, or damaged."""
        draw_missing(self.config.data.root, self.config.data.draw, self.config.cache_dir)

    def read(self) -> None:
        """Reads and splits the folder, once; what is held out does not depend on anything else."""
        if self.folder is not None:
            return
        data = self.config.data
        thumbnails: dict[Path, np.ndarray] = {}
        sizes: dict[Path, Size] = {}

        def look(path: Path, image: Image.Image) -> None:
            thumbnails[path] = thumbnail(image)
            sizes[path] = size_for(image.size, self.config.model.resolution, data.resize)

        with counted("checking the images") as on_progress:
            folder = read_folder(
                Path(data.root), style=data.style, default_caption=data.caption,
                min_side=data.min_side, on_progress=on_progress,
                on_image=look,
            )  # fmt: skip
        split = split_apart(folder.images, thumbnails, data.val_fraction)
        self.train_images, self.held_out, self.moved = split.train, split.held_out, split.moved
        if not self.train_images:
            raise UserError(f"data.root={data.root}: every image is the same file; add others")
        self.val_images = first_by_content(self.held_out, self.config.validation.max_images)
        self.probe_images = self.val_images + first_by_content(self.train_images, len(self.val_images))
        self.folder, self.thumbnails = folder, thumbnails
        self.shapes = [sizes[image.path] for image in self.train_images]

    def setup(self, stage: str) -> None:
        """Reads, splits and encodes; writes split.json. Runs once."""
        if self.is_ready:
            return
        self.read()
        if self.trainer.is_global_zero:
            if self.folder.unusable:
                console.print(f"images: {summarise(self.folder.unusable)}", style="yellow")
            self._write_split(self.folder, self.held_out)
        self._encode()
        self.is_ready = True

    def _write_split(self, folder: ImageFolder, val: list[CaptionedImage]) -> None:
        def listed(images: list[CaptionedImage]) -> dict[str, str]:
            return {p.path.name: p.content_hash for p in images}

        split = {
            "train": listed(self.train_images),
            "val": listed(val),
            "unusable": folder.unusable,
        }
        write_json(self.run.split, split)
        captions = sorted((p.content_hash, p.caption) for p in folder.images)
        data_hash = hashlib.sha256(repr(captions).encode()).hexdigest()
        check_unchanged(self.run, "data_hash", data_hash, f"the image set data.root={self.config.data.root}")

    def _encode(self) -> None:
        images = self.train_images + self.val_images
        home = next(self.base.vae.parameters()).device
        self.base.vae.to(self.trainer.strategy.root_device)
        moments = self._moments(images, mirrored=False)
        count = len(self.train_images)
        self.moments = moments.of(range(count))
        self.mirrored = None
        if self.config.data.flip:
            self.mirrored = self._moments(self.train_images, mirrored=True)
        self.base.vae.to(home)
        input_ids = self.base.tokenize([p.caption for p in images])
        self.input_ids = input_ids[: len(self.train_images)]
        self.all_input_ids = torch.cat([self.base.tokenize([""]), input_ids])  # that any batch has
        rows = [images.index(image) for image in self.probe_images]
        self.probe_batches = make_items(
            self.probe_images, moments.of(rows), input_ids[rows],
            items_per_image=self.config.validation.items_per_image,
            num_train_timesteps=self.num_train_timesteps,
            scaling_factor=self.base.vae.config.scaling_factor,
        )  # fmt: skip

    def _moments(self, images: list[CaptionedImage], mirrored: bool) -> Moments:
        """The VAE's code of these images, from the cache where it was made before."""
        resolution, resize = self.config.model.resolution, self.config.data.resize
        options = {"resolution": resolution, "resize": resize, "mirrored": mirrored}

        paths = {p.content_hash: p.path for p in images}

        def make(contents: list[str], before: int, total: int) -> dict[str, torch.Tensor]:
            with counted(f"encoding the {'mirrored ' * mirrored}images") as on_progress:
                return vars(encode(
                    self.base, [paths[content] for content in contents], **options,
                    on_progress=lambda done, _: on_progress(before + done, total),
                ))  # fmt: skip

        device = self.trainer.strategy.root_device.type
        key = options | {"vae": part_hash(self.base.vae), "device": device}
        contents = [p.content_hash for p in images]
        return Moments(**cached_rows(Path(self.config.cache_dir) / "latents", key, contents, make))

    def steps_per_epoch(self, accumulate: int, world_size: int) -> int:
        """Optimiser steps in an epoch: floor(N / global batch), the remainder dropped.

        With several shapes of images it is the full batches of one shape, over the accumulation.

        Raises:
            UserError: fewer training images than one optimiser step takes.
        """
        steps = batches_in(self.shapes, self.config.data.batch_size * world_size) // accumulate
        if steps == 0:
            raise UserError(
                f"data.batch_size={self.config.data.batch_size} x accumulation {accumulate} x devices "
                f"{world_size} is more than the {len(self.train_images)} training images: lower "
                "data.batch_size or data.accumulate"
            )
        return steps

    def train_dataloader(self) -> DataLoader:
        """Training batches from the trainer's current optimiser step on."""
        trainer, data = self.trainer, self.config.data
        accumulate = trainer.accumulate_grad_batches
        batches = self.steps_per_epoch(accumulate, trainer.world_size) * accumulate
        examples = TrainExamples(
            self.moments, self.mirrored, self.input_ids, self.base.tokenize([""])[0],
            [p.path.name for p in self.train_images], self.config,
            examples_per_epoch=batches * data.batch_size * trainer.world_size,
            num_train_timesteps=self.num_train_timesteps,
            scaling_factor=self.base.vae.config.scaling_factor,
            shapes=self.shapes, together=data.batch_size * trainer.world_size,
        )  # fmt: skip
        numbers = ExampleNumbers(
            batches=batches, batch_size=data.batch_size, rank=trainer.global_rank,
            world_size=trainer.world_size, start_batch=trainer.global_step * accumulate,
        )  # fmt: skip
        return DataLoader(
            examples, data.batch_size, sampler=numbers, num_workers=data.workers, collate_fn=collate,
            persistent_workers=data.workers > 0,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """This device's share of the probe: a batch for each held-out image, then the training ones."""
        mine = share_of_probe(len(self.probe_batches), self.trainer.global_rank, self.trainer.world_size)
        return DataLoader([self.probe_batches[index] for index in mine], batch_size=None)
