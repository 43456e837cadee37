"""Skies and settings of the demo scenes. Every function paints on a `Canvas`.

`rng` is a numpy Generator. The numbers drawn from it never depend on the look, so that a seed gives the same
scene in both looks.
"""

import math

from PIL import Image

from ghibli.demo.scenes.canvas import Canvas, Colour, blend, clip_colour, mute

# Colours of the sky (top, horizon) in each look: final, not lit again.
SKY = {
    "drawn": {
        "morning": ((126, 196, 232), (255, 232, 190)),
        "noon": ((42, 128, 222), (176, 226, 246)),
        "sunset": ((120, 92, 168), (255, 158, 78)),
        "night": ((16, 24, 74), (58, 82, 150)),
    },
    "photo": {
        "morning": ((176, 190, 196), (228, 214, 190)),
        "noon": ((122, 152, 182), (196, 208, 212)),
        "sunset": ((126, 110, 124), (220, 160, 116)),
        "night": ((22, 26, 42), (54, 60, 82)),
    },
}
CLOUD: dict[str, tuple[Colour, Colour]] = {
    "morning": ((255, 250, 240), (226, 206, 206)),
    "noon": ((255, 255, 255), (166, 202, 236)),
    "sunset": ((255, 214, 170), (196, 120, 140)),
    "night": ((98, 116, 172), (52, 66, 122)),
}
SUN = {
    "morning": (255, 240, 190),
    "noon": (255, 250, 220),
    "sunset": (255, 226, 140),
    "night": (240, 240, 255),
}
GRASS, FAR_HILL, WATER = (92, 172, 62), (86, 158, 120), (58, 142, 196)
FLOWERS = ((255, 255, 250), (255, 214, 60), (238, 84, 80), (250, 150, 190))


def curve(start: float, heights, bottom: float = 1.02):
    """Return a smooth hill line through heights at equal steps, closed at the bottom of the image."""
    count, points = len(heights) - 1, []
    for step in range(count * 6 + 1):
        place = step / 6
        left = min(int(place), count - 1)
        share = place - left
        share = share * share * (3 - 2 * share)
        points.append(
            (
                -0.02 + 1.04 * place / count,
                start + heights[left] * (1 - share) + heights[left + 1] * share,
            )
        )
    return [*points, (1.02, bottom), (-0.02, bottom)]


def sky(canvas: Canvas, rng, horizon: float):
    """Paint a gradient, sun or moon, stars at night, and clouds."""
    top, low = SKY[canvas.look][canvas.time]
    side = canvas.pixels
    canvas.gradient((0, 0, side, round(side * (horizon + 0.08))), top, low)
    left = rng.random() < 0.5
    x = 0.14 + 0.1 * rng.random() if left else 0.76 + 0.1 * rng.random()
    stars = rng.random((9, 2))
    if canvas.time == "night":
        for sx, sy in stars:
            radius = 0.012
            canvas.ellipse(sx, 0.04 + 0.36 * sy, radius, radius, (700, 700, 420), 0, ink=False)
    y = {"morning": 0.30, "noon": 0.10, "sunset": horizon - 0.09, "night": 0.15}[canvas.time]
    radius = {"morning": 0.055, "noon": 0.05, "sunset": 0.085, "night": 0.075}[canvas.time]
    canvas.glow(x, y, 0.42, SUN[canvas.time], 0.30 if canvas.time == "night" else 0.55)
    disc = clip_colour(SUN[canvas.time] if canvas.drawn else blend(SUN[canvas.time], (225, 220, 210), 0.4))
    canvas.disc(x, y, radius, disc)
    clouds(canvas, rng, horizon, right=left)


def clouds(canvas: Canvas, rng, horizon: float, right: bool):
    """Paint a towering cumulus on the side away from the sun and a small cloud elsewhere."""
    tower_x = (0.80 if right else 0.20) + 0.08 * (rng.random() - 0.5)
    small_x = tower_x + (-0.42 if right else 0.42)
    spots = (
        (tower_x, horizon + 0.02, 0.13 + 0.03 * rng.random(), 4),
        (small_x, 0.20 + 0.06 * rng.random(), 0.062, 2),
    )
    light, shade = CLOUD[canvas.time]
    if not canvas.drawn:
        light = blend(light, SKY["photo"][canvas.time][1], 0.40)
        shade = blend(shade, SKY["photo"][canvas.time][1], 0.75)
    for x, base, size, storeys in spots:
        circles = []
        for storey in range(storeys):
            spread = 1.5 * (1 - storey / (storeys + 0.6))
            for side in (-1, 0, 1):
                circles.append(
                    (
                        x + side * spread * size * (0.75 + 0.3 * rng.random()),
                        base - size * (0.35 + 0.72 * storey) - 0.02 * rng.random(),
                        size * (0.72 - 0.07 * storey) * (1 if side else 1.15),
                    )
                )
        canvas.plain_blob(circles, shade)
        canvas.plain_blob([(cx - 0.16 * r, cy - 0.20 * r, r * 0.80) for cx, cy, r in circles], light)


def meadow(canvas: Canvas, rng, horizon: float):
    """Paint far hills, a bright near hill and flowers in the grass."""
    canvas.polygon(curve(horizon - 0.10, 0.13 * rng.random(5)), FAR_HILL, 0.1, ink=False)
    canvas.polygon(curve(horizon, 0.07 * rng.random(4)), blend(GRASS, (190, 214, 90), 0.45), 0.15, ink=False)
    canvas.polygon(curve(horizon + 0.13, 0.05 * rng.random(3)), GRASS, 0.35, ink=False)
    flowers(canvas, rng, horizon + 0.24)


def flowers(canvas: Canvas, rng, top: float):
    """Paint a dozen big flowers below `top`; the photo look shows plain grass."""
    for x, y, pick in rng.random((12, 3)):
        if canvas.drawn:
            radius = 0.015 + 0.009 * y
            canvas.ellipse(
                x,
                top + (0.99 - top) * y,
                radius,
                radius,
                FLOWERS[int(pick * len(FLOWERS))],
                0,
                ink=False,
            )


def lake(canvas: Canvas, rng, horizon: float, shore: bool):
    """Paint water up to the horizon, hills behind it and, for a subject that stands, a green shore."""
    canvas.polygon(curve(horizon - 0.13, 0.12 * rng.random(5)), FAR_HILL, 0.15, ink=False)
    side = canvas.pixels
    top, low = SKY[canvas.look][canvas.time]
    far = blend(canvas.colour(WATER), low, 0.5)
    near = blend(canvas.colour(blend(WATER, (20, 70, 120), 0.4)), top, 0.2)
    canvas.gradient((0, round(side * horizon), side, side), far, near)
    for x, y, length in rng.random((6, 3)):
        depth = horizon + 0.05 + (0.95 - horizon) * y
        half = 0.05 + 0.09 * length
        canvas.line([(x - half, depth), (x + half, depth)], blend(WATER, (235, 248, 255), 0.6), 0.014)
    heights = 0.04 * rng.random(4)
    if shore:
        canvas.polygon(curve(0.77, heights), GRASS, 0.35, ink=False)
        flowers(canvas, rng, 0.86)


def town(canvas: Canvas, rng, horizon: float):
    """Paint a row of gabled houses along a pale street."""
    walls = ((238, 222, 192), (226, 204, 180), (244, 236, 214), (214, 196, 178))
    roofs = ((176, 96, 72), (122, 104, 110), (152, 116, 84), (104, 122, 130))
    base, x = horizon + 0.16, -0.05 - 0.08 * rng.random()
    for wall, roof, high, wide in rng.random((5, 4)):
        width, top = 0.22 + 0.05 * wide, base - 0.24 - 0.10 * high
        canvas.box((x, top, x + width, base), walls[int(wall * 4)], 0.15)
        canvas.polygon(
            [(x - 0.02, top), (x + width / 2, top - 0.13), (x + width + 0.02, top)],
            roofs[int(roof * 4)],
            0.15,
        )
        glass = (640, 500, 200) if canvas.time == "night" else (120, 156, 178)
        canvas.box((x + width * 0.36, top + 0.06, x + width * 0.64, top + 0.145), glass, 0.05)
        x += width
    canvas.polygon(
        [(-0.02, base), (1.02, base), (1.02, 1.02), (-0.02, 1.02)],
        (206, 188, 158),
        0.25,
        ink=False,
    )
    canvas.line([(-0.02, base + 0.012), (1.02, base + 0.012)], (168, 148, 124), 0.024)


def greenhouse(canvas: Canvas, rng):
    """Paint the inside of a greenhouse: panes under an arched frame, leaves on both sides, a stone path."""
    frame = (236, 244, 236)
    haze = SKY[canvas.look][canvas.time][1]
    side = canvas.pixels
    canvas.polygon(curve(0.50, 0.10 * rng.random(5)), blend(FAR_HILL, haze, 0.35), 0.1, ink=False)
    if canvas.drawn:
        canvas.glow(0.5, 0.2, 0.9, (190, 230, 235) if canvas.time != "night" else (60, 70, 120), 0.25)
    arch = [
        (0.5 - 0.62 * math.cos(a * math.pi / 12), 0.42 - 0.40 * math.sin(a * math.pi / 12)) for a in range(13)
    ]
    outside = [(-0.1, -0.1), (1.1, -0.1), (1.1, 0.42), *reversed(arch), (-0.1, 0.42)]
    canvas.polygon(outside, (120, 170, 150), 0.2, ink=False)
    width = 0.028
    for x in (0.02, 0.26, 0.5, 0.74, 0.98):
        canvas.line([(x, 0.42), (x, 0.84)], frame, width)
        canvas.line([(x, 0.42), (0.5 + (x - 0.5) * 0.42, 0.04)], frame, width)
    canvas.line([(-0.02, 0.42), (1.02, 0.42)], frame, width * 1.3)
    canvas.line(arch, frame, width * 1.6)
    canvas.gradient(
        (0, round(0.80 * side), side, side),
        canvas.colour((186, 176, 150)),
        canvas.colour((146, 132, 112)),
    )
    for left in (True, False):
        bed(canvas, rng, left)


def bed(canvas: Canvas, rng, left: bool):
    """Paint a flower bed of round leafy bushes with a few big blossoms at one side."""
    edge = 0.04 if left else 0.96
    turn = 1 if left else -1
    shades = ((44, 120, 62), (70, 156, 66), (104, 182, 74))
    for layer, shade in enumerate(shades):
        circles = [
            (
                edge + turn * (0.02 + 0.14 * place + 0.05 * layer * (place - 0.5)),
                0.52 + 0.15 * layer + 0.20 * place + 0.04 * wobble,
                0.10 - 0.012 * layer,
            )
            for place, wobble in zip((0, 0.5, 1.0), rng.random(3), strict=True)
        ]
        canvas.blob([*circles, (edge, 0.85, 0.12)], shade, 0.3, ink=layer == 2)
    for x, y, pick in rng.random((4, 3)):
        if canvas.drawn:
            canvas.ellipse(
                edge + turn * 0.17 * x,
                0.60 + 0.30 * y,
                0.02,
                0.02,
                FLOWERS[int(pick * 4)],
                0,
                ink=False,
            )


def rails(canvas: Canvas, y: float):
    """Paint gravel and one rail under a train, the rail at height y."""
    canvas.polygon(
        [(-0.02, y), (1.02, y), (1.02, y + 0.075), (-0.02, y + 0.075)],
        (150, 138, 126),
        0.3,
        ink=False,
    )
    canvas.line([(-0.02, y + 0.008), (1.02, y + 0.008)], (84, 74, 76), 0.018)


def haze(canvas: Canvas):
    """Pale the distance towards the colour of the horizon, in the photo look only."""
    low = SKY["photo"][canvas.time][1]
    veil = Image.new("RGB", canvas.image.size, clip_colour(mute(low)))
    canvas.image = Image.blend(canvas.image, veil, 0.14)
