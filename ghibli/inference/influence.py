"""`ghibli influence`: which training images raised a run's gain, and which lowered it."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ghibli.adapters.trained import run_base
from ghibli.config.schema import Config, at_full_precision
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.exclude import as_list, write_names
from ghibli.data.folder import CaptionedImage
from ghibli.data.split import first_by_content
from ghibli.diffusion.timesteps import quantile_function
from ghibli.evaluation.influence import (
    ODD,
    VERSION,
    Influences,
    RankedImage,
    agreements,
    in_mean_sizes,
    influence_of,
    kept_influences,
    write_influences,
)
from ghibli.images.grid import titled_sheets
from ghibli.images.read import open_image
from ghibli.inference.gradients import Batch, HeldOut, Stage, base_by_block, stages_of
from ghibli.inference.layer_scorer import check_images
from ghibli.models.performance import PromptEmbeds, is_frozen
from ghibli.runs.folder import RunDir
from ghibli.runs.monitor import in_words
from ghibli.runtime.console import counted
from ghibli.runtime.files import checksum_of, write_atomically
from ghibli.training.module import GhibliModule

logger = logging.getLogger(__name__)

KEEP_EVERY = 20  # seconds between two writes of what is done
SHOWN = 8  # images of each kind on the sheet


@dataclass(frozen=True)
class InfluenceOptions:
    """What `ghibli influence` is asked for."""

    items: int | None  # (timestep, noise) items of each image; None = the run's own
    minutes: float | None  # after which no further image is begun; None = no limit
    exclude: float  # share of the training images, the worst, that the list names


@dataclass(frozen=True)
class Material:
    """The model and the images of a run."""

    run: RunDir
    module: GhibliModule
    data: GhibliDataModule
    stages: list[Stage]
    images: list[CaptionedImage]  # of training, each content once, in an order by content
    device: torch.device

    def on_device(self, batch: Batch) -> Batch:
        """Return items of an image on the device."""
        return {key: tensor.to(self.device) for key, tensor in batch.items()}

    def as_trained(self, batch: Batch) -> Batch:
        """Return items of a training image on the device, at the timesteps that training draws."""
        quantile = quantile_function(self.module.config.loss, self.module.num_train_timesteps)
        return self.on_device(batch | {"timesteps": quantile(batch["timesteps"])})


def influence(run: RunDir, config: Config, options: InfluenceOptions) -> Influences:
    """Measure what each training image did to the gain, and write the ranking, a sheet and a list.

    What is measured is kept in influence.json: the same command goes on with the rest. A list that was edited
    since it was written stays as it is.

    Raises:
        UserError: a file of the user would be replaced, another base or other images than in training, or no
            checkpoint.
    """
    kept = kept_influences(run)
    material = read_material(run, config, options)
    found = start(material, kept)
    missing = [image for image in material.images if key_of(image) not in found.blocks]
    if missing:
        announce(found, material, len(missing))
        found = measure(material, found, missing, options.minutes)
    ranked = with_copies(rank(found, material.images), material.data.train_images)
    found = replace(found, ranked=ranked, left_out=material.data.excluded)
    write_influences(run, found)
    by_name = {image.name: image for image in material.images}
    write_sheet(run.path / "influence.png", found, by_name)
    return write_list(run, found, options.exclude)


def read_material(run: RunDir, config: Config, options: InfluenceOptions) -> Material:
    """Load a run's base with fresh adapters, its images and its checkpoints.

    Raises:
        UserError: as influence.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = at_full_precision(config)
    config = replace(
        config, lora=replace(config.lora, init=None),  # the checkpoints have the weights
        loss=replace(config.loss, keep=0.0),  # the brake is no part of what an image itself teaches
    )  # fmt: skip
    if options.items is not None:
        config = replace(config, validation=replace(config.validation, items_per_image=options.items))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    module = GhibliModule(config, run_base(run, config)).eval()
    data = GhibliDataModule(config, module.base, run, module.num_train_timesteps)
    data.prepare_data()
    check_images(run, data)
    devices = run.status.read().get("devices") or 1
    steps = data.steps_per_epoch(int(config.trainer["accumulate_grad_batches"]), devices)
    stages = stages_of(run, module, steps)
    module.to(device)
    images = first_by_content(data.train_images, len(data.train_images))
    return Material(run, module, data, stages, images, device)


def key_of(image: CaptionedImage) -> str:
    """Return what identifies an image with its caption."""
    return hashlib.sha256(f"{image.content_hash}\n{image.caption}".encode()).hexdigest()[:32]


def start(material: Material, kept: Influences | None) -> Influences:
    """Return what was kept of the same measurement, or an empty one."""
    run, module = material.run, material.module
    of = {
        "version": VERSION, "items": module.config.validation.items_per_image,
        "timesteps": module.num_train_timesteps,
        "weights": [checksum_of(file) for file in (run.best_checkpoint, run.last_checkpoint)],
    }  # fmt: skip
    if kept is not None and kept.of == of:
        return kept
    held_out = len(material.data.val_images)
    return Influences(
        of=of, checkpoints=[stage.label for stage in material.stages],
        preconditioned=all(stage.preconditioned for stage in material.stages), held_out=held_out,
        images=len(material.images), base=base_by_block(run, held_out).tolist(),
        listed="" if kept is None else kept.listed,
    )  # fmt: skip


def announce(found: Influences, material: Material, missing: int) -> None:
    """Say what is measured and what that costs, before it begins."""
    items, stages = found.of["items"], len(material.stages)
    logger.info(
        f"influence of {missing} training images on the loss of {found.held_out} held-out ones, at "
        f"{' and '.join(found.checkpoints)}, {items} items an image: "
        f"{(missing + found.held_out) * stages * items} forward and backward passes"
    )


def measure(
    material: Material, found: Influences, missing: list[CaptionedImage], minutes: float | None
) -> Influences:
    """Return the measurement with the missing images, as far as the time allows; keep what is done.

    Args:
        minutes: after which no further image is begun; None = no limit.
    """
    began = time.monotonic()
    found = replace(found, blocks=dict(found.blocks), levels=dict(found.levels))  # filled below
    total = (len(missing) + found.held_out) * len(material.stages)
    held_out = [material.on_device(batch) for batch in material.data.held_out_items(material.device)]
    batches = material.data.items_of(missing, material.device)
    material.module.base.vae.cpu()
    remember_prompts(material, held_out)
    with counted("influence") as on_progress, keeping(material.run, found) as keep:
        ahead = Ahead(time.monotonic(), total, on_progress)
        gradients = HeldOut(material.module, material.stages, held_out, ahead.add)
        examples = len(material.data.shapes)
        for image, batch in zip(missing, batches, strict=True):
            own = gradients.products(material.as_trained(batch))
            found.blocks[key_of(image)] = (own.blocks * image.repeats / examples).tolist()
            found.levels[key_of(image)] = own.levels.tolist()
            keep()
            for _ in material.stages:
                ahead.add()
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
    return found


@dataclass
class Ahead:
    """Counts passes, and says once, after the first, how long all will take."""

    began: float  # seconds, monotonic
    total: int
    on_progress: Callable[[int, int], None]
    done: int = 0

    def add(self) -> None:
        self.done += 1
        self.on_progress(self.done, self.total)
        if self.done == 1:
            seconds = (time.monotonic() - self.began) * self.total
            logger.info(f"about {in_words(seconds)}, by the first image; Ctrl-C keeps what is done")


@contextmanager
def keeping(run: RunDir, found: Influences) -> Iterator[Callable[[], None]]:
    """Write what is measured now and then, by the function that is yielded, and whatever ends the block."""
    written, before = [time.monotonic()], len(found.levels)

    def keep() -> None:
        if time.monotonic() - written[0] > KEEP_EVERY:
            write_influences(run, found)
            written[0] = time.monotonic()

    try:
        yield keep
    except BaseException:
        done = {key: found.blocks[key] for key in found.levels}  # both of an image, or none
        if len(done) > before:
            write_influences(run, replace(found, blocks=done))
            logger.info(f"{len(done)} of {found.images} images are done and kept: the same command goes on")
        raise


def remember_prompts(material: Material, held_out: list[Batch]) -> None:
    """Encode all captions once, where the text encoder is not trained."""
    module = material.module
    if not is_frozen(module.text_encoder):
        return
    captions = module.base.tokenize([image.caption for image in material.images]).to(material.device)
    every = torch.cat([module.empty_ids, captions, *(batch["input_ids"] for batch in held_out)])
    with torch.no_grad(), counted("encoding the captions") as on_progress:
        module.known_prompts = PromptEmbeds(module.base, every, on_progress)


def rank(found: Influences, images: list[CaptionedImage]) -> list[RankedImage]:
    """Rank the images that were measured, the most helpful first."""
    measured = [image for image in images if key_of(image) in found.levels]
    base = torch.tensor(found.base, dtype=torch.float64)
    blocks = torch.tensor([found.blocks[key_of(image)] for image in measured], dtype=torch.float64)
    levels = torch.tensor([found.levels[key_of(image)] for image in measured], dtype=torch.float64)
    lowest = agreements(levels).min(1)
    own = in_mean_sizes([influence_of(one, base) for one in blocks])
    ranked = [
        RankedImage(image.name, image.caption, one, lowest.values[at].item(), int(lowest.indices[at]))
        for at, (image, one) in enumerate(zip(measured, own, strict=True))
    ]
    return sorted(ranked, key=lambda one: -one.influence.value)


def with_copies(ranked: list[RankedImage], images: list[CaptionedImage]) -> list[RankedImage]:
    """Return the ranked images with the names of all other training images that have the same bytes.

    Left out alone, an image would go on being trained by its copies.
    """
    contents = {image.name: image.content_hash for image in images}
    named: dict[str, list[str]] = {}  # content hash -> names
    for name, content in sorted(contents.items()):
        named.setdefault(content, []).append(name)
    return [
        replace(one, copies=[name for name in named[contents[one.name]] if name != one.name])
        for one in ranked
    ]


def write_list(run: RunDir, found: Influences, share: float) -> Influences:
    """Write the list for data.exclude, unless the one there was edited; return what is known of it then.

    Its hash is stored before the file is replaced, so that after a kill neither the old nor the new one
    counts as edited.

    Args:
        share: of the ranked images, the worst, that it names.
    """
    names = found.to_exclude(share)
    wanted = hashlib.sha256(as_list(names)).hexdigest()
    if run.is_list_edited(wanted):
        found = replace(found, listed="")
    else:
        write_influences(run, replace(found, listed=f"{found.listed} {wanted}".strip()))
        write_names(run.exclude_list, names)
        found = replace(found, listed=wanted)
    write_influences(run, found)
    return found


def write_sheet(file: Path, found: Influences, by_name: dict[str, CaptionedImage]) -> None:
    """Draw the images at the ends of both rankings with their influence, agreement and caption."""

    def text(one: RankedImage) -> str:
        where = f" at {found.timesteps(one.level)}" if one.agreement < ODD else ""
        return f"{one.text}, agreement {one.agreement:.1f}{where}: {one.caption}"

    parts = [
        (title, [(open_image(by_name[one.name].path), text(one)) for one in side])
        for title, side in found.ends(SHOWN).items()
    ]
    sheet = titled_sheets(parts)
    write_atomically(file, lambda opened: sheet.save(opened, format="PNG"))
