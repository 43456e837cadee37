"""The subjects of the demo scenes, each painted with its feet at (x, foot) and height `h`."""

from PIL import Image

from ghibli.demo.scenes.canvas import Canvas, blend

COLOURS = {
    "red": (214, 48, 44),
    "blue": (46, 92, 208),
    "yellow": (246, 200, 46),
    "green": (48, 158, 70),
    "white": (246, 244, 238),
    "black": (56, 52, 60),
    "orange": (238, 138, 48),
    "pink": (246, 152, 186),
    "purple": (138, 78, 178),
    "brown": (142, 92, 58),
}
SKIN, HAIR, WOOD, CREAM = (250, 214, 184), (92, 56, 44), (140, 96, 62), (250, 238, 210)
DARK = (48, 44, 52)


def shadow(canvas: Canvas, x: float, foot: float, half: float):
    """Paint a soft dark patch under a subject."""
    side = canvas.pixels
    width, height = round(2 * half * side), max(4, round(0.05 * side))
    patch = Image.radial_gradient("L").resize((width, height))
    patch = patch.point(lambda v: max(0, 150 - v))
    corner = (round((x - half) * side), round(foot * side) - height // 2)
    canvas.image.paste(canvas.colour((40, 60, 50)), corner, patch)


def paint_girl(canvas: Canvas, x, foot, h, colour):
    """Paint a girl with a bob of brown hair in a coloured dress."""
    head, neck, hem = foot - 0.80 * h, foot - 0.62 * h, foot - 0.18 * h
    r = 0.185 * h
    for side in (-1, 1):
        canvas.box(
            (x + side * 0.075 * h - 0.035 * h, hem - 0.02, x + side * 0.075 * h + 0.035 * h, foot),
            SKIN,
            0.2,
        )
        canvas.ellipse(x + side * 0.085 * h, foot - 0.015 * h, 0.06 * h, 0.033 * h, (120, 60, 50))
        canvas.polygon(
            [
                (x + side * 0.08 * h, neck + 0.02 * h),
                (x + side * 0.14 * h, neck + 0.02 * h),
                (x + side * 0.25 * h, foot - 0.36 * h),
                (x + side * 0.19 * h, foot - 0.33 * h),
            ],
            SKIN,
            0.2,
        )
    canvas.ellipse(x, head + 0.03 * h, r * 1.12, r * 1.20, HAIR, 0.35)
    canvas.polygon(
        [(x - 0.09 * h, neck), (x + 0.09 * h, neck), (x + 0.235 * h, hem), (x - 0.235 * h, hem)],
        colour,
        0.25,
    )
    canvas.ellipse(x, head + 0.035 * h, r * 0.88, r * 0.92, SKIN, 0.12)
    canvas.polygon(
        [
            (x - r * 1.02, head + 0.03 * h),
            (x - r * 0.86, head - 0.11 * h),
            (x - r * 0.3, head - 0.20 * h),
            (x + r * 0.3, head - 0.20 * h),
            (x + r * 0.86, head - 0.11 * h),
            (x + r * 1.02, head + 0.03 * h),
            (x + r * 0.45, head - 0.055 * h),
            (x - r * 0.45, head - 0.055 * h),
        ],
        HAIR,
        0.2,
        ink=False,
    )
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.075 * h, head + 0.065 * h, 0.024 * h, 0.034 * h, DARK, 0, ink=False)


def paint_panda(canvas: Canvas, x, foot, h, colour):
    """Paint a sitting panda, always black and white."""
    white = (250, 248, 240)
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.22 * h, foot - 0.90 * h, 0.085 * h, 0.085 * h, DARK, 0.1)
    canvas.ellipse(x, foot - 0.26 * h, 0.29 * h, 0.27 * h, white, 0.3)
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.26 * h, foot - 0.34 * h, 0.085 * h, 0.16 * h, DARK, 0.1)
        canvas.ellipse(x + side * 0.19 * h, foot - 0.09 * h, 0.14 * h, 0.095 * h, DARK, 0.1)
    canvas.ellipse(x, foot - 0.68 * h, 0.30 * h, 0.26 * h, white, 0.25)
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.125 * h, foot - 0.69 * h, 0.072 * h, 0.085 * h, DARK, 0, ink=False)
        canvas.ellipse(x + side * 0.115 * h, foot - 0.70 * h, 0.026 * h, 0.028 * h, white, 0, ink=False)
    canvas.ellipse(x, foot - 0.57 * h, 0.05 * h, 0.034 * h, DARK, 0, ink=False)


def paint_cat(canvas: Canvas, x, foot, h, colour):
    """Paint a sitting cat with pointed ears and a raised tail."""
    pale = blend(colour, (255, 255, 250), 0.55)
    canvas.ellipse(x + 0.33 * h, foot - 0.30 * h, 0.07 * h, 0.25 * h, colour, 0.25)
    canvas.ellipse(x, foot - 0.26 * h, 0.27 * h, 0.27 * h, colour, 0.3)
    canvas.ellipse(x, foot - 0.22 * h, 0.14 * h, 0.19 * h, pale, 0.1, ink=False)
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.12 * h, foot - 0.05 * h, 0.10 * h, 0.055 * h, colour, 0.15)
        canvas.polygon(
            [
                (x + side * 0.09 * h, foot - 0.86 * h),
                (x + side * 0.27 * h, foot - 1.0 * h),
                (x + side * 0.28 * h, foot - 0.70 * h),
            ],
            colour,
            0.15,
        )
    canvas.ellipse(x, foot - 0.66 * h, 0.29 * h, 0.23 * h, colour, 0.25)
    eye = (250, 214, 90) if sum(colour) < 260 else DARK
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.12 * h, foot - 0.68 * h, 0.036 * h, 0.048 * h, eye, 0, ink=False)
    canvas.ellipse(x, foot - 0.58 * h, 0.035 * h, 0.026 * h, (226, 120, 120), 0, ink=False)


def paint_train(canvas: Canvas, x, foot, h, colour):
    """Paint a rail car seen from the side, about two and a half times as long as high."""
    half, top = 1.28 * h, foot - h
    for place in (-0.62, -0.26, 0.26, 0.62):
        canvas.ellipse(x + place * half, foot - 0.11 * h, 0.13 * h, 0.13 * h, DARK, 0.2)
    canvas.box((x - half, top + 0.10 * h, x + half, foot - 0.14 * h), colour, 0.3, radius=0.10 * h)
    canvas.box((x - half * 0.97, foot - 0.40 * h, x + half * 0.97, foot - 0.31 * h), CREAM, 0.1, ink=False)
    canvas.box(
        (x - half * 0.96, top, x + half * 0.96, top + 0.12 * h),
        (120, 118, 124),
        0.2,
        radius=0.05 * h,
    )
    glass = (640, 500, 190) if canvas.time == "night" else (196, 230, 244)
    for place in (-0.70, -0.24, 0.22):
        canvas.box(
            (x + (place - 0.16) * half, top + 0.21 * h, x + (place + 0.16) * half, top + 0.50 * h),
            glass,
            0.1,
        )
    canvas.box(
        (x + 0.56 * half, top + 0.21 * h, x + 0.86 * half, top + 0.80 * h),
        blend(colour, (255, 250, 235), 0.35),
        0.2,
    )
    canvas.ellipse(x + half * 0.965, foot - 0.27 * h, 0.055 * h, 0.055 * h, (600, 540, 300), 0)


def paint_house(canvas: Canvas, x, foot, h, colour):
    """Paint a cottage with a coloured roof."""
    half, eave = 0.46 * h, foot - 0.50 * h
    canvas.box((x + 0.20 * h, foot - 1.02 * h, x + 0.35 * h, foot - 0.55 * h), (170, 110, 90), 0.2)
    canvas.box((x - half, eave, x + half, foot), CREAM, 0.22)
    canvas.polygon(
        [
            (x - half * 1.22, eave + 0.03 * h),
            (x - half * 0.62, foot - h + 0.05 * h),
            (x + half * 0.62, foot - h + 0.05 * h),
            (x + half * 1.22, eave + 0.03 * h),
        ],
        colour,
        0.25,
    )
    canvas.box((x - 0.10 * h, foot - 0.34 * h, x + 0.10 * h, foot), WOOD, 0.2)
    glass = (640, 500, 190) if canvas.time == "night" else (150, 200, 226)
    for side in (-1, 1):
        canvas.box(
            (
                x + side * 0.29 * h - 0.085 * h,
                foot - 0.36 * h,
                x + side * 0.29 * h + 0.085 * h,
                foot - 0.17 * h,
            ),
            glass,
            0.1,
        )


def paint_tree(canvas: Canvas, x, foot, h, colour):
    """Paint a broad tree: trunk, dark underside and lit top of the crown."""
    canvas.polygon(
        [
            (x - 0.10 * h, foot),
            (x - 0.055 * h, foot - 0.45 * h),
            (x + 0.055 * h, foot - 0.45 * h),
            (x + 0.10 * h, foot),
        ],
        (128, 84, 56),
        0.3,
    )
    crown = [
        (x - 0.27 * h, foot - 0.50 * h, 0.19 * h),
        (x + 0.27 * h, foot - 0.50 * h, 0.19 * h),
        (x, foot - 0.54 * h, 0.24 * h),
        (x - 0.16 * h, foot - 0.72 * h, 0.20 * h),
        (x + 0.17 * h, foot - 0.72 * h, 0.19 * h),
        (x, foot - 0.82 * h, 0.18 * h),
    ]
    canvas.blob(crown, blend(colour, (40, 50, 70), 0.22), 0.35)
    lit = [(cx - 0.02 * h, cy - 0.035 * h, r * 0.72) for cx, cy, r in crown]
    canvas.blob(lit, blend(colour, (255, 246, 170), 0.14), 0.12, ink=False)


def paint_boat(canvas: Canvas, x, foot, h, colour):
    """Paint a sailing boat with a coloured sail; `foot` is the water line."""
    deck = foot - 0.16 * h
    canvas.line([(x, deck), (x, foot - h)], (110, 78, 58), 0.022)
    canvas.polygon(
        [
            (x + 0.03 * h, foot - 0.98 * h),
            (x + 0.03 * h, deck - 0.06 * h),
            (x + 0.42 * h, deck - 0.06 * h),
        ],
        colour,
        0.25,
    )
    canvas.polygon(
        [
            (x - 0.03 * h, foot - 0.86 * h),
            (x - 0.03 * h, deck - 0.06 * h),
            (x - 0.32 * h, deck - 0.06 * h),
        ],
        blend(colour, (255, 255, 250), 0.3),
        0.2,
    )
    canvas.polygon(
        [
            (x - 0.48 * h, deck),
            (x + 0.50 * h, deck),
            (x + 0.34 * h, foot + 0.05 * h),
            (x - 0.34 * h, foot + 0.05 * h),
        ],
        WOOD,
        0.3,
    )
    canvas.line([(x - 0.46 * h, deck + 0.02 * h), (x + 0.47 * h, deck + 0.02 * h)], CREAM, 0.02)


PAINTERS = {
    "girl": paint_girl,
    "panda": paint_panda,
    "cat": paint_cat,
    "train": paint_train,
    "house": paint_house,
    "tree": paint_tree,
    "boat": paint_boat,
}
