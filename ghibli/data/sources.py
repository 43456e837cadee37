"""The real images that samples are measured against."""

import hashlib
import logging
from functools import partial
from pathlib import Path

import numpy as np

from ghibli.config.schema import Config, DataConfig
from ghibli.data.drawing import draw_missing
from ghibli.data.exclude import set_in_words, split_without_excluded
from ghibli.data.folder import CaptionedImage, read_folder
from ghibli.data.split import first_by_content
from ghibli.demo.scenes.scene import EVALUATION_SEEDS
from ghibli.images.duplicates import near_duplicates, thumbnail
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError

logger = logging.getLogger(__name__)


LEAST = 3  # images; with fewer a kernel distance has no standard error


def image_set_hash(images: list[CaptionedImage]) -> str:
    """Return the sha256 of images and captions, hex, wherever they are; status.json has it as data_hash."""
    captions = sorted(
        (image.content_hash, image.caption, image.repeats)[: 2 + (image.repeats > 1)] for image in images
    )
    return hashlib.sha256(repr(captions).encode()).hexdigest()


def require_unseen(
    reference: list[CaptionedImage],
    training: list[CaptionedImage],
    thumbnails: dict[Path, np.ndarray],
    key: str,
) -> None:
    """Check that no reference image is a training image; name those that nearly are.

    The distance to images that were trained on rewards copying.

    Args:
        thumbnails: of all these images, by file; what duplicates.near_duplicates compares.
        key: the setting that names the reference, as it was typed.

    Raises:
        UserError: some are.
    """
    seen = {image.content_hash: image for image in training}
    same = [image for image in reference if image.content_hash in seen]
    if same:
        raise UserError(
            f"{key}: {len(same)} of its {len(reference)} images are training images of this run "
            f"({listed([image.path.name for image in same])}), and the distance to them would reward copies: "
            "give a folder of other images, or null for the held-out ones"
        )
    if near := near_pairs(reference, training, thumbnails):
        logger.warning(
            f"{key}: {len(near)} of its images are near-duplicates of training images: {listed(near)}"
        )


def require_none_held_out(
    trained: list[CaptionedImage],
    held_out: list[CaptionedImage],
    thumbnails: dict[Path, np.ndarray],
    key: str,
) -> None:
    """Check that no image that is trained beside the image set is held out of it; name those that nearly are.

    Args:
        thumbnails: of all these images, by file.
        key: the setting that names the folder of `trained`, as it was typed.

    Raises:
        UserError: some are.
    """
    hashes = {image.content_hash for image in held_out}
    same = [image.path.name for image in trained if image.content_hash in hashes]
    if same:
        raise UserError(
            f"{key}: {len(same)} of its {len(trained)} images are held out of this run's training "
            f"({listed(same)}), and the gain would be that of images it has learned: give a folder of others"
        )
    if near := near_pairs(trained, held_out, thumbnails):
        logger.warning(
            f"{key}: {len(near)} of its images are near-duplicates of held-out images: {listed(near)}"
        )


def near_pairs(
    images: list[CaptionedImage], others: list[CaptionedImage], thumbnails: dict[Path, np.ndarray]
) -> list[str]:
    """Name the images that are near-duplicates of others: `a.png of b.png`."""
    if not images or not others:
        return []
    rows = [np.stack([thumbnails[image.path] for image in side]) for side in (others, images)]
    return [f"{images[i].path.name} of {others[o].path.name}" for o, i, _ in near_duplicates(*rows)]


def listed(names: list[str]) -> str:
    """List the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def require_same_images(images: list[CaptionedImage], noted_hash: object, data: DataConfig) -> None:
    """Require, by content and captions, the images that a run was trained on.

    Args:
        images: all of them, held-out ones included.
        noted_hash: data_hash of its status.json; None = not known.
        data: which images they are, for the message.

    Raises:
        UserError: they are others.
    """
    if noted_hash not in (None, found_hash := image_set_hash(images)):
        raise UserError(
            f"{set_in_words(data)}: these are not the images that this run was trained on (data_hash "
            f"{found_hash[:12]}, was {str(noted_hash)[:12]}): put them back"
        )


def real_images(
    config: Config, run: RunDir | None = None
) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Return (reference, training images), each in an order that depends on their content alone.

    The reference is the folder data.reference, or the held-out images without one: no training has seen
    either. Folders in the cache are drawn first.

    Args:
        run: that was trained on them; None = none.

    Raises:
        UserError: no such folder, too few images to compare with, other images than the run was trained on,
            or a reference that holds training images.
    """
    data = config.data
    read = partial(read_folder, style=data.style, default_caption=data.caption, min_side=data.min_side)
    thumbnails: dict[Path, np.ndarray] = {}
    draw_missing(data.root_folder, data.draw, config.cache_dir)
    with counted("checking the images") as on_progress:
        found = read(
            Path(data.root_folder),
            on_progress=on_progress,
            on_image=lambda path, image: thumbnails.update({path: thumbnail(image)}),
        )
    found, split = split_without_excluded(found, thumbnails, data, run)
    require_same_images(found.images, None if run is None else run.status.read().get("data_hash"), data)
    training, held_out = split.train, split.held_out
    if data.reference is not None:
        if Path(data.reference).is_relative_to(config.cache_dir):  # any other folder is the user's
            draw_missing(data.reference, data.reference_draw, config.cache_dir, EVALUATION_SEEDS)
        with counted("checking the reference") as on_progress:
            held_out = read(
                Path(data.reference),
                key="data.reference",
                on_progress=on_progress,
                on_image=lambda path, image: thumbnails.update({path: thumbnail(image)}),
            ).images
        require_unseen(held_out, training, thumbnails, f"data.reference={data.reference}")
    if len(held_out) < LEAST:
        where = "held out" if data.reference is None else f"in data.reference={data.reference}"
        raise UserError(
            f"too few images {where} to compare with: {len(held_out)}, and at least {LEAST} are needed; "
            "give a folder with more, data.reference=DIR"
        )
    return first_by_content(held_out, len(held_out)), first_by_content(training, len(training))
