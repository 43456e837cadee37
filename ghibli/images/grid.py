"""Image sheets: labelled sample grids, captioned contact sheets, before and after.

Every sheet is laid out by `lay_out`: rows of tiles at given coordinates, and texts.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from ghibli.images.fonts import font_and_text, width_of

TILE, GAP, LINE, COLUMNS = 256, 12, 18, 4  # of a contact sheet: px, px, px, tiles in a row
LETTERS, LINES = 36, 4  # of a caption below a tile: letters in a line, lines
CAPTION_SIZE = 13  # px
HEADING, TITLE_SIZE = 48, 19  # px, of a title above a contact sheet
FILL = "\ufffe"  # no character: takes the place of the second half of a wide one
PAIR_COLUMNS = 6  # pairs in a row of a before-and-after sheet


@dataclass(frozen=True)
class Text:
    """A text on a sheet; several lines are separated by newlines."""

    x: int  # px
    y: int  # px
    text: str
    size: int  # of the font, px
    anchor: str | None = None  # Pillow's text anchor; None = (x, y) is the upper left corner
    colour: str = "black"
    spacing: int = 4  # between lines, px


def lay_out(
    size: tuple[int, int],
    rows: Sequence[Sequence[Image.Image]],
    lefts: Sequence[int],
    tops: Sequence[int],
    texts: Iterable[Text] = (),
) -> Image.Image:
    """Lay out tiles on a white sheet: rows[r][c] has its upper left corner at (lefts[c], tops[r]).

    Args:
        size: width and height of the sheet in px.
        rows: a row may be shorter than `lefts`.
        texts: are drawn first, so a long one disappears behind a tile.
    """
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for text in texts:
        font, words = font_and_text(text.text, text.size)
        draw.text((text.x, text.y), words, text.colour, font, text.anchor, text.spacing)
    for row, top in zip(rows, tops, strict=True):
        for image, left in zip(row, lefts, strict=False):
            sheet.paste(image, (left, top))
    return sheet


def evenly(count: int, pitch: int, first: int = 0) -> list[int]:
    """Return `count` coordinates, `pitch` px apart."""
    return [first + i * pitch for i in range(count)]


def in_rows(items: list[Any], columns: int) -> list[list[Any]]:
    """Split items into rows of `columns`; the last one may be shorter."""
    return [items[start : start + columns] for start in range(0, len(items), columns)]


def to_image(image: torch.Tensor) -> Image.Image:
    """Convert (3, H, W) in 0 .. 1 to an 8-bit RGB image, rounded to the nearest level."""
    levels = (image * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


def compose_grid(
    rows: list[tuple[str, torch.Tensor]], prompts: list[str], columns: list[str], title: str
) -> Image.Image:
    """Compose one sheet of all samples: a block of rows for each prompt, a column for each cell.

    Images of less than 256 px are shown at twice their size.

    Args:
        rows: (label, images (prompts, columns, 3, H, W) in 0 .. 1), such as the base above the
            adapter, from the same noise.
        prompts, columns: labels of the blocks and the columns.
    """
    height, width = rows[0][1].shape[-2:]
    zoom = 1 if min(height, width) >= 256 else 2
    wide, tall = zoom * width, zoom * height
    gap, left, head, line = 6, 120, 100, 30
    blocks = evenly(len(prompts), line + len(rows) * (tall + gap), first=head)
    lefts = evenly(len(columns), wide + gap, first=left)
    tops = [top for block in blocks for top in evenly(len(rows), tall + gap, first=block + line)]
    texts = [Text(12, 12, title, 17, spacing=8)]
    texts += [Text(x + wide // 2, head - 18, text, 15, "mm") for x, text in zip(lefts, columns, strict=True)]
    texts += [
        Text(12, block + line // 2, prompt, 15, "lm", "#444444")
        for block, prompt in zip(blocks, prompts, strict=True)
    ]
    labels = [label for _ in prompts for label, _ in rows]
    texts += [Text(12, top + tall // 2, label, 15, "lm") for top, label in zip(tops, labels, strict=True)]
    tiles = [
        [to_image(image).resize((wide, tall), Image.Resampling.LANCZOS) for image in images[p]]
        for p in range(len(prompts))
        for _, images in rows
    ]
    size = (
        left + len(columns) * (wide + gap) + gap,
        head + len(tops) * (tall + gap) + len(prompts) * line + gap,
    )
    return lay_out(size, tiles, lefts, tops, texts)


@dataclass(frozen=True)
class Block:
    """Rows of images that share a caption in each column."""

    captions: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image]]]  # (label, an image for each caption), all of one size


def captioned_blocks(blocks: Sequence[Block]) -> Image.Image:
    """Compose blocks below one another, at the images' own size: captions above, labels at the left."""
    width, height = blocks[0].rows[0][1][0].size
    gap, line, most = 4, 15, 4  # px, px, lines of a caption
    head = most * line + 3 * gap
    left = 16 + max(
        round(font_and_text(label, 13)[0].getlength(label)) for b in blocks for label, _ in b.rows
    )
    tops: list[int] = []
    texts: list[Text] = []
    tiles: list[Sequence[Image.Image]] = []
    lefts = evenly(max(len(block.captions) for block in blocks), width + gap, first=left)
    bottom = 0
    for block in blocks:
        wrapped = [textwrap.fill(caption, width // 7, max_lines=most) for caption in block.captions]
        texts += [
            Text(x, bottom + head - gap - line * (text.count("\n") + 1), text, 12, spacing=2)
            for x, text in zip(lefts, wrapped, strict=False)
        ]
        for top, (label, images) in zip(
            evenly(len(block.rows), height + gap, first=bottom + head), block.rows, strict=True
        ):
            texts.append(Text(8, top + height // 2, label, 13, "lm"))
            tiles.append(images)
            tops.append(top)
        bottom = tops[-1] + height + gap
    return lay_out((lefts[-1] + width + gap, bottom + gap), tiles, lefts, tops, texts)


def contact_sheet(images: list[tuple[Image.Image, str]]) -> Image.Image:
    """Lay out (image, caption) pairs in rows of COLUMNS, each image fitted into TILE px squared."""
    rows = in_rows(images, COLUMNS)
    height = TILE + LINES * LINE + GAP
    lefts, tops = evenly(COLUMNS, TILE + GAP, first=GAP), evenly(len(rows), height, first=GAP)
    tiles = [[ImageOps.pad(image, (TILE, TILE), color="#eeeeee") for image, _ in row] for row in rows]
    texts = [
        Text(left, top + TILE + 4, shorten(caption), CAPTION_SIZE)
        for row, top in zip(rows, tops, strict=True)
        for (_, caption), left in zip(row, lefts, strict=False)
    ]
    return lay_out((COLUMNS * (TILE + GAP) + GAP, len(rows) * height + GAP), tiles, lefts, tops, texts)


def titled_sheets(parts: list[tuple[str, list[tuple[Image.Image, str]]]]) -> Image.Image:
    """Lay out contact sheets of (image, caption) pairs below each other, each under its title."""
    sheets = [contact_sheet(images) for _, images in parts]
    tops, height = [], 0
    for sheet in sheets:
        tops.append(height + HEADING)
        height += HEADING + sheet.height
    titles = [
        Text(GAP, top - HEADING // 2, title, TITLE_SIZE, "lm")
        for top, (title, _) in zip(tops, parts, strict=True)
    ]
    size = max(sheet.width for sheet in sheets), height
    return lay_out(size, [[sheet] for sheet in sheets], [0], tops, titles)


def shorten(caption: str) -> str:
    """Break a caption into at most LINES lines, as it will be drawn: wide characters count twice."""
    drawn = font_and_text(caption, CAPTION_SIZE)[1]
    padded = "".join(char + FILL * (width_of(char) - 1) for char in drawn)
    return "\n".join(textwrap.wrap(padded, LETTERS, max_lines=LINES, placeholder=" ...")).replace(FILL, "")


def before_after_sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Lay out (photo, restyled photo) pairs in rows of PAIR_COLUMNS, the photo above."""
    tile, gap, line, columns = 256, 8, 26, min(PAIR_COLUMNS, len(pairs))
    rows = in_rows(pairs, columns)
    height = line + 2 * (tile + gap) + gap
    blocks = evenly(len(rows), height)
    tops = [top for block in blocks for top in evenly(2, tile + gap, first=block + line)]
    tiles = [
        [ImageOps.pad(pair[i], (tile, tile), Image.Resampling.LANCZOS, color="#eeeeee") for pair in row]
        for row in rows
        for i in range(2)
    ]
    texts = [Text(gap, block + line // 2, "above: the photo, below: restyled", 15, "lm") for block in blocks]
    size = columns * (tile + gap) + gap, len(rows) * height
    return lay_out(size, tiles, evenly(columns, tile + gap, first=gap), tops, texts)
