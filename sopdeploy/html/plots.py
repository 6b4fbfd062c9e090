"""Charts of a page, drawn by Matplotlib: curves and bars as SVG images."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure as Drawing

from sopdeploy.html.report import Figure, sanitize

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _BAR_HEIGHT = 4.6, 3.0, 0.3  # inches; the height of a bar with its distance to the next
_STYLE: Any = {
    "svg.fonttype": "none",  # text remains text
    "svg.hashsalt": "sopdeploy",  # equal charts are equal files
    "text.parse_math": False,
    "font.size": 9,
    # Ten colors, then the same with other lines.
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":", "-."]) * mpl.rcParamsDefault["axes.prop_cycle"],
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def plot(curves: Mapping[str, Points], x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """Draw *curves*, lists of points (x, y) by name, with a legend; return a `data:` URL.

    The x axis can be *logarithmic*.
    """
    with mpl.rc_context(_STYLE):
        drawing = Drawing(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = drawing.subplots()
        for points in curves.values():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "")
        axes.set(xlabel=sanitize(x_label), ylabel=sanitize(y_label))
        if logarithmic:
            axes.set_xscale("log")
        axes.legend(axes.lines, list(map(sanitize, curves)), fontsize=7)
        return _as_url(drawing)


def component_chart(counts: Sequence[int], caption: str) -> Figure:
    """Draw how many training images each component of a gated network received in the last epoch, as bars."""
    with mpl.rc_context(_STYLE):
        drawing = Drawing(figsize=(_WIDTH, 0.7 + _BAR_HEIGHT * len(counts)), layout="constrained")
        axes = drawing.subplots()
        drawn = axes.barh([f"component {number}" for number in range(len(counts))], counts)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel="images")
        return Figure(image=_as_url(drawing), caption=f"{caption}, last epoch.")


def _as_url(drawing: Drawing) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of characters without a glyph, which remain text
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
