"""Charts as inline SVG, readable on a phone: bars and line plots.

SVG elements are built with escaped text and attributes and closed tags.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sopdeploy.html.templates import sanitize, shorten_middle

_WIDTH = 360.0

_SMALL_LETTER = 5.8  # average width of a letter of class `small`
_LONGEST_LABEL = 24  # characters of the label of a bar
_BAR_STEP = 18.0  # distance of bars

# Line plot: the plotting area, the line styles (`.c0` to `.c5` in style.css) and the legend.
_PLOT_LEFT, _PLOT_RIGHT, _PLOT_TOP, _PLOT_BOTTOM = 46.0, 346.0, 44.0, 190.0
MAX_CURVES = 6  # each has its own color and dash pattern
_LEGEND_COLUMNS, _LEGEND_LINE = 2, 15.0
_MAX_MARKERS = 12  # longer curves have no markers, and their description gives the first and last point only
_TICK_LABEL_WIDTH = 34.0

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: its label, its length and the text that states its value."""

    label: str
    value: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One curve of a line plot: its name and its points (x, y) in the order of x."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its label and its limits, by default those of the data.

    On a logarithmic axis, values that are not positive are drawn at the lower limit.
    """

    label: str
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None

    def limits(self, values: Sequence[float]) -> tuple[float, float]:
        """Choose the limits for *values*, the second above the first."""
        shown = [value for value in values if value > 0 or not self.logarithmic] or [1.0]
        low = min(shown) if self.low is None else self.low
        high = max(shown) if self.high is None else self.high
        return low, high if high > low else low + (abs(low) or 1.0)

    def position(self, value: float, low: float, high: float) -> float:
        """Map *value*, clipped to the limits *low* and *high*, to [0, 1]."""
        value = min(max(value, low), high)
        if self.logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Build the element *name*; children that are not `Markup` are escaped.

    In attribute names `_` stands for `-` and a trailing `_` is dropped (`class_`). None omits an attribute;
    numbers are rounded to two decimals.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), sanitize(_coordinate(value)))
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(sanitize(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, body)


def text(x: float, y: float, content: str, class_: str | None = "small", anchor: str | None = None) -> Markup:
    """Build text at the baseline (x, y); *anchor* is `start`, `middle` or `end`."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def svg(id: str, title: str, description: str, size: tuple[float, float], *shapes: str) -> Markup:
    """Build an `<svg>` of *size* (width, height) with texts for screen readers."""
    return element(
        "svg",
        element("title", title, id=f"{id}-title"),
        element("desc", description, id=f"{id}-desc"),
        *shapes,
        viewBox=f"0 0 {_coordinate(size[0])} {_coordinate(size[1])}",
        role="img",
        aria_labelledby=f"{id}-title {id}-desc",
    )


def _coordinate(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def bars(id: str, title: str, rows: Sequence[Bar], largest: float) -> Markup:
    """Draw horizontal bars; *largest* is the value of a bar of full width."""
    longest_label = max((len(row.label) for row in rows), default=0)
    longest_text = max((len(row.text) for row in rows), default=0)
    left = 8 + _SMALL_LETTER * min(_LONGEST_LABEL, longest_label)
    right = max(left + 6, _WIDTH - 2 - _SMALL_LETTER * longest_text)
    shapes = []
    for number, row in enumerate(rows):
        y = 2.0 + _BAR_STEP * number
        length = (right - 6 - left) * min(row.value, largest) / largest if largest > 0 else 0.0
        shapes.append(
            element(
                "g",
                element("title", f"{row.label}: {row.text}"),
                text(left - 6, y + 10, shorten_middle(row.label, _LONGEST_LABEL), anchor="end"),
                element("rect", x=left, y=y + 1, width=length, height=_BAR_STEP - 6, class_="bar"),
                text(right, y + 10, row.text),
            )
        )
    description = "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    return svg(id, title, description, (_WIDTH, 2.0 + _BAR_STEP * len(rows)), *shapes)


def plot(id: str, title: str, curves: Sequence[Curve], x_axis: Axis, y_axis: Axis) -> Markup:
    """Draw *curves*, of at least one point each, with a legend above them; *y_axis* is linear.

    Raises `ValueError` for more than `MAX_CURVES`, which readers could not tell apart.
    """
    if len(curves) > MAX_CURVES:
        raise ValueError(f"{id}: {len(curves)} curves; draw at most {MAX_CURVES}")
    xs = sorted({x for curve in curves for x, _ in curve.points})
    left, right = x_axis.limits(xs)
    low, high = y_axis.limits([y for curve in curves for _, y in curve.points])
    down = _LEGEND_LINE * ((len(curves) - 1) // _LEGEND_COLUMNS)  # more legend lines move the plot down
    top, bottom = _PLOT_TOP + down, _PLOT_BOTTOM + down

    def to_pixels(point: Point) -> Point:
        x, y = x_axis.position(point[0], left, right), y_axis.position(point[1], low, high)
        return _PLOT_LEFT + x * (_PLOT_RIGHT - _PLOT_LEFT), bottom - y * (bottom - top)

    shapes = [text(8, top - 12, y_axis.label)]
    for position in (0.0, 0.5, 1.0):
        y = bottom - position * (bottom - top)
        shapes.append(element("path", d=f"M{_PLOT_LEFT} {y:.2f}H{_PLOT_RIGHT}", class_="mark"))
        shapes.append(text(_PLOT_LEFT - 4, y + 4, f"{low + position * (high - low):.3g}", anchor="end"))
    shown = _PLOT_RIGHT + _TICK_LABEL_WIDTH
    for tick in reversed(xs):  # those whose labels do not overlap
        x, _ = to_pixels((tick, low))
        if shown - x >= _TICK_LABEL_WIDTH:
            shapes.append(text(x, bottom + 16, f"{tick:.3g}", anchor="middle"))
            shown = x
    shapes.append(text((_PLOT_LEFT + _PLOT_RIGHT) / 2, bottom + 32, x_axis.label, anchor="middle"))
    descriptions = []
    for number, curve in enumerate(curves):
        shapes += _draw_curve(number, curve, [to_pixels(point) for point in curve.points])
        described = curve.points if len(curve.points) <= _MAX_MARKERS else (curve.points[0], curve.points[-1])
        descriptions.append(f"{curve.name}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in described))
    description = f"{y_axis.label} over {x_axis.label}. {'. '.join(descriptions)}."
    return svg(id, title, description, (_WIDTH, bottom + 36), *shapes)


def _draw_curve(number: int, curve: Curve, points: Sequence[Point]) -> Iterator[Markup]:
    """Yield the line through *points*, its markers and its legend entry."""
    style = f"c{number}"
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    yield element("path", d=path, class_=f"curve {style}")
    if len(points) <= _MAX_MARKERS:
        yield from (element("circle", cx=x, cy=y, r=3, class_=f"point {style}") for x, y in points)
    x = 8 + number % _LEGEND_COLUMNS * _WIDTH / _LEGEND_COLUMNS
    y = 8 + number // _LEGEND_COLUMNS * _LEGEND_LINE
    yield element("path", d=f"M{x} {y}h22", class_=f"curve {style}")
    yield text(x + 27, y + 4, shorten_middle(curve.name, 24))
