"""Inline SVG: escaped tags, and the axes of a small chart.

matplotlib's SVG does not serve here: the same chart is three to five times as large, its colours are fixed,
and it has neither an aria-label nor tooltips. Here a shape has a CSS class, so that style.css draws it in
light and dark mode, and text stays text.
"""

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250  # px of a chart
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 24, 38  # px around its axes


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Build `<name key="value">children</name>`; everything but Markup is escaped.

    `class_` becomes class, and an underscore within a name becomes a hyphen. None omits an attribute.
    """
    pairs = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), attribute_value(value))
        for key, value in attributes.items()
        if value is not None
    ]
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(pairs), inner)


def attribute_value(value: object) -> object:
    """Round a coordinate to two decimals; return anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


@dataclass(frozen=True)
class Axis:
    """A map of values from low to high onto pixels from start to end."""

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
        """Round values within the axis, about five of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
            found = [value for value in every if self.low <= value <= self.high]
            return found if len(found) <= 9 else [value for value in found if f"{value:e}"[0] == "1"]
        step = round_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(size: float) -> float:
    """Round up to 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= size * (1 - 1e-9))


def padded_range(values: list[float], *, zero: bool = False) -> tuple[float, float]:
    """Return a range around all finite values with a margin; around a single value, a range of some width.

    Args:
        zero: include 0, and add no margin beyond it.
    """
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - margin), (high if zero and high == 0 else high + margin)


def tick_label(value: float) -> str:
    """Format a tick: `0.05`, `20`, with a typographic minus."""
    return f"{round(value, 10):g}".replace("-", "\u2212")


def draw_axes(
    x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: dict[float, str] | None = None
) -> Markup:
    """Draw grid lines, tick labels and the labels of both axes.

    Args:
        x_ticks: position -> label; None chooses round values.
    """
    shapes = []
    for value in y.ticks:
        style = "zero" if abs(value) < 1e-12 else "grid"
        shapes.append(tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_=style))
        shapes.append(tag("text", tick_label(value), x=x.start - 6, y=y(value) + 4, text_anchor="end"))
    for value, label in (x_ticks or {value: tick_label(value) for value in x.ticks}).items():
        shapes.append(tag("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="tick"))
        shapes.append(tag("text", label, x=x(value), y=y.start + 17, text_anchor="middle"))
    middle = (x.start + x.end) / 2
    shapes.append(tag("text", x_label, x=middle, y=HEIGHT - 4, text_anchor="middle", class_="label"))
    shapes.append(tag("text", y_label, x=2, y=12, class_="label"))
    return Markup("").join(shapes)


def clip(x: Axis, y: Axis, *shapes: Markup) -> Markup:
    """Clip shapes to the area within the axes, with a margin for dots on its edge."""
    left, top, margin = x.start - 4, y.end - 4, 8
    box = {"x": left, "y": top, "width": x.end - x.start + margin, "height": y.start - y.end + margin}
    moved = tag("g", *shapes, transform=f"translate({-left:g} {-top:g})")
    return tag("svg", moved, **box)


def svg_image(label: str, *shapes: Markup, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """Build an `<svg>`; screen readers read out the label instead of its shapes."""
    box = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label, "class_": "chart"}
    return tag("svg", *shapes, **box)
