"""Two charts that fit a telephone: bars and an interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from sopdeploy.html.markup import Html, join, picture, shortened, tag, words

WIDTH = 360.0
LABELS, FIGURES = 118.0, 300.0  # where bars begin, and where their figures do
STEP, HEAD = 18.0, 30.0
LETTERS = 19


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: its label, its length, and its length in words."""

    label: str
    value: float
    text: str


def bars(
    name: str, title: str, rows: Sequence[Bar], largest: float, marks: Sequence[tuple[float, str]] = ()
) -> Html:
    """Return bars of at most *largest*, and upright *marks* at some values."""

    def length(value: float) -> float:
        return (FIGURES - 6 - LABELS) * min(value, largest) / largest if largest > 0 else 0.0

    head = HEAD if marks else 2.0
    height = head + STEP * len(rows)
    shapes = [
        join(
            [
                tag("path", d=f"M{LABELS + length(value):.2f} 18V{height - 2}", class_="mark"),
                words(LABELS + length(value), 13, text, "small", "end" if value > largest / 2 else "start"),
            ]
        )
        for value, text in marks
    ]
    for position, row in enumerate(rows):
        y = head + STEP * position
        shapes.append(
            tag(
                "g",
                tag("title", f"{row.label}: {row.text}"),
                words(LABELS - 6, y + 10, shortened(row.label, LETTERS), "small", "end"),
                tag("rect", x=LABELS, y=y + 1, width=length(row.value), height=STEP - 6, class_="bar"),
                words(FIGURES, y + 10, row.text, "small"),
            )
        )
    said = "; ".join(f"{row.label} {row.text}" for row in rows)
    lines = "".join(f" A line marks {text}." for _, text in marks)
    return picture(name, title, f"{said}.{lines}", (WIDTH, height), *shapes)


def interval(name: str, title: str, share: float, low: float, high: float) -> Html:
    """Return a share between 0 and 1, and the interval that it is believed to lie in."""
    left, right, y = 12.0, WIDTH - 20, 22.0

    def place(value: float) -> float:
        return left + value * (right - left)

    ticks = [
        join(
            [
                tag("path", d=f"M{place(value)} {y + 8}v5", class_="axis"),
                words(place(value), y + 26, f"{100 * value:.0f} %", "small", "middle"),
            ]
        )
        for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return picture(
        name,
        title,
        f"{100 * share:.1f} % were seen; the true share lies between {100 * low:.1f} and {100 * high:.1f} %.",
        (WIDTH, 54),
        tag("path", d=f"M{left} {y + 8}H{right}", class_="axis"),
        tag(
            "rect", x=place(low), y=y - 6, width=max(2.0, place(high) - place(low)), height=10, class_="band"
        ),
        tag("circle", cx=place(share), cy=y - 1, r=5, class_="bar"),
        *ticks,
    )
