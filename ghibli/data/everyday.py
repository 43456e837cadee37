"""Captions without the style: of what a base was made for, and those on which loss.keep holds a training."""

from pathlib import Path

from ghibli.config.schema import MOST_PRICE_IMAGES, Config
from ghibli.data.folder import CaptionedImage
from ghibli.demo.scenes.scene import PRICE_SEEDS, compose

FILE = Path(__file__).with_name("everyday_captions.txt")


def everyday_captions() -> list[str]:
    """Read our list of things that people ask an image model for, without a style."""
    return FILE.read_text(encoding="utf-8").splitlines()


def measured_captions(config: Config, count: int) -> list[str]:
    """Return `count` captions of what the base was made for, on which its price is measured."""
    if config.model.made_for == "scenes":
        return [compose(PRICE_SEEDS.start + i).caption for i in range(count)]
    return everyday_captions()[:MOST_PRICE_IMAGES][:count]


def captions_to_keep(images: list[CaptionedImage], config: Config) -> list[str]:
    """Return, for each training image, the caption on which loss.keep compares with the base.

    It is the image's own one without data.style. Where that is empty, the base's own captions take turns,
    none of them one that the price is measured on.
    """
    style = config.data.style
    if style.strip():
        return [image.caption.removesuffix(style) for image in images]
    if config.model.made_for == "scenes":
        first = PRICE_SEEDS.start + MOST_PRICE_IMAGES
        return [compose(first + i).caption for i in range(len(images))]
    others = everyday_captions()[MOST_PRICE_IMAGES:]
    return [others[i % len(others)] for i in range(len(images))]
