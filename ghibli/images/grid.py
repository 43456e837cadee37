"""Images laid out on one sheet: labelled sample grids, captioned contact sheets, before and after."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


def to_image(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in 0 .. 1 -> 8-bit RGB image, rounded to the nearest level."""
    levels = (image * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


def compose_grid(
    rows: list[tuple[str, torch.Tensor]], prompts: list[str], columns: list[str], title: str
) -> Image.Image:
    """One image of all samples: for each prompt a block of rows, a column for each cell.

    Args:
        rows: (label, images (prompts, columns, 3, H, W) in 0 .. 1), such as base first, adapter
            below; all with the same start noise.
        prompts, columns: the labels of blocks and columns.
    """
    height, width = rows[0][1].shape[-2:]
    zoom = 1 if min(height, width) >= 256 else 2
    tile, tall = zoom * width, zoom * height
    font, small = ImageFont.load_default(size=17), ImageFont.load_default(size=15)
    gap, left, head, line = 6, 120, 100, 30
    block = line + len(rows) * (tall + gap)
    width = left + len(columns) * (tile + gap) + gap
    grid = Image.new("RGB", (width, head + len(prompts) * block + gap), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((12, 12), title, fill="black", font=font, spacing=8)
    for column, text in enumerate(columns):
        center = left + column * (tile + gap) + tile // 2
        draw.text((center, head - 18), text, fill="black", font=small, anchor="mm")
    for p, prompt in enumerate(prompts):
        top = head + p * block
        draw.text((12, top + line // 2), prompt, fill="#444444", font=small, anchor="lm")
        for r, (label, images) in enumerate(rows):
            y = top + line + r * (tall + gap)
            draw.text((12, y + tall // 2), label, fill="black", font=small, anchor="lm")
            for c in range(len(columns)):
                one = to_image(images[p, c]).resize((tile, tall), Image.Resampling.LANCZOS)
                grid.paste(one, (left + c * (tile + gap), y))
    return grid


TILE, GAP, LINE, COLUMNS = 256, 12, 18, 4  # px, px, px, tiles in a row
LETTERS, LINES = 36, 4  # of a caption below a tile


def contact_sheet(images: list[tuple[Image.Image, str]]) -> Image.Image:
    """Lay out (image, caption) pairs in rows of COLUMNS, each image whole within TILE px squared."""
    font = ImageFont.load_default(size=13)
    height = TILE + LINES * LINE + GAP
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(images):
        left, top = GAP + place % COLUMNS * (TILE + GAP), GAP + place // COLUMNS * height
        small = ImageOps.pad(image, (TILE, TILE), color="#eeeeee")
        sheet.paste(small, (left, top))
        lines = textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder=" ...")
        draw.multiline_text((left, top + TILE + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet


def before_after_sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Before above after, in rows of six."""
    tile, gap, line, columns = 256, 8, 26, min(6, len(pairs))
    block = line + 2 * (tile + gap) + gap
    rows = -(-len(pairs) // columns)
    page = Image.new("RGB", (columns * (tile + gap) + gap, rows * block), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    for place, pair in enumerate(pairs):
        left, top = gap + place % columns * (tile + gap), place // columns * block
        if place % columns == 0:
            draw.text((left, top + line // 2), "above: the photo, below: restyled", "black", font, "lm")
        for row, image in enumerate(pair):
            small = ImageOps.pad(image, (tile, tile), Image.Resampling.LANCZOS, color="#eeeeee")
            page.paste(small, (left, top + line + row * (tile + gap)))
    return page
