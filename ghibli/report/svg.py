"""Inline SVG by hand: tags that escape what they are given, and the axes of a small chart.

Colours come from the page: a shape has a class, and `currentColor` draws it in light and in dark.
"""

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 24, 38


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """`<name key="value">children</name>`, all of it escaped but for what is Markup already.

    `class_` is class; an underscore within a name is a hyphen.
    """
    words = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shortened(value))
        for key, value in attributes.items()
        if value is not None
    ]
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(words), inner)


def shortened(value: object) -> object:
    """A coordinate to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


@dataclass(frozen=True)
class Axis:
    """Values from low to high on pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return float(self.start + (value - low) / (high - low) * (self.end - self.start))

    @property
    def ticks(self) -> list[float]:
        """Round values within the axis, about five."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
            found = [value for value in every if self.low <= value <= self.high]
            return found if len(found) <= 9 else [value for value in found if f"{value:e}"[0] == "1"]
        step = round_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(size: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten at or above a size."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= size * (1 - 1e-9))


def spread(values: list[float], *, zero: bool = False) -> tuple[float, float]:
    """A range that holds all finite values with a little room; around one value, something."""
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)


def plain(value: float) -> str:
    """A tick's label: `0.05`, `20`, with a true minus."""
    return f"{round(value, 10):g}".replace("-", "\u2212")


def frame(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: dict[float, str] | None = None) -> Markup:
    """Grid lines, tick labels and the names of both axes."""
    parts = []
    for value in y.ticks:
        heavy = "zero" if abs(value) < 1e-12 else "grid"
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_=heavy))
        label = tag("text", plain(value), x=x.start - 6, y=y(value) + 4, text_anchor="end")
        parts.append(label)
    for value, label in (x_ticks or {value: plain(value) for value in x.ticks}).items():
        parts.append(tag("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="tick"))
        parts.append(tag("text", label, x=x(value), y=y.start + 17, text_anchor="middle"))
    middle = (x.start + x.end) / 2
    parts.append(tag("text", x_label, x=middle, y=HEIGHT - 4, text_anchor="middle", class_="label"))
    parts.append(tag("text", y_label, x=2, y=12, class_="label"))
    return Markup("").join(parts)


def clipped(x: Axis, y: Axis, *shapes: Markup) -> Markup:
    """Shapes of which only what lies within the axes is seen, and a margin for round points."""
    left, top, margin = x.start - 4, y.end - 4, 8
    box = {"x": left, "y": top, "width": x.end - x.start + margin, "height": y.start - y.end + margin}
    moved = tag("g", *shapes, transform=f"translate({-left:g} {-top:g})")
    return tag("svg", moved, **box)


def drawing(title: str, *shapes: Markup, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """An `<svg>` with a text for those who do not see it."""
    box = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": title, "class_": "chart"}
    return tag("svg", *shapes, **box)
