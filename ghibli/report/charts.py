"""Charts of a report page: curves with bands or whiskers, bars by timestep, intervals in table cells."""

import math
from dataclasses import dataclass, field

from markupsafe import Markup

from ghibli.evaluation.gain import Gain
from ghibli.evaluation.statistics import Estimate
from ghibli.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    clip,
    draw_axes,
    padded_range,
    round_step,
    svg_image,
    tag,
    tick_label,
)
from ghibli.report.text import gain_percent, typeset

COLOUR_COUNT = 6  # of style.css: c0 .. c5
DOT_SPACING = 9  # px between neighbouring points from which each gets a dot

Point = tuple[float, float, float]  # x, y, standard error of y


@dataclass(frozen=True)
class Series:
    """One curve; a point whose error is NaN has no whisker."""

    label: str
    points: list[Point]
    colour: str = "c0"  # c0 .. c5, or faint
    band: bool = False  # draw the 95 % interval as a band instead of whiskers
    dashed: bool = False
    freedom: float = math.inf  # degrees of freedom of the errors

    @property
    def finite(self) -> list[Point]:
        return [point for point in self.points if math.isfinite(point[0]) and math.isfinite(point[1])]


@dataclass(frozen=True)
class Figure:
    """A chart with its title, caption and legend."""

    title: str
    svg: Markup
    caption: str = ""
    legend: list[tuple[str, str, bool]] = field(default_factory=list)  # (label, colour, dashed)


@dataclass(frozen=True)
class ChartAxes:
    """Labels and ranges of both axes of a line chart."""

    x_label: str
    y_label: str
    log: bool = False  # logarithmic x axis
    floor: float | None = None  # the y axis never starts below; lines are clipped there
    zero: bool = False  # the y axis includes 0


def line_chart(title: str, series: list[Series], axes: ChartAxes, caption: str = "") -> Figure | None:
    """Draw curves over x; return None if no series has a finite point."""
    series = [one for one in series if one.finite]
    if not series:
        return None
    xs = [x for one in series for x, _, _ in one.finite]
    ys = [
        end
        for one in series
        for _, y, error in one.finite
        for end in confidence_interval(y, error, one.freedom)
    ]
    low, high = padded_range(ys, zero=axes.zero)
    low = low if axes.floor is None else max(low, axes.floor)
    x = Axis(*x_range(xs, axes.log), LEFT, WIDTH - RIGHT, axes.log)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    ticks = {v: tick_label(v) for v in sorted(set(xs))} if not axes.log and len(set(xs)) <= 7 else None
    ordered = sorted(series, key=lambda one: one.colour != "faint")  # faint curves lie behind
    shapes = clip(x, y, *(draw_series(one, x, y) for one in ordered))
    coloured = [one for one in series if one.colour != "faint"]
    label = f"{title}. {'; '.join(f'{one.label}: {describe_last_point(one)}' for one in coloured)}"
    legend = [(one.label, one.colour, one.dashed) for one in coloured]
    faint = len(series) - len(coloured)
    legend += [(f"{faint} others", "faint", False)] if faint else []
    svg = svg_image(label, draw_axes(x, y, axes.x_label, axes.y_label, ticks), shapes)
    return Figure(title, svg, caption, legend if len(series) > 1 else [])


def x_range(xs: list[float], log: bool) -> tuple[float, float]:
    """Return the first and last x; around a single x, a range of some width."""
    low, high = min(xs), max(xs)
    if low < high:
        return (low / 1.1, high * 1.1) if log else (low, high)
    return (low / 2, low * 2) if log else (low - 1, low + 1)


def confidence_interval(y: float, error: float, freedom: float = math.inf) -> tuple[float, float]:
    """Return the 95 % interval, or the value twice where the error is not finite."""
    reach = Estimate(y, error, freedom=freedom).reach
    return (y - reach, y + reach) if math.isfinite(reach) else (y, y)


def interval_of(gain: Gain) -> tuple[float, float]:
    """Return the 95 % interval of a gain as confidence_interval does."""
    return confidence_interval(gain.value, gain.standard_error, gain.freedom)


def describe_last_point(series: Series) -> str:
    """Describe the last point in words, for the label that screen readers read out."""
    x, y, error = series.finite[-1]
    return f"{y:.3g}{f' +- {error:.2g}' if math.isfinite(error) else ''} at {x:.3g}"


def draw_series(series: Series, x: Axis, y: Axis) -> Markup:
    """Draw a curve with its band or whiskers, and dots whose tooltips give the numbers."""
    points, shapes = series.finite, []
    if series.band:
        upper = [(x(a), y(confidence_interval(b, e, series.freedom)[1])) for a, b, e in points]
        lower = [(x(a), y(confidence_interval(b, e, series.freedom)[0])) for a, b, e in points]
        shapes.append(tag("polygon", points=svg_points(upper + lower[::-1]), class_="band"))
    else:
        whiskers = [
            (x(a), *map(y, confidence_interval(b, e, series.freedom)))
            for a, b, e in points
            if math.isfinite(e)
        ]
        shapes += [tag("line", x1=a, x2=a, y1=low, y2=high, class_="whisker") for a, low, high in whiskers]
    dashes = "5 4" if series.dashed else None
    corners = svg_points([(x(a), y(b)) for a, b, _ in points])
    shapes.append(tag("polyline", points=corners, class_="line", stroke_dasharray=dashes))
    width = x(points[-1][0]) - x(points[0][0])
    if series.colour != "faint" and width >= DOT_SPACING * (len(points) - 1):
        for a, b, error in points:
            error_text = f" +- {error:.2g}" if math.isfinite(error) else ""
            tooltip = tag("title", typeset(f"{series.label}, {a:g}: {b:.4g}") + typeset(error_text))
            shapes.append(tag("circle", tooltip, cx=x(a), cy=y(b), r=2.6))
    return tag("g", *shapes, class_=series.colour)


def svg_points(points: list[tuple[float, float]]) -> str:
    """Format points for the `points` attribute."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def bar_chart(
    title: str, gains: dict[str, Gain], x_label: str, caption: str = "", y_label: str = "gain, %"
) -> Figure | None:
    """Draw a bar with its 95 % interval per name, such as a range of timesteps; None without any."""
    gains = {name: gain for name, gain in gains.items() if math.isfinite(gain.value)}
    if not gains:
        return None
    intervals = [interval_of(gain) for gain in gains.values()]
    y = Axis(
        *padded_range([100 * end for pair in intervals for end in pair], zero=True), HEIGHT - BOTTOM, TOP
    )
    x = Axis(0, len(gains), LEFT, WIDTH - RIGHT)
    shapes = [draw_axes(x, y, x_label, y_label, {k + 0.5: name for k, name in enumerate(gains)})]
    for k, ((name, gain), interval) in enumerate(zip(gains.items(), intervals, strict=True)):
        top, bottom = sorted((y(100 * gain.value), y(0)))
        tooltip = tag("title", typeset(f"{name}: {gain_percent(gain)}"))
        edge, width = x(k + 0.22), x(0.56) - x(0)
        bar = tag("rect", tooltip, x=edge, y=top, width=width, height=max(bottom - top, 0.5), class_="bar")
        low, high = (y(100 * end) for end in interval)
        whisker = tag("line", x1=x(k + 0.5), x2=x(k + 0.5), y1=low, y2=high, class_="over")
        shapes.append(tag("g", bar, whisker, class_="c0"))
    label = f"{title}. " + "; ".join(f"{name}: {gain_percent(gain)}" for name, gain in gains.items())
    return Figure(title, svg_image(label, *shapes), caption)


def interval_chart(gain: Gain, low: float, high: float) -> Markup:
    """Draw one row of a forest plot: a value and its 95 % interval on a scale that includes 0.

    An arrow at the edge stands for what lies below the scale.
    """
    width, height = 170, 22
    x = Axis(low, high, 6, width - 6)
    middle = height / 2
    start, end = (min(max(one, low), high) for one in interval_of(gain))
    shapes = [
        tag("line", x1=x(0), x2=x(0), y1=0, y2=height, class_="zero"),
        tag("line", x1=x(start), x2=x(end), y1=middle, y2=middle, class_="whisker"),
    ]
    if low <= gain.value <= high:
        shapes.append(tag("circle", cx=x(gain.value), cy=middle, r=3.6))
    if interval_of(gain)[0] < low:
        arrow = [(0.0, middle), (7.0, middle - 4), (7.0, middle + 4)]
        shapes.append(tag("polygon", points=svg_points(arrow), class_="arrow"))
    colour = "c0" if gain.value >= 0 else "c1"
    return svg_image(gain_percent(gain), tag("g", *shapes, class_=colour), width=width, height=height)


def scale_labels(low: float, high: float) -> tuple[str, str]:
    """Format both ends of a common scale in percent, for the header of its column."""
    return tick_label(round(100 * low, 1)), tick_label(round(100 * high, 1))


def common_scale(gains: list[Gain], cut: bool = True) -> tuple[float, float]:
    """Return one scale for all rows of a forest plot.

    Args:
        cut: leave out what lies far below the best value.
    """
    values = [end for gain in gains for end in interval_of(gain)]
    low, high = padded_range(values, zero=True)
    lowest = -3 * max(high, round_step(0.01))
    return max(low, lowest) if cut else low, max(high, 1e-6)
