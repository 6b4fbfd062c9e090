"""SVG files for the pictures of the documentation, drawn by Matplotlib."""

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sopdeploy",
    "axes.spines.right": False,
    "axes.spines.top": False,
}


def write_svg(figure: Figure, title: str, description: str) -> str:
    """Write *figure* as SVG whose text remains text; equal figures give equal files."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        metadata = {"Title": title, "Description": description, "Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=metadata)
    return "\n".join(map(str.rstrip, file.getvalue().splitlines())) + "\n"
