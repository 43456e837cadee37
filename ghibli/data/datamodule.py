"""GhibliDataModule: images -> held-out split -> latents in memory -> training examples and probe."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from ghibli.config.schema import Config
from ghibli.data import everyday
from ghibli.data.ahead import AheadLoader
from ghibli.data.dataset import (
    WORKER_TIMEOUT,
    EncodedImages,
    EpochPlan,
    ExampleNumbers,
    TrainExamples,
    batches_in,
    check_shared_memory,
    collate,
    example_bytes,
    share_of_probe,
)
from ghibli.data.drawing import draw_missing
from ghibli.data.exclude import set_in_words, split_without_excluded
from ghibli.data.folder import CaptionedImage, ImageFolder, read_folder, repeated_folders, summarise
from ghibli.data.latents import CHUNK, Moments, chunk_size, encode
from ghibli.data.sources import image_set_hash, require_none_held_out
from ghibli.data.split import first_by_content
from ghibli.data.validation_items import images_in_a_pass, in_passes, make_items
from ghibli.images.duplicates import thumbnail
from ghibli.images.read import READING, Size
from ghibli.images.resize import size_for
from ghibli.models.base import BaseModel, part_hash
from ghibli.runs.folder import RunDir, check_unchanged
from ghibli.runtime.cache import Rows, cached_rows
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_json

logger = logging.getLogger(__name__)


class GhibliDataModule(L.LightningDataModule):
    """Read the image set, hold some images out, encode all once, serve training examples and probe items.

    Args:
        config: the run's configuration.
        base: the loaded base; its VAE encodes the images. `read` alone does without one.
        run: the run's folder, which gets split.json.
        num_train_timesteps: T of the noise schedule.
    """

    def __init__(self, config: Config, base: BaseModel | None, run: RunDir, num_train_timesteps: int):
        super().__init__()
        self.config, self._base, self.run = config, base, run
        self.num_train_timesteps = num_train_timesteps
        self.folder: ImageFolder | None = None
        self.is_ready = False
        self.price_images: list[CaptionedImage] = []  # what the base was made for: see training.price
        self.price_batches: list[dict[str, torch.Tensor]] = []
        self.keep_ids: torch.Tensor | None = None  # (N, L) of the training images, with loss.keep
        self.beside: ImageFolder | None = None  # data.regularization
        self.regularization: EncodedImages | None = None  # its images

    @property
    def scored_images(self) -> list[CaptionedImage]:
        """All images of the probe: held-out ones, training images, and what the base was made for."""
        return self.probe_images + self.price_images

    @property
    def scored_batches(self) -> list[dict[str, torch.Tensor]]:
        """The items of scored_images, a batch each."""
        return self.probe_batches + self.price_batches

    @property
    def images_in_a_pass(self) -> int:
        """How many images of the probe are scored at once."""
        return images_in_a_pass(self.config.model.resolution, self.config.validation.items_per_image)

    @property
    def base(self) -> BaseModel:
        """The base whose VAE encodes the images."""
        assert self._base is not None, "only reading the images does without a base"
        return self._base

    def prepare_data(self) -> None:
        """Draw the demo's images when their folder is missing or damaged."""
        draw_missing(self.config.data.root_folder, self.config.data.draw, self.config.cache_dir)

    def read(self) -> ImageFolder:
        """Read and split the folder, once, and return it; what is held out depends on nothing else.

        Raises:
            UserError: too few usable images.
        """
        if self.folder is not None:
            return self.folder
        data, resolution = self.config.data, self.config.model.resolution
        thumbnails: dict[Path, np.ndarray] = {}
        sizes: dict[Path, Size] = {}

        with counted("checking the images") as on_progress:
            folder = read_folder(
                Path(data.root_folder), style=data.style, default_caption=data.caption,
                min_side=data.min_side, on_progress=on_progress,
                on_image=lambda path, image: thumbnails.update({path: thumbnail(image)}),
                on_size=lambda path, size: sizes.update({path: size_for(size, resolution, data.resize)}),
            )  # fmt: skip
        everything = {image.name for image in folder.images}
        folder, split = split_without_excluded(folder, thumbnails, data, self.run)
        self.excluded = sorted(everything - {image.name for image in folder.images})
        self.train_images, self.held_out, self.moved = split.train, split.held_out, split.moved
        if not self.train_images:
            raise UserError(f"data.root={data.root}: every image is the same file; add others")
        self.val_images = first_by_content(self.held_out, self.config.validation.max_images)
        self.probe_images = self.val_images + first_by_content(self.train_images, len(self.val_images))
        self.folder, self.thumbnails = folder, thumbnails
        self.image_shapes = [sizes[image.path] for image in self.train_images]
        self.shapes = [sizes[image.path] for image in self.train_images for _ in range(image.repeats)]
        return folder

    def read_regularization(self) -> ImageFolder | None:
        """Read data.regularization, once; None without it.

        Raises:
            UserError: no such folder, too few usable images, or held-out ones.
        """
        data, key = self.config.data, "data.regularization"
        if data.regularization is None or self.beside is not None:
            return self.beside
        self.read()
        thumbnails = dict(self.thumbnails)
        folder = read_folder(
            Path(data.regularization), style="", default_caption=data.caption,
            min_side=data.min_side, key=key,
            on_image=lambda path, image: thumbnails.update({path: thumbnail(image)}),
        )  # fmt: skip
        require_none_held_out(folder.images, self.held_out, thumbnails, f"{key}={data.regularization}")
        self.beside = folder
        return folder

    def setup(self, stage: str) -> None:
        """Read, split and encode the images, once; write split.json."""
        if self.is_ready:
            return
        folder = self.read()
        if self.trainer.is_global_zero:
            if folder.unusable:
                logger.warning(f"images: {summarise(folder.unusable)}")
            if self.excluded:
                logger.info(f"images: data.exclude leaves out {len(self.excluded)}")
            if repeated := repeated_folders([image.name for image in folder.images]):
                logger.info(f"images: {repeated}")
            self._write_split(folder, self.held_out)
        self._encode()
        self.is_ready = True

    def _write_split(self, folder: ImageFolder, val: list[CaptionedImage]) -> None:
        def hashes(images: list[CaptionedImage]) -> dict[str, str]:
            return {p.name: p.content_hash for p in images}

        split = {
            "train": hashes(self.train_images),
            "val": hashes(val),
            "unusable": folder.unusable,
        } | ({"excluded": self.excluded} if self.excluded else {})
        write_json(self.run.split, split)
        data_hash = image_set_hash(folder.images)
        check_unchanged(self.run, "data_hash", data_hash, f"the image set {set_in_words(self.config.data)}")

    def _encode(self) -> None:
        images, data = self.train_images + self.val_images, self.config.data
        device = self.trainer.strategy.root_device
        home = next(self.base.vae.parameters()).device
        self.base.vae.to(device)
        moments = self._moments(images, device, mirrored=False)
        count = len(self.train_images)
        check_shapes(images, moments, self.image_shapes, self.base.vae_factor)
        self.moments = moments.of(range(count))
        self.mirrored = None
        if data.flip:
            self.mirrored = self._moments(self.train_images, device, mirrored=True)
        input_ids = self.base.tokenize([p.caption for p in images])
        self.input_ids = input_ids[: len(self.train_images)]
        self.all_input_ids = torch.cat([self.base.tokenize([""]), input_ids])  # of every caption in use
        if self.config.loss.keep > 0:
            self.keep_ids = self.base.tokenize(everyday.captions_to_keep(self.train_images, self.config))
            self.all_input_ids = torch.cat([self.all_input_ids, self.keep_ids])
        if (beside := self.read_regularization()) is not None:
            self.regularization = self._encode_regularization(beside, device)
            self.all_input_ids = torch.cat([self.all_input_ids, self.regularization.input_ids])
        self.base.vae.to(home)
        rows = [images.index(image) for image in self.probe_images]
        self.probe_batches = self._items(self.probe_images, moments.of(rows), input_ids[rows])

    def _encode_regularization(self, folder: ImageFolder, device: torch.device) -> EncodedImages:
        """Encode data.regularization: as squares, so that any of its images fit into one batch.

        Raises:
            UserError: other images than before a resume.
        """
        data, found = self.config.data, folder.images
        if self.trainer.is_global_zero:
            if folder.unusable:
                logger.warning(f"data.regularization: {summarise(folder.unusable, elsewhere='')}")
            if repeated := repeated_folders([image.name for image in found]):
                logger.info(f"data.regularization: {repeated}")
            what = f"the image set data.regularization={data.regularization}"
            check_unchanged(self.run, "regularization_hash", image_set_hash(found), what)
        moments = self._moments(found, device, mirrored=False, resize=data.square_resize)
        return EncodedImages(
            [image.name for image in found], moments, None, self.base.tokenize([p.caption for p in found]),
            self.base.tokenize([""])[0], [], self.base.vae.config.scaling_factor,
            [image.repeats for image in found],
        )  # fmt: skip

    def held_out_items(self, device: torch.device) -> list[dict[str, torch.Tensor]]:
        """Return the probe's items of the held-out images alone, a batch an image, as training has them.

        Nothing is written but the cache of latents.

        Args:
            device: where the VAE encodes the images; it stays there.
        """
        self.read()
        return list(self.items_of(self.val_images, device))

    def items_of(
        self, images: list[CaptionedImage], device: torch.device
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Return the items of some images, as the probe has them, a batch each, made one after the other.

        Args:
            device: where the VAE encodes the images, all of them at once; it stays there.
        """
        self.base.vae.to(device)
        moments = self._moments(images, device, mirrored=False)
        input_ids = self.base.tokenize([image.caption for image in images])
        return (
            self._items([image], moments.of([row]), input_ids[row : row + 1])[0]
            for row, image in enumerate(images)
        )

    def _items(
        self, images: list[CaptionedImage], moments: Moments, input_ids: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        return make_items(
            images, moments, input_ids,
            items_per_image=self.config.validation.items_per_image,
            num_train_timesteps=self.num_train_timesteps,
            scaling_factor=self.base.vae.config.scaling_factor,
        )  # fmt: skip

    def _moments(
        self, images: list[CaptionedImage], device: torch.device, *, mirrored: bool, resize: str | None = None
    ) -> Moments:
        """Return the VAE moments of some images, from the cache where they are known.

        Args:
            resize: None = data.resize.
        """
        resolution, resize = self.config.model.resolution, resize or self.config.data.resize
        paths = {p.content_hash: p.path for p in images}

        def make(contents: list[str], before: int, total: int) -> dict[str, Rows]:
            with counted(f"encoding the {'mirrored ' * mirrored}images") as on_progress:
                return vars(encode(
                    self.base, [paths[content] for content in contents],
                    resolution=resolution, resize=resize, mirrored=mirrored,
                    on_progress=lambda done, _: on_progress(before + done, total),
                ))  # fmt: skip

        key = {
            "resolution": resolution, "resize": resize, "mirrored": mirrored,
            "vae": part_hash(self.base.vae), "device": device.type, "reading": READING,
        }  # fmt: skip
        if chunk_size(resolution) != CHUNK:  # its rounding may differ from that of CHUNK at once
            key["chunk"] = chunk_size(resolution)
        contents = [p.content_hash for p in images]
        return Moments(**cached_rows(Path(self.config.cache_dir) / "latents", key, contents, make))

    def steps_per_epoch(self, accumulate: int, world_size: int) -> int:
        """Return the optimiser steps in an epoch: floor(N / global batch), the remainder dropped.

        With images of several shapes it is the number of full batches of one shape, over `accumulate`.

        Raises:
            UserError: fewer training images than one optimiser step takes.
        """
        batch_size = self.config.data.batch_size
        together = batch_size * world_size
        steps = batches_in(self.shapes, together) // accumulate
        if steps > 0:
            return steps
        asked = f"data.batch_size={batch_size} x accumulation {accumulate} x devices {world_size}"
        advice = "lower data.batch_size or data.accumulate"
        if together * accumulate > len(self.shapes):
            raise UserError(f"{asked} is more than the {len(self.shapes)} training images: {advice}")
        counts = Counter(self.shapes).most_common()
        shapes = ", ".join(f"{count} of {width}x{height} px" for (width, height), count in counts)
        raise UserError(
            f"{asked}: a batch holds images of one shape, and the {len(self.shapes)} training images are "
            f"{shapes}, which fill {batches_in(self.shapes, together)} batches: {advice}, or set "
            "data.resize=center_crop"
        )

    def check_workers(self) -> None:
        """Require room in shared memory for what loader processes hand over.

        Raises:
            UserError: there is too little.
        """
        data, side = self.config.data, self.config.model.resolution
        if data.workers == 0:
            return
        largest = max(map(example_bytes, set(self.shapes)))
        if data.regularization is not None:  # each beside an image, and square
            largest += example_bytes((side, side))
        check_shared_memory(data.workers, data.batch_size * largest)

    def train_dataloader(self) -> DataLoader:
        """Return the training batches from the trainer's current optimiser step on, made ahead.

        For a GPU they lie in pinned memory, from which Lightning copies without waiting.
        """
        trainer, data = self.trainer, self.config.data
        accumulate = trainer.accumulate_grad_batches
        batches = self.steps_per_epoch(accumulate, trainer.world_size) * accumulate
        together = data.batch_size * trainer.world_size
        images = EncodedImages(
            [image.name for image in self.train_images], self.moments, self.mirrored, self.input_ids,
            self.base.tokenize([""])[0], self.image_shapes, self.base.vae.config.scaling_factor,
            [image.repeats for image in self.train_images], self.keep_ids,
            self.regularization,
        )  # fmt: skip
        plan = EpochPlan(batches * together, together, self.num_train_timesteps)
        examples = TrainExamples(images, plan, self.config.loss, self.config.seed)
        numbers = ExampleNumbers(
            batches=batches, batch_size=data.batch_size, rank=trainer.global_rank,
            world_size=trainer.world_size, start_batch=trainer.global_step * accumulate,
        )  # fmt: skip
        self.check_workers()
        return AheadLoader(
            examples, data.batch_size, sampler=numbers, num_workers=data.workers, collate_fn=collate,
            persistent_workers=data.workers > 0, timeout=WORKER_TIMEOUT if data.workers > 0 else 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Return this device's share of the probe, in passes of several images: (places, batch)."""
        scored = self.scored_batches
        mine = share_of_probe(len(scored), self.trainer.global_rank, self.trainer.world_size)
        passes = in_passes(scored, mine, self.images_in_a_pass)
        return DataLoader(passes, batch_size=None)  # type: ignore[arg-type]  # any sequence will do


def check_shapes(
    images: Sequence[CaptionedImage], moments: Moments, shapes: Sequence[Size], factor: int
) -> None:
    """Require that every training image was encoded in the shape that its batches were planned for.

    Args:
        images: whose moments these are; the training images come first.
        shapes: of the training images, in px.
        factor: px of a latent's side.

    Raises:
        UserError: an image file was replaced between the two.
    """
    for row, (width, height) in enumerate(shapes):
        if tuple(moments.mean[row].shape[1:]) != (height // factor, width // factor):
            raise UserError(f"{images[row].path} changed while it was read: start again")
