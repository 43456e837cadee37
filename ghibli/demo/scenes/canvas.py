"""A canvas on which the same shapes are painted in one of two looks.

Coordinates are fractions of the image (0 .. 1, y down), colours are (red, green, blue) in 0 .. 255.
"photo" mutes a shape's colour and shades it softly, "drawn" saturates it and traces it with dark ink.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

Colour = tuple[float, float, float]

INK = (46, 36, 44)
LOOKS = ("photo", "drawn")

# How the light of each time of day multiplies a colour.
LIGHT = {
    "morning": (1.03, 0.97, 0.86),
    "noon": (1.0, 1.0, 1.0),
    "sunset": (1.02, 0.76, 0.60),
    "night": (0.40, 0.48, 0.74),
}


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """Mix two colours; share 0 gives the first, 1 the second."""
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def clip_colour(colour: Colour) -> tuple[int, int, int]:
    """Round a colour to integers and clip them to 0 .. 255."""
    red, green, blue = (int(min(255, max(0, round(channel)))) for channel in colour)
    return red, green, blue


def mute(colour: Colour) -> Colour:
    """Reduce saturation and contrast, slightly towards warm grey, as in a photo."""
    grey = 0.3 * colour[0] + 0.55 * colour[1] + 0.15 * colour[2]
    return blend(blend(colour, (grey, grey, grey), 0.36), (128, 124, 116), 0.10)


class Canvas:
    """A square image, `pixels` on a side, painted from back to front."""

    def __init__(self, pixels: int, look: str, time: str, image: Image.Image | None = None):
        self.image = image if image is not None else Image.new("RGB", (pixels, pixels))
        self.pixels, self.look, self.time = pixels, look, time
        self.light_share = 1.0

    @property
    def drawn(self) -> bool:
        return self.look == "drawn"

    def colour(self, colour: Colour) -> tuple[int, int, int]:
        """Return a colour as it appears in the light of this time of day and in this look."""
        light = LIGHT[self.time]
        share = self.light_share
        red, green, blue = (c * (1 + (f - 1) * share) for c, f in zip(colour, light, strict=True))
        lit = red, green, blue
        return clip_colour(lit if self.drawn else mute(lit))

    def gradient(self, box, top, bottom, mask=None):
        """Fill a pixel box with a vertical gradient between two final colours."""
        x0, y0, x1, y1 = box
        width, height = max(1, x1 - x0), max(1, y1 - y0)
        first, last = np.array(clip_colour(top)), np.array(clip_colour(bottom))
        share = (np.arange(height) / max(1, height - 1))[:, None]
        column = np.rint(first + (last - first) * share).astype(np.uint8)[:, None, :]
        self.image.paste(Image.fromarray(column).resize((width, height)), (x0, y0), mask)

    def fill(self, mask: Image.Image, corner, colour, depth: float):
        """Paint through a mask with a gradient: lighter at the top, darker at the bottom by `depth`."""
        lit, shade = self.colour(colour), self.colour(blend(colour, (70, 70, 120), depth))
        bright = blend(lit, (255, 250, 225), 0.16 if self.drawn else 0.20)
        x0, y0 = corner
        self.gradient((x0, y0, x0 + mask.width, y0 + mask.height), bright, shade, mask)

    def _mask(self, points):
        """Return corner and size of the bounding box, with 3 px of margin, and the points relative to it."""
        array = np.asarray(points, dtype=np.float64) * self.pixels
        low = np.floor(array.min(axis=0)).astype(int) - 3
        high = np.ceil(array.max(axis=0)).astype(int) + 4
        return tuple(int(v) for v in low), tuple(int(v) for v in high - low), array - low

    def _paint(self, points, colour, depth, ink, ellipse):
        corner, size, local = self._mask(points)
        mask = Image.new("L", size)
        pen = ImageDraw.Draw(mask)
        flat = [tuple(p) for p in local.round(2).tolist()]
        pen.ellipse([*flat[0], *flat[1]], fill=255) if ellipse else pen.polygon(flat, fill=255)
        self.fill(mask, corner, colour, depth)
        if not (self.drawn and ink):
            return
        pen = ImageDraw.Draw(self.image)
        shifted = [(x + corner[0], y + corner[1]) for x, y in flat]
        width = max(1, round(self.pixels / 256 * 3.2))
        line = self.ink_colour()
        if ellipse:
            pen.ellipse([*shifted[0], *shifted[1]], outline=line, width=width)
        else:
            pen.line([*shifted, shifted[0], shifted[1]], fill=line, width=width, joint="curve")

    def ink_colour(self):
        return clip_colour(blend(INK, (18, 18, 52), 0.6)) if self.time == "night" else INK

    def polygon(
        self, points: Sequence[tuple[float, float]], colour: Colour, depth: float = 0.3, ink: bool = True
    ):
        """Paint a filled polygon."""
        self._paint(points, colour, depth, ink, ellipse=False)

    def ellipse(self, x, y, rx, ry, colour, depth=0.3, ink=True):
        """Paint a filled ellipse around (x, y) with radii rx and ry."""
        self._paint([(x - rx, y - ry), (x + rx, y + ry)], colour, depth, ink, ellipse=True)

    def blob(self, circles, colour, depth=0.3, ink=True):
        """Paint one shape made of several circles (x, y, radius): a cloud, a tree top, a bush."""
        points = [(x + sx * r, y + sy * r) for x, y, r in circles for sx, sy in ((-1, -1), (1, 1))]
        corner, size, local = self._mask(points)
        mask = Image.new("L", size)
        pen = ImageDraw.Draw(mask)
        for a, b in zip(local[::2].tolist(), local[1::2].tolist(), strict=True):
            pen.ellipse([*a, *b], fill=255)
        if self.drawn and ink:
            width = 2 * max(1, round(self.pixels / 256 * 1.5)) + 1
            wide = mask.filter(ImageFilter.MaxFilter(width))
            self.image.paste(self.ink_colour(), corner, wide)
        self.fill(mask, corner, colour, depth)

    def box(self, bounds, colour: Colour, depth: float = 0.3, ink: bool = True, radius: float = 0.0):
        """Paint a rectangle with bounds (left, top, right, bottom), its corners cut by `radius`."""
        x0, y0, x1, y1 = bounds
        r = min(radius, (x1 - x0) / 2, (y1 - y0) / 2)
        if r <= 0:
            points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        else:
            k = r * 0.3
            points = [
                (x0 + r, y0),
                (x1 - r, y0),
                (x1 - k, y0 + k),
                (x1, y0 + r),
                (x1, y1 - r),
                (x1 - k, y1 - k),
                (x1 - r, y1),
                (x0 + r, y1),
                (x0 + k, y1 - k),
                (x0, y1 - r),
                (x0, y0 + r),
                (x0 + k, y0 + k),
            ]
        self.polygon(points, colour, depth, ink)

    def line(self, points, colour, width):
        """Paint an open stroke; `width` is a fraction of the image."""
        pen = ImageDraw.Draw(self.image)
        pixels = [(x * self.pixels, y * self.pixels) for x, y in points]
        pen.line(
            pixels,
            fill=self.colour(colour),
            width=max(1, round(width * self.pixels)),
            joint="curve",
        )

    def glow(self, x, y, radius, colour, strength):
        """Add soft light around a point; strength 0 .. 1."""
        side = max(2, round(2 * radius * self.pixels))
        spot = ImageOps.invert(Image.radial_gradient("L")).resize((side, side))
        spot = spot.point(lambda v: max(0, (v - 75)) * 1.4 * strength)
        corner = (round(x * self.pixels) - side // 2, round(y * self.pixels) - side // 2)
        light = Image.new("RGB", self.image.size)
        light.paste(clip_colour(colour), corner, spot)
        self.image = ImageChops.screen(self.image, light)

    def disc(self, x, y, radius, colour):
        """Paint a plain disc in a final colour: sun or moon."""
        pen = ImageDraw.Draw(self.image)
        p = self.pixels
        pen.ellipse([(x - radius) * p, (y - radius) * p, (x + radius) * p, (y + radius) * p], fill=colour)

    def plain_blob(self, circles, colour):
        """Paint circles in a final colour, neither lit nor outlined: clouds."""
        pen, p = ImageDraw.Draw(self.image), self.pixels
        for x, y, r in circles:
            pen.ellipse([(x - r) * p, (y - r) * p, (x + r) * p, (y + r) * p], fill=clip_colour(colour))
