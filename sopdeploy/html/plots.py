"""Charts of a page, drawn by Matplotlib: curves and bars as SVG images."""

import base64
import io
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sopdeploy.html.report import Figure, sanitize

Points = Sequence[tuple[float, float]]

# inches; the height of a bar with its distance to the next
_WIDTH = 4.6
_HEIGHT = 3.0
_BAR_HEIGHT = 0.3
_THIN_BAR = 0.16
_MAX_NAME = 28  # characters of a name beside a bar
_STYLE: Any = {
    "svg.fonttype": "none",  # text remains text
    "svg.hashsalt": "sopdeploy",  # equal charts are equal files
    "text.parse_math": False,
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
}
# The colors of the web page, and others for more curves
_COLORS = [
    "#0a7a5c",
    "#d08a1d",
    "#4f86c6",
    "#9a6bc4",
    "#a8201a",
    "#52635d",
    "#7fb2d9",
    "#c7a15a",
]


def plot(
    curves: Mapping[str, Points], x_label: str, y_label: str, *, logarithmic: bool = False
) -> str:
    """Draw *curves*, lists of points (x, y) by name, with labels and a legend; return a `data:` URL.

    The x axis can be *logarithmic*.
    """

    def draw(axes: Any) -> None:
        for number, points in enumerate(curves.values()):
            # The style of the line changes when the colors begin again.
            style = ("-", "--", ":", "-.")[number // len(_COLORS) % 4]
            xs = [x for x, _ in points]
            ys = [y for _, y in points]
            axes.plot(xs, ys, style, marker="." if len(points) < 20 else "")

        axes.set(xlabel=sanitize(x_label), ylabel=sanitize(y_label))
        if logarithmic:
            axes.set_xscale("log")
        else:
            whole = all(x == int(x) for points in curves.values() for x, _ in points)
            axes.xaxis.get_major_locator().set_params(integer=whole)  # no half epochs

        axes.legend(axes.lines, list(map(sanitize, curves)), fontsize=7)

    return _draw(draw, _HEIGHT)


def plot_bars(values: Mapping[str, float], x_label: str) -> str:
    """Draw *values* by name as bars, the first one on top; return a `data:` URL."""

    def draw(axes: Any) -> None:
        names = [
            sanitize(name) if len(name) <= _MAX_NAME else f"{sanitize(name[:_MAX_NAME])}…"
            for name in values
        ]
        axes.barh(range(len(names)), list(values.values()))
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set(xlabel=x_label)

    return _draw(draw, 0.7 + _THIN_BAR * len(values))


def plot_counts(
    counts: Mapping[str, Sequence[int]], edges: Sequence[float], x_label: str
) -> str:
    """Draw the *counts* of images between *edges*, of several kinds by name, above each other; a `data:` URL."""

    def draw(axes: Any) -> None:
        below = [0.0] * (len(edges) - 1)
        widths = [high - low for low, high in itertools.pairwise(edges)]
        for name, values in counts.items():
            axes.bar(edges[:-1], values, widths, bottom=below, align="edge", label=name)
            below = [one + other for one, other in zip(below, values, strict=True)]
        axes.set(xlabel=x_label, ylabel="images")
        axes.legend(fontsize=7)

    return _draw(draw, _HEIGHT)


def component_chart(counts: Sequence[int], caption: str) -> Figure:
    """Draw how many training images each component of a gated network received in the last epoch, as bars."""

    def draw(axes: Any) -> None:
        drawn = axes.barh([f"component {number}" for number in range(len(counts))], counts)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel="images")

    return Figure(
        image=_draw(draw, 0.7 + _BAR_HEIGHT * len(counts)), caption=f"{caption}, last epoch."
    )


def _draw(draw: Callable[[Any], None], height: float) -> str:
    """Let *draw* fill the axes of a chart that is *height* inches high; return its `data:` URL."""
    import matplotlib as mpl  # noqa: PLC0415  # half a second, and most commands draw nothing
    from matplotlib.figure import Figure as Drawing  # noqa: PLC0415
    from matplotlib.rcsetup import cycler  # noqa: PLC0415

    file = io.BytesIO()
    style = {**_STYLE, "axes.prop_cycle": cycler(color=_COLORS)}
    with mpl.rc_context(style), warnings.catch_warnings(action="ignore"):
        # The warnings are of characters without a glyph, which remain text.
        drawing = Drawing(figsize=(_WIDTH, height), layout="constrained")
        draw(drawing.subplots())
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
