"""Sheets: every image is where its caption and label say, pixel for pixel."""

import numpy as np
from PIL import Image

from ghibli.images.grid import (
    COLUMNS,
    GAP,
    HEADING,
    TILE,
    Block,
    captioned_blocks,
    contact_sheet,
    titled_sheets,
)


def test_captioned_blocks_show_each_image_as_it_is() -> None:
    """Images of one colour each; and nothing of the texts, however long, lies on an image."""
    colours = iter(range(10, 250, 10))
    images = [Image.new("RGB", (40, 30), (next(colours), 0, 255)) for _ in range(10)]
    long = "a very long caption that takes more lines than there is room for above an image of this width"
    blocks = [
        Block([long, "b"], [("a long label, wider than most", images[:2]), ("x", images[2:4])]),
        Block(["c", "d", "e"], [("y", images[4:7]), ("z", images[7:10])]),
    ]
    sheet = np.asarray(captioned_blocks(blocks))
    rows = []
    for image in images:
        found = np.argwhere((sheet == image.getpixel((0, 0))).all(axis=2))
        (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
        assert (bottom - top + 1, right - left + 1) == (30, 40) and len(found) == 1200
        rows.append((top, left))
    tops, lefts = zip(*rows, strict=True)
    assert list(tops) == sorted(tops) and len(set(tops)) == 4 and len(set(lefts)) == 3
    above = sheet[: tops[0]]
    assert (above < 128).any(), "the caption is above"
    assert (sheet[0] == 255).all() and (sheet[:, 0] == 255).all(), "nothing is cut off at the edges"


def test_titled_sheets_stand_below_each_other() -> None:
    sides = [
        (title, [(Image.new("RGB", (64, 64), colour), "a cat")] * count)
        for title, colour, count in (("good", "green", COLUMNS + 1), ("bad", "red", 1))
    ]
    sheet = titled_sheets(sides)
    first, second = (contact_sheet(images) for _, images in sides)
    assert sheet.size == (first.width, 2 * HEADING + first.height + second.height)
    pixels = np.array(sheet)
    assert (pixels[HEADING : HEADING + first.height] == np.array(first)).all()
    top = 2 * HEADING + first.height
    assert (pixels[top:] == np.array(second)).all()
    assert (pixels[top + GAP : top + GAP + TILE, GAP : GAP + TILE] == (255, 0, 0)).all()
    for start in (0, HEADING + first.height):  # a title is drawn above each
        heading = pixels[start : start + HEADING]
        assert (heading < 128).any() and (heading[:4] == 255).all()
