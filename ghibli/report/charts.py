"""The figures of a page: curves with bands or whiskers, bars by timestep, an interval in a table's cell."""

import math
from dataclasses import dataclass, field

from markupsafe import Markup

from ghibli.evaluation.gain import Gain
from ghibli.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    clipped,
    drawing,
    frame,
    plain,
    round_step,
    spread,
    tag,
)
from ghibli.report.text import percent, typeset

COLOURS = 6  # of style.css: c0 .. c5
ROOM = 9  # px between neighbours for a dot on each


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y, error); an error that is nan is not drawn."""

    label: str
    points: list[tuple[float, float, float]]
    colour: str = "c0"  # c0 .. c5, or faint
    band: bool = False  # the 95 % interval as a band, not as whiskers
    dashed: bool = False

    @property
    def finite(self) -> list[tuple[float, float, float]]:
        return [point for point in self.points if math.isfinite(point[0]) and math.isfinite(point[1])]


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, what it shows in words, and the meaning of its colours."""

    title: str
    svg: Markup
    caption: str = ""
    legend: list[tuple[str, str, bool]] = field(default_factory=list)  # (label, colour, dashed)


def curves(
    title: str,
    series: list[Series],
    x_label: str,
    y_label: str,
    *,
    caption: str = "",
    log: bool = False,
    floor: float | None = None,
    zero: bool = False,
) -> Figure | None:
    """Lines over x; None when no series has a finite point.

    Args:
        log: a logarithmic x axis.
        floor: the y axis ends there at the latest; lines are cut.
        zero: the y axis holds 0.
    """
    series = [one for one in series if one.finite]
    if not series:
        return None
    xs = [x for one in series for x, _, _ in one.finite]
    ys = [end for one in series for _, y, error in one.finite for end in ends(y, error)]
    low, high = spread(ys, zero=zero)
    low = low if floor is None else max(low, floor)
    x = Axis(*x_range(xs, log), LEFT, WIDTH - RIGHT, log)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    ticks = {v: plain(v) for v in sorted(set(xs))} if not log and len(set(xs)) <= 7 else None
    drawn = sorted(series, key=lambda one: one.colour != "faint")
    shapes = clipped(x, y, *(line(one, x, y) for one in drawn))
    words = f"{title}. {'; '.join(f'{s.label}: {ending(s)}' for s in series if s.colour != 'faint')}"
    legend = [(one.label, one.colour, one.dashed) for one in series if one.colour != "faint"]
    faint = sum(one.colour == "faint" for one in series)
    legend += [(f"{faint} others", "faint", False)] if faint else []
    svg = drawing(words, frame(x, y, x_label, y_label, ticks), shapes)
    return Figure(title, svg, caption, legend if len(series) > 1 else [])


def x_range(xs: list[float], log: bool) -> tuple[float, float]:
    """From the first to the last x, or something around the only one."""
    low, high = min(xs), max(xs)
    if low < high:
        return (low / 1.1, high * 1.1) if log else (low, high)
    return (low / 2, low * 2) if log else (low - 1, low + 1)


def ends(y: float, error: float) -> tuple[float, float]:
    """The 95 % interval, or the value twice where there is no error."""
    reach = 1.96 * error if math.isfinite(error) else 0.0
    return y - reach, y + reach


def ending(series: Series) -> str:
    """The last point in words, for those who do not see the drawing."""
    x, y, error = series.finite[-1]
    return f"{y:.3g}{f' +- {error:.2g}' if math.isfinite(error) else ''} at {x:.3g}"


def line(series: Series, x: Axis, y: Axis) -> Markup:
    """A curve with its band or whiskers, and dots that tell their numbers."""
    points, shapes = series.finite, []
    if series.band:
        upper = [(x(a), y(ends(b, e)[1])) for a, b, e in points]
        lower = [(x(a), y(ends(b, e)[0])) for a, b, e in points]
        shapes.append(tag("polygon", points=path(upper + lower[::-1]), class_="band"))
    else:
        whiskers = [(x(a), *map(y, ends(b, e))) for a, b, e in points if math.isfinite(e)]
        shapes += [tag("line", x1=a, x2=a, y1=low, y2=high, class_="whisker") for a, low, high in whiskers]
    dashes = "5 4" if series.dashed else None
    corners = path([(x(a), y(b)) for a, b, _ in points])
    shapes.append(tag("polyline", points=corners, class_="line", stroke_dasharray=dashes))
    across = x(points[-1][0]) - x(points[0][0])
    if series.colour != "faint" and across >= ROOM * (len(points) - 1):
        for a, b, error in points:
            told = tag("title", typeset(f"{series.label}, {a:g}: {b:.4g}") + spoken(error))
            shapes.append(tag("circle", told, cx=x(a), cy=y(b), r=2.6))
    return tag("g", *shapes, class_=series.colour)


def spoken(error: float) -> str:
    return typeset(f" +- {error:.2g}") if math.isfinite(error) else ""


def path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def bars(title: str, gains: dict[str, Gain], x_label: str, caption: str = "") -> Figure | None:
    """The gain in each part of the timesteps, with its 95 % interval; None without finite values."""
    gains = {part: gain for part, gain in gains.items() if math.isfinite(gain.value)}
    if not gains:
        return None
    ys = [100 * end for gain in gains.values() for end in ends(gain.value, gain.standard_error)]
    y = Axis(*spread(ys, zero=True), HEIGHT - BOTTOM, TOP)
    x = Axis(0, len(gains), LEFT, WIDTH - RIGHT)
    shapes = [frame(x, y, x_label, "gain, %", {k + 0.5: part for k, part in enumerate(gains)})]
    for k, (part, gain) in enumerate(gains.items()):
        top, bottom = sorted((y(100 * gain.value), y(0)))
        told = tag("title", typeset(f"{part}: {percent(gain)}"))
        edge, width = x(k + 0.22), x(0.56) - x(0)
        bar = tag("rect", told, x=edge, y=top, width=width, height=max(bottom - top, 0.5), class_="bar")
        low, high = (y(100 * end) for end in ends(gain.value, gain.standard_error))
        whisker = tag("line", x1=x(k + 0.5), x2=x(k + 0.5), y1=low, y2=high, class_="over")
        shapes.append(tag("g", bar, whisker, class_="c0"))
    words = f"{title}. " + "; ".join(f"{part}: {percent(gain)}" for part, gain in gains.items())
    return Figure(title, drawing(words, *shapes), caption)


def interval(gain: Gain, low: float, high: float) -> Markup:
    """A value with its 95 % interval on a scale from low to high that holds 0: one row of a forest plot."""
    width, height = 170, 22
    x = Axis(low, high, 6, width - 6)
    middle = height / 2
    start, end = (min(max(one, low), high) for one in ends(gain.value, gain.standard_error))
    shapes = [
        tag("line", x1=x(0), x2=x(0), y1=0, y2=height, class_="zero"),
        tag("line", x1=x(start), x2=x(end), y1=middle, y2=middle, class_="whisker"),
    ]
    if low <= gain.value <= high:
        shapes.append(tag("circle", cx=x(gain.value), cy=middle, r=3.6))
    colour = "c0" if gain.value >= 0 else "c1"
    return drawing(percent(gain), tag("g", *shapes, class_=colour), width=width, height=height)


def scale_ends(low: float, high: float) -> tuple[str, str]:
    """Both ends of a common scale in percent, for the head of its column."""
    return plain(round(100 * low, 1)), plain(round(100 * high, 1))


def common_scale(gains: list[Gain], cut: bool = True) -> tuple[float, float]:
    """One scale for all rows of a forest plot; cut: what lies far below the best is left out."""
    values = [end for gain in gains for end in ends(gain.value, gain.standard_error)]
    low, high = spread(values, zero=True)
    lowest = -3 * max(high, round_step(0.01))
    return max(low, lowest) if cut else low, max(high, 1e-6)
