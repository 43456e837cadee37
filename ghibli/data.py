"""GhibliDataModule: pictures -> held-out split -> latents in memory -> training examples."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ghibli import scenes
from ghibli.base_model import BaseModel, part_hash
from ghibli.buckets import Size, batches_in, in_batches, size_for
from ghibli.captions import CaptionedPicture, PictureFolder, read_folder, summarise
from ghibli.latents import Moments, encode
from ghibli.mistakes import UserMistake
from ghibli.near_duplicates import near_duplicates, thumbnail
from ghibli.progress import console, counted
from ghibli.randomness import (
    Stream,
    chance,
    epoch_order,
    hash_fraction,
    independent_timestep,
    normal,
    timestep,
)
from ghibli.run_dir import RunDir, check_unchanged
from ghibli.schema import Config, DrawConfig
from ghibli.tensor_cache import cached_rows
from ghibli.validation import make_items
from ghibli.whole_files import write_json


@dataclass(frozen=True)
class Split:
    """Which pictures train and which are held out."""

    train: list[CaptionedPicture]
    held_out: list[CaptionedPicture]
    moved: dict[CaptionedPicture, CaptionedPicture]  # to training, since nearly the same as this one there


def split_by_content(
    pictures: list[CaptionedPicture], val_fraction: float
) -> tuple[list[CaptionedPicture], list[CaptionedPicture]]:
    """(training pictures, held-out pictures), each by file hash alone: adding pictures moves none.

    A very small set may have no picture below the threshold; then the lowest hash is held out.
    """
    held_out = {p.content_hash for p in pictures if hash_fraction(p.content_hash) < val_fraction}
    if not held_out:
        held_out = {min(p.content_hash for p in pictures)}
    train = [p for p in pictures if p.content_hash not in held_out]
    val = [p for p in pictures if p.content_hash in held_out]
    return train, val


def split_apart(
    pictures: list[CaptionedPicture], thumbnails: dict[Path, np.ndarray], val_fraction: float
) -> Split:
    """split_by_content, but what is nearly a training picture is not held out: the gain on it is memory.

    Args:
        thumbnails: of every picture, by file.
    """
    train, held_out = split_by_content(pictures, val_fraction)
    moved: dict[CaptionedPicture, CaptionedPicture] = {}
    while True:
        rows = [np.stack([thumbnails[p.path] for p in side]) for side in (train, held_out) if side]
        pairs = near_duplicates(*rows) if len(rows) == 2 else []
        if not pairs or len(pairs) == len(held_out):  # one has to be held out, whatever it is like
            return Split(train, held_out, moved)
        moved |= {held_out[v]: train[t] for t, v, _ in pairs}
        train = [p for p in pictures if p in moved or p in set(train)]
        held_out = [p for p in held_out if p not in moved]


def first_by_content(pictures: list[CaptionedPicture], count: int) -> list[CaptionedPicture]:
    """The `count` pictures with the lowest content hash: a fixed part, whatever the folder's order.

    Of files with the same bytes the first by name alone, since the second would tell nothing new.
    """
    by_content = {p.content_hash: p for p in sorted(pictures, key=lambda p: str(p.path), reverse=True)}
    return [by_content[content] for content in sorted(by_content)[:count]]


def draw_missing(root: str, draw: DrawConfig | None, cache_dir: str, seeds: range | None = None) -> None:
    """Draws the pictures of a folder that is to be drawn and is not there yet, or damaged in the cache.

    Args:
        seeds: of the scenes; None: those that training is for.
    """
    place = Path(root)
    if draw is None:
        return
    if (place / "captions.txt").exists():
        if not (place.is_relative_to(cache_dir) and scenes.damaged(place)):
            return
        console.print(f"the drawn pictures in {root} are damaged: drawing them again", style="yellow")
    usual = {"drawn": scenes.FINETUNE_SEEDS, "photo": scenes.PRETRAIN_SEEDS}
    first = (seeds or usual[draw.look]).start
    with counted("drawing the demo pictures") as on_progress:
        scenes.write_folder(place, draw.look, draw.count, first, on_progress=on_progress)


class TrainExamples(Dataset):
    """Running example number -> one training example, a pure function of it and the seed."""

    def __init__(
        self,
        moments: Moments,
        mirrored: Moments | None,
        input_ids: torch.Tensor,
        empty_ids: torch.Tensor,
        names: list[str],
        config: Config,
        *,
        examples_per_epoch: int,
        num_train_timesteps: int,
        scaling_factor: float,
        shapes: list[Size] | None = None,
        together: int = 1,
    ):
        self.shapes = shapes or [(0, 0)] * len(names)  # of the pictures; `together` in a row have one shape
        self.together = together
        self.moments, self.mirrored = moments, mirrored
        self.input_ids, self.empty_ids, self.names = input_ids, empty_ids, names
        self.seed, self.loss = config.seed, config.loss
        self.timestep = {"spread": timestep, "independent": independent_timestep}[config.loss.timesteps]
        self.examples_per_epoch = examples_per_epoch
        self.num_train_timesteps = num_train_timesteps
        self.scaling_factor = scaling_factor
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.examples_per_epoch

    def picture_of(self, example: int) -> int:
        """The index of the picture shown as this running example number."""
        epoch, position = divmod(example, self.examples_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(len(self.names), self.seed, epoch)
            self._order = (epoch, in_batches(order, self.shapes, self.together))
        return self._order[1][position]

    def __getitem__(self, example: int) -> dict[str, object]:
        """latents, noise (4, h, w); timesteps (); input_ids (L,); example and name as they are."""
        picture, seed = self.picture_of(example), self.seed
        flipped = self.mirrored is not None and chance(0.5, Stream.FLIP, seed, example)
        moments = self.mirrored if flipped else self.moments
        shape = tuple(moments.mean[picture].shape)
        noise = normal(shape, Stream.NOISE, seed, example)
        if self.loss.noise_offset > 0:
            offset = normal((shape[0], 1, 1), Stream.OFFSET, seed, example)
            noise = noise + self.loss.noise_offset * offset
        dropped = chance(self.loss.caption_dropout, Stream.CAPTION, seed, example)
        posterior_noise = normal(shape, Stream.POSTERIOR, seed, example)
        return {
            "latents": moments.sample(picture, posterior_noise, self.scaling_factor),
            "noise": noise,
            "timesteps": torch.tensor(self.timestep(example, self.num_train_timesteps, seed)),
            "input_ids": self.empty_ids if dropped else self.input_ids[picture],
            "example": example,
            "name": self.names[picture],
        }


def collate(examples: list[dict[str, object]]) -> dict[str, object]:
    """Stacks the tensors; `example` and `name` stay lists on the CPU."""
    return {
        key: torch.stack([e[key] for e in examples])
        if isinstance(examples[0][key], torch.Tensor)
        else [e[key] for e in examples]
        for key in examples[0]
    }


class ExampleNumbers(Sampler[int]):
    """The running example numbers of one device, in order, from any optimiser step on.

    An epoch is a whole number of optimiser steps. In each forward pass the devices take
    neighbouring batches, so together they see what one device with the same global batch sees.
    """

    def __init__(self, *, batches: int, batch_size: int, rank: int, world_size: int, start_batch: int):
        self.batches, self.batch_size = batches, batch_size  # batches: forward passes in an epoch
        self.rank, self.world_size = rank, world_size
        self.first_epoch, self.first_batch = divmod(start_batch, batches)
        self.epoch = self.first_epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.first_batch if self.epoch == self.first_epoch else 0
        for batch in range(first, self.batches):
            start = ((self.epoch * self.batches + batch) * self.world_size + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)


def share_of_probe(count: int, rank: int, world_size: int) -> list[int]:
    """Which of `count` pictures a device scores: every world_size-th, and as many on each device.

    Laid side by side the shares are the pictures in their order, and behind them the first few again.
    """
    each = -(-count // world_size)
    return [index % count for index in range(rank, each * world_size, world_size)]


class GhibliDataModule(L.LightningDataModule):
    """Reads the folder, holds out pictures, encodes all once, hands out examples and probe items."""

    def __init__(self, config: Config, base: BaseModel, run: RunDir, num_train_timesteps: int):
        super().__init__()
        self.config, self.base, self.run = config, base, run
        self.num_train_timesteps = num_train_timesteps
        self.folder: PictureFolder | None = None
        self.is_ready = False

    def prepare_data(self) -> None:
        """Draws the demo's pictures when the folder is not there yet, or damaged."""
        draw_missing(self.config.data.root, self.config.data.draw, self.config.cache_dir)

    def read(self) -> None:
        """Reads and splits the folder, once; what is held out does not depend on anything else."""
        if self.folder is not None:
            return
        data = self.config.data
        thumbnails: dict[Path, np.ndarray] = {}
        sizes: dict[Path, Size] = {}

        def look(path: Path, picture: Image.Image) -> None:
            thumbnails[path] = thumbnail(picture)
            sizes[path] = size_for(picture.size, self.config.model.resolution, data.resize)

        with counted("checking the pictures") as on_progress:
            folder = read_folder(
                Path(data.root), style=data.style, default_caption=data.caption,
                min_side=data.min_side, on_progress=on_progress,
                on_picture=look,
            )  # fmt: skip
        split = split_apart(folder.pictures, thumbnails, data.val_fraction)
        self.train_pictures, self.held_out, self.moved = split.train, split.held_out, split.moved
        if not self.train_pictures:
            raise UserMistake(f"data.root={data.root}: every picture is the same file; add others")
        self.val_pictures = first_by_content(self.held_out, self.config.validation.max_pictures)
        self.probe_pictures = self.val_pictures + first_by_content(
            self.train_pictures, len(self.val_pictures)
        )
        self.folder, self.thumbnails = folder, thumbnails
        self.shapes = [sizes[picture.path] for picture in self.train_pictures]

    def setup(self, stage: str) -> None:
        """Reads, splits and encodes; writes split.json. Runs once."""
        if self.is_ready:
            return
        self.read()
        if self.trainer.is_global_zero:
            if self.folder.unusable:
                console.print(f"pictures: {summarise(self.folder.unusable)}", style="yellow")
            self._write_split(self.folder, self.held_out)
        self._encode()
        self.is_ready = True

    def _write_split(self, folder: PictureFolder, val: list[CaptionedPicture]) -> None:
        def listed(pictures: list[CaptionedPicture]) -> dict[str, str]:
            return {p.path.name: p.content_hash for p in pictures}

        split = {
            "train": listed(self.train_pictures),
            "val": listed(val),
            "unusable": folder.unusable,
        }
        write_json(self.run.split, split)
        captions = sorted((p.content_hash, p.caption) for p in folder.pictures)
        data_hash = hashlib.sha256(repr(captions).encode()).hexdigest()
        check_unchanged(
            self.run, "data_hash", data_hash, f"the picture set data.root={self.config.data.root}"
        )

    def _encode(self) -> None:
        pictures = self.train_pictures + self.val_pictures
        home = next(self.base.vae.parameters()).device
        self.base.vae.to(self.trainer.strategy.root_device)
        moments = self._moments(pictures, mirrored=False)
        count = len(self.train_pictures)
        self.moments = moments.of(range(count))
        self.mirrored = None
        if self.config.data.flip:
            self.mirrored = self._moments(self.train_pictures, mirrored=True)
        self.base.vae.to(home)
        input_ids = self.base.tokenize([p.caption for p in pictures])
        self.input_ids = input_ids[: len(self.train_pictures)]
        self.all_input_ids = torch.cat([self.base.tokenize([""]), input_ids])  # that any batch has
        rows = [pictures.index(picture) for picture in self.probe_pictures]
        self.probe_batches = make_items(
            self.probe_pictures, moments.of(rows), input_ids[rows],
            items_per_picture=self.config.validation.items_per_picture,
            num_train_timesteps=self.num_train_timesteps,
            scaling_factor=self.base.vae.config.scaling_factor,
        )  # fmt: skip

    def _moments(self, pictures: list[CaptionedPicture], mirrored: bool) -> Moments:
        """The VAE's code of these pictures, from the cache where it was made before."""
        resolution, resize = self.config.model.resolution, self.config.data.resize
        options = {"resolution": resolution, "resize": resize, "mirrored": mirrored}

        paths = {p.content_hash: p.path for p in pictures}

        def make(contents: list[str], before: int, total: int) -> dict[str, torch.Tensor]:
            with counted(f"encoding the {'mirrored ' * mirrored}pictures") as on_progress:
                return vars(encode(
                    self.base, [paths[content] for content in contents], **options,
                    on_progress=lambda done, _: on_progress(before + done, total),
                ))  # fmt: skip

        device = self.trainer.strategy.root_device.type
        key = options | {"vae": part_hash(self.base.vae), "device": device}
        contents = [p.content_hash for p in pictures]
        return Moments(**cached_rows(Path(self.config.cache_dir) / "latents", key, contents, make))

    def steps_per_epoch(self, accumulate: int, world_size: int) -> int:
        """Optimiser steps in an epoch: floor(N / global batch), the remainder dropped.

        With several shapes of pictures it is the full batches of one shape, over the accumulation.

        Raises:
            UserMistake: fewer training pictures than one optimiser step takes.
        """
        steps = batches_in(self.shapes, self.config.data.batch_size * world_size) // accumulate
        if steps == 0:
            raise UserMistake(
                f"data.batch_size={self.config.data.batch_size} x accumulation {accumulate} x devices "
                f"{world_size} is more than the {len(self.train_pictures)} training pictures: lower "
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
            [p.path.name for p in self.train_pictures], self.config,
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
        """This device's share of the probe: a batch for each held-out picture, then the training ones."""
        mine = share_of_probe(len(self.probe_batches), self.trainer.global_rank, self.trainer.world_size)
        return DataLoader([self.probe_batches[index] for index in mine], batch_size=None)
