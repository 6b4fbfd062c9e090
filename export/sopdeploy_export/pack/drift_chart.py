"""The numerical error of an exported file as a picture: how much of its limit each output uses."""

import base64
from html import escape

from sopdeploy.html.report import Figure
from sopdeploy_export.prove.file import ParityReport

# In pixels.
_NAMES_WIDTH = 130  # of the names in front of the bars
_LIMIT_LENGTH = 170  # of a bar at the limit
_NUMBER_WIDTH = 45  # of the number behind a bar
_ROW_HEIGHT = 22
_TEXT_SIZE = 12

_LONGEST = 1.1  # length of a bar, in lengths of one at the limit; longer bars are cut


def draw_drift(parity: ParityReport) -> Figure:
    """Draw a bar for each output and batch size of *parity*: the error, in rounding errors of this output."""
    rows = [
        (f"{name}, batch {size}", output.in_floors(drift))
        for name, output in parity.outputs.items()
        for size, drift in output.drift.items()
    ]
    limit = parity.floors_allowed
    width = _NAMES_WIDTH + round(_LONGEST * _LIMIT_LENGTH) + _NUMBER_WIDTH
    height = _ROW_HEIGHT * len(rows) + 2 * _ROW_HEIGHT

    # Vertical lines at one rounding error and at the limit, with their numbers below.
    bottom = _ROW_HEIGHT * len(rows) + 4
    marks = ""
    for floors, label in ((1.0, "1"), (limit, f"limit {limit:g}")):
        x = _NAMES_WIDTH + _LIMIT_LENGTH * floors / limit
        marks += f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{bottom}" stroke="#888" stroke-dasharray="3 3"/>'
        marks += f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{label}</text>'

    # A row for each bar: its name, the bar, its number. A bar over the limit is red.
    bars = ""
    for number, (name, floors) in enumerate(rows):
        y = _ROW_HEIGHT * number + 4
        length = _LIMIT_LENGTH * min(floors / limit, _LONGEST)
        shown_length = max(length, 1)  # a pixel shows that there is a bar
        color = "#0a7a5c" if floors <= limit else "#a8201a"
        bars += (
            f'<text x="{_NAMES_WIDTH - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
        )
        bars += f'<rect x="{_NAMES_WIDTH}" y="{y}" width="{shown_length:.1f}" height="14" rx="3" fill="{color}"/>'
        bars += f'<text x="{_NAMES_WIDTH + length + 6:.1f}" y="{y + 11}">{floors:.2g}</text>'

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="{_TEXT_SIZE}">{marks}{bars}</svg>'
    )
    image = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"

    largest = max(floors for _, floors in rows)
    caption = (
        "Numerical error against float64, in multiples of the network's own rounding error: "
        f"at most {largest:.2g}, and {limit:g} are allowed."
    )
    return Figure(image=image, caption=caption)
