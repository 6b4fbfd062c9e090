"""Charts as inline SVG, readable on a phone: bars, interval, heat map, line plot.

SVG elements are built with escaped text and attributes and closed tags.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sopdeploy.html.templates import sanitize, shorten

WIDTH = 360.0

_SMALL_LETTER = 5.8  # average width of a letter of class `small`

# Labels of bars, rows and columns, and heights of bars in SVG units.
_LONGEST_LABEL = 24  # characters
_BAR_STEP, _MARKS_HEIGHT = 18.0, 30.0

# Heat map: the space above the columns, the largest cell, and the most columns that leave room for numbers.
_HEAT_TOP = 14.0
_CELL_WIDTH, _CELL_HEIGHT = 60.0, 26.0
_MAX_NUMBERED_COLUMNS = 14
_SLANT = math.sqrt(0.5)  # sine and cosine of the angle of long column labels

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

    def scale(self, values: Sequence[float]) -> "Scale":
        """Choose the limits of the axis for *values*."""
        shown = [value for value in values if value > 0 or not self.logarithmic] or [1.0]
        low = min(shown) if self.low is None else self.low
        high = max(shown) if self.high is None else self.high
        return Scale(low, high if high > low else low + (abs(low) or 1.0), self.logarithmic)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear or logarithmic mapping between [low, high] and [0, 1]."""

    low: float
    high: float
    logarithmic: bool

    def position(self, value: float) -> float:
        """Map *value*, clipped to the limits, to [0, 1]."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, position: float) -> float:
        """Map a *position* in [0, 1] back to a value."""
        if self.logarithmic:
            return float(self.low * (self.high / self.low) ** position)
        return self.low + position * (self.high - self.low)


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


def _label_width(labels: Iterable[str]) -> float:
    """Compute the width of the longest of *labels*, each shortened to `_LONGEST_LABEL`, with its margin."""
    return 8 + _SMALL_LETTER * min(_LONGEST_LABEL, max(map(len, labels), default=0))


def bars(
    id: str,
    title: str,
    rows: Sequence[Bar],
    largest: float,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Draw horizontal bars; *largest* is the value of a bar of full width.

    Each of *marks*, a value and its label, is a vertical line across the bars.
    """

    left = _label_width(row.label for row in rows)
    right = max(left + 6, WIDTH - 2 - _SMALL_LETTER * max((len(row.text) for row in rows), default=0))

    def length(value: float) -> float:
        return (right - 6 - left) * min(value, largest) / largest if largest > 0 else 0.0

    top = _MARKS_HEIGHT if marks else 2.0
    height = top + _BAR_STEP * len(rows)
    shapes = []
    for value, label in marks:
        x = left + length(value)
        shapes.append(element("path", d=f"M{x:.2f} 18V{height - 2}", class_="mark"))
        shapes.append(text(x, 13, label, anchor="end" if value > largest / 2 else "start"))
    for number, row in enumerate(rows):
        y = top + _BAR_STEP * number
        shapes.append(
            element(
                "g",
                element("title", f"{row.label}: {row.text}"),
                text(left - 6, y + 10, shorten(row.label, _LONGEST_LABEL), anchor="end"),
                element("rect", x=left, y=y + 1, width=length(row.value), height=_BAR_STEP - 6, class_="bar"),
                text(right, y + 10, row.text),
            )
        )
    description = "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    description += "".join(f" A line marks {label}." for _, label in marks)
    return svg(id, title, description, (WIDTH, height), *shapes)


def interval(id: str, title: str, fraction: float, low: float, high: float) -> Markup:
    """Draw a *fraction* in [0, 1] with its confidence interval."""
    left, right, y = 12.0, WIDTH - 20, 22.0
    marked = (0.0, 0.25, 0.5, 0.75, 1.0)
    x = {value: left + value * (right - left) for value in (*marked, low, fraction, high)}
    ticks = []
    for value in marked:
        ticks.append(element("path", d=f"M{x[value]} {y + 8}v5", class_="axis"))
        ticks.append(text(x[value], y + 26, f"{100 * value:.0f} %", anchor="middle"))
    width = max(2.0, x[high] - x[low])
    return svg(
        id,
        title,
        f"{100 * fraction:.1f} %, with a confidence interval between {100 * low:.1f} and {100 * high:.1f} %.",
        (WIDTH, 54),
        element("path", d=f"M{left} {y + 8}H{right}", class_="axis"),
        element("rect", x=x[low], y=y - 6, width=width, height=10, class_="band"),
        element("circle", cx=x[fraction], cy=y - 1, r=5, class_="bar"),
        *ticks,
    )


def heat(
    id: str,
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    wrong_off_diagonal: bool = False,
) -> Markup:
    """Draw a heat map of *rows*: each has a label and one value in [0, 1] per column.

    *texts* are the numbers to write into the cells. *wrong_off_diagonal* gives the cells off the diagonal the
    color of errors, as in a confusion matrix.
    """
    left, numbered = _label_width(label for label, _ in rows), len(columns) <= _MAX_NUMBERED_COLUMNS
    names = [shorten(column, _LONGEST_LABEL) for column in columns]
    longest = _SMALL_LETTER * max(map(len, names))
    width = min(_CELL_WIDTH, (WIDTH - left) / len(columns))
    slanted, top = longest > width, _HEAT_TOP
    if slanted:  # half of the last cell and the space on the right hold the last label
        width = min(width, (WIDTH - left - longest * _SLANT) / (len(columns) - 0.5))
        top += longest * _SLANT
    height = min(width, _CELL_HEIGHT)
    shapes = []
    for column, name in enumerate(names):
        if numbered or column % 5 == 0:
            x, y = left + width * (column + 0.5), top - 4
            turn = f"rotate(-45 {_coordinate(x)} {_coordinate(y)})" if slanted else None
            anchor = "start" if slanted else "middle"
            shapes.append(element("text", name, x=x, y=y, class_="small", text_anchor=anchor, transform=turn))
    for row, (label, values) in enumerate(rows):
        y = top + height * row
        shapes.append(text(left - 5, y + height / 2 + 4, shorten(label, _LONGEST_LABEL), anchor="end"))
        for column, value in enumerate(values):
            number = texts[row][column]
            x = left + width * column
            cell = {"x": x, "y": y, "width": width - 1, "height": height - 1}
            kind = "cell wrong" if wrong_off_diagonal and column != row else "cell"
            children = [
                element("title", f"{label}, {columns[column]}: {number}"),
                element("rect", **cell, class_="empty"),
                element("rect", **cell, class_=kind, fill_opacity=value),
            ]
            if numbered and number != "0":
                style = "small dark" if value > 0.5 else "small"
                children.append(text(x + width / 2, y + height / 2 + 4, number, style, "middle"))
            shapes.append(element("g", *children))
    cells = "; ".join(f"{label}: {', '.join(texts[row])}" for row, (label, _) in enumerate(rows))
    size = (WIDTH, top + height * len(rows) + 4)
    return svg(id, title, f"Columns are {', '.join(columns)}. {cells}.", size, *shapes)


def plot(id: str, title: str, curves: Sequence[Curve], x_axis: Axis, y_axis: Axis) -> Markup:
    """Draw *curves*, of at least one point each, with a legend above them.

    Raises `ValueError` for more than `MAX_CURVES`, which readers could not tell apart.
    """
    if len(curves) > MAX_CURVES:
        raise ValueError(f"{id}: {len(curves)} curves; draw at most {MAX_CURVES}")
    xs = sorted({x for curve in curves for x, _ in curve.points})
    x_scale, y_scale = x_axis.scale(xs), y_axis.scale([y for curve in curves for _, y in curve.points])
    down = _LEGEND_LINE * ((len(curves) - 1) // _LEGEND_COLUMNS)  # more legend lines move the plot down
    top, bottom = _PLOT_TOP + down, _PLOT_BOTTOM + down

    def to_pixels(point: Point) -> Point:
        x, y = x_scale.position(point[0]), y_scale.position(point[1])
        return _PLOT_LEFT + x * (_PLOT_RIGHT - _PLOT_LEFT), bottom - y * (bottom - top)

    shapes = [text(8, top - 12, y_axis.label)]
    for position in (0.0, 0.5, 1.0):
        y = bottom - position * (bottom - top)
        shapes.append(element("path", d=f"M{_PLOT_LEFT} {y:.2f}H{_PLOT_RIGHT}", class_="mark"))
        shapes.append(text(_PLOT_LEFT - 4, y + 4, f"{y_scale.value(position):.3g}", anchor="end"))
    shapes += [
        text(to_pixels((tick, y_scale.low))[0], bottom + 16, f"{tick:.3g}", anchor="middle")
        for tick in _ticks(xs, x_scale)
    ]
    shapes.append(text((_PLOT_LEFT + _PLOT_RIGHT) / 2, bottom + 32, x_axis.label, anchor="middle"))
    descriptions = []
    for number, curve in enumerate(curves):
        shapes += _draw_curve(number, curve, [to_pixels(point) for point in curve.points])
        described = curve.points if len(curve.points) <= _MAX_MARKERS else (curve.points[0], curve.points[-1])
        descriptions.append(f"{curve.name}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in described))
    description = f"{y_axis.label} over {x_axis.label}. {'. '.join(descriptions)}."
    return svg(id, title, description, (WIDTH, bottom + 36), *shapes)


def _ticks(values: Sequence[float], scale: Scale) -> list[float]:
    """Select those of the sorted *values* whose labels do not overlap."""
    ticks: list[float] = []
    for value in reversed(values):
        distance = scale.position(ticks[-1]) - scale.position(value) if ticks else 1.0
        if distance >= _TICK_LABEL_WIDTH / (_PLOT_RIGHT - _PLOT_LEFT):
            ticks.append(value)
    return ticks


def _draw_curve(number: int, curve: Curve, points: Sequence[Point]) -> Iterator[Markup]:
    """Yield the line through *points*, its markers and its legend entry."""
    style = f"c{number}"
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    yield element("path", d=path, class_=f"curve {style}")
    if len(points) <= _MAX_MARKERS:
        yield from (element("circle", cx=x, cy=y, r=3, class_=f"point {style}") for x, y in points)
    x = 8 + number % _LEGEND_COLUMNS * WIDTH / _LEGEND_COLUMNS
    y = 8 + number // _LEGEND_COLUMNS * _LEGEND_LINE
    yield element("path", d=f"M{x} {y}h22", class_=f"curve {style}")
    yield text(x + 27, y + 4, shorten(curve.name, 24))
