"""A few pictures of a set with their captions, to be looked at."""

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ghibli.captions import CaptionedPicture, open_picture

TILE, GAP, LINE, COLUMNS = 256, 12, 18, 4  # px, px, px, tiles in a row
LETTERS, LINES = 36, 4  # of a caption below a tile


def contact_sheet(pictures: list[CaptionedPicture]) -> Image.Image:
    """Rows of COLUMNS pictures, each whole within a square of TILE px, its caption below."""
    font = ImageFont.load_default(size=13)
    height = TILE + LINES * LINE + GAP
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        left, top = GAP + place % COLUMNS * (TILE + GAP), GAP + place // COLUMNS * height
        small = ImageOps.pad(open_picture(picture.path), (TILE, TILE), color="#eeeeee")
        sheet.paste(small, (left, top))
        lines = textwrap.wrap(picture.caption, LETTERS, max_lines=LINES, placeholder=" ...")
        draw.multiline_text((left, top + TILE + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet
