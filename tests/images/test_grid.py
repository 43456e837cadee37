"""Sheets: where tiles and titles stand."""

import numpy as np
from PIL import Image

from ghibli.images.grid import COLUMNS, GAP, HEADING, TILE, contact_sheet, titled_sheets


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
