"""Charts as inline SVG, readable on a phone: bars and line plots.

SVG elements are built with escaped text and attributes and closed tags.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sopdeploy.html.templates import shorten_middle

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


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Build the element *name*; children that are not `Markup` are escaped.

    In attribute names `_` stands for `-` and a trailing `_` is dropped (`class_`). None omits an attribute;
    numbers are rounded to two decimals.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _coordinate(value))
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(child for child in children)
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


def svg_bars(id: str, title: str, rows: Sequence[Bar], largest: float) -> Markup:
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
