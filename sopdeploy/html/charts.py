"""Two charts that fit a telephone: bars and an interval."""

import math
from collections.abc import Iterator, Sequence
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


WIDTH_HEAT, LEFT, TOP = 360.0, 84.0, 14.0
LETTERS_HEAT, WIDEST, HIGHEST = 13, 60.0, 26.0
LETTER = 7.5  # wide, at most
MOST_NUMBERS = 14  # columns that leave room for numbers


def heat(
    name: str,
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    told: Sequence[Sequence[str]],
    *,
    wrong_off_diagonal: bool = False,
) -> Html:
    """Return a grid of *rows*, a label with shares from 0 to 1 each, whose numbers in words are *told*.

    *wrong_off_diagonal* gives cells off the diagonal the colour of mistakes.
    """
    side = min(WIDEST, (WIDTH_HEAT - LEFT) / len(columns))
    height, letters = min(side, HIGHEST), max(3, int(side / LETTER))
    shapes = [
        words(LEFT + side * (place + 0.5), TOP - 4, shortened(column, letters), "small", "middle")
        for place, column in enumerate(columns)
        if len(columns) <= MOST_NUMBERS or place % 5 == 0
    ]
    for down, (label, shares) in enumerate(rows):
        y = TOP + height * down
        shapes.append(words(LEFT - 5, y + height / 2 + 4, shortened(label, LETTERS_HEAT), "small", "end"))
        for across, share in enumerate(shares):
            kind = "cell wrong" if wrong_off_diagonal and across != down else "cell"
            text = told[down][across]
            x = LEFT + side * across
            shapes.append(
                tag(
                    "g",
                    tag("title", f"{label}, {columns[across]}: {text}"),
                    tag("rect", x=x, y=y, width=side - 1, height=height - 1, class_="empty"),
                    tag("rect", x=x, y=y, width=side - 1, height=height - 1, class_=kind, fill_opacity=share),
                    *number(x + side / 2, y + height / 2 + 4, text, share, len(columns)),
                )
            )
    said = "; ".join(f"{label}: {', '.join(told[place])}" for place, (label, _) in enumerate(rows))
    size = (WIDTH_HEAT, TOP + height * len(rows) + 4)
    return picture(name, title, f"Columns are {', '.join(columns)}. {said}.", size, *shapes)


def number(x: float, y: float, text: str, share: float, columns: int) -> list[Html]:
    """Return the number of a cell where there is room for it and something to say."""
    if columns > MOST_NUMBERS or text == "0":
        return []
    return [words(x, y, text, "small dark" if share > 0.5 else "small", "middle")]


WIDTH_PLOT, LEFT_PLOT, RIGHT, TOP_PLOT, BOTTOM = 360.0, 46.0, 346.0, 44.0, 190.0
KINDS = 6  # ways of drawing a curve; the seventh is drawn as the first
COLUMNS, LINE = 2, 15.0  # of the legend
MOST_POINTS = 12  # that are drawn as points and told one by one
TICK = 34.0  # room that a label below the axis takes

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One curve: its name and its points, from left to right."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """What is measured along an axis; *low* and *high* are its ends where they are not those of the points.

    On a logarithmic axis values that are not above 0 are drawn at its low end.
    """

    unit: str
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None

    def scale(self, values: Sequence[float]) -> "Scale":
        """Return the axis for *values*."""
        shown = [value for value in values if value > 0 or not self.logarithmic] or [1.0]
        low = min(shown) if self.low is None else self.low
        high = max(shown) if self.high is None else self.high
        return Scale(low, high if high > low else low + (abs(low) or 1.0), self.logarithmic)


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis with its ends."""

    low: float
    high: float
    logarithmic: bool

    def share(self, value: float) -> float:
        """Return where *value* lies, 0 at the low end and 1 at the high one."""
        value = min(max(value, self.low), self.high)
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low)

    def between(self, share: float) -> float:
        """Return the value that lies at *share*."""
        if not self.logarithmic:
            return self.low + share * (self.high - self.low)
        return float(self.low * (self.high / self.low) ** share)


def plot(name: str, title: str, lines: Sequence[Curve], across: Axis, up: Axis) -> Html:
    """Return *lines* with a legend above them; each has a point at least."""
    places = sorted({x for line in lines for x, _ in line.points})
    x_scale, y_scale = across.scale(places), up.scale([y for line in lines for _, y in line.points])
    down = LINE * ((len(lines) - 1) // COLUMNS)  # what a longer legend takes

    def at(point: Point) -> Point:
        x, y = x_scale.share(point[0]), y_scale.share(point[1])
        return LEFT_PLOT + x * (RIGHT - LEFT_PLOT), BOTTOM - y * (BOTTOM - TOP_PLOT) + down

    shapes = [
        words(8, TOP_PLOT - 12 + down, up.unit, "small"),
        *grid(y_scale, down),
        *(
            words(at((x, y_scale.low))[0], BOTTOM + 16 + down, f"{x:.3g}", "small", "middle")
            for x in ticks(places, x_scale)
        ),
        words((LEFT_PLOT + RIGHT) / 2, BOTTOM + 32 + down, across.unit, "small", "middle"),
    ]
    for number, line in enumerate(lines):
        shapes += drawn(number, line, [at(point) for point in line.points])
    said = ". ".join(in_words(line) for line in lines)
    size = (WIDTH_PLOT, BOTTOM + 36 + down)
    return picture(name, title, f"In {up.unit}, over {across.unit}. {said}.", size, *shapes)


def grid(scale: Scale, down: float) -> Iterator[Html]:
    """Yield the lines at both ends and in the middle, with their values."""
    for share in (0.0, 0.5, 1.0):
        y = BOTTOM - share * (BOTTOM - TOP_PLOT) + down
        yield join(
            [
                tag("path", d=f"M{LEFT_PLOT} {y:.2f}H{RIGHT}", class_="mark"),
                words(LEFT_PLOT - 4, y + 4, f"{scale.between(share):.3g}", "small", "end"),
            ]
        )


def ticks(places: Sequence[float], scale: Scale) -> list[float]:
    """Return those of the sorted *places* that have room for a label, the last one always."""
    room = TICK / (RIGHT - LEFT_PLOT)
    found: list[float] = []
    for place in reversed(places):
        if not found or scale.share(found[-1]) - scale.share(place) >= room:
            found.append(place)
    return found


def drawn(number: int, line: Curve, points: Sequence[Point]) -> Iterator[Html]:
    """Yield the curve through *points*, and its line in the legend."""
    kind = f"c{number % KINDS}"
    yield tag("path", d="M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points), class_=f"curve {kind}")
    if len(points) <= MOST_POINTS:
        yield from (tag("circle", cx=x, cy=y, r=3, class_=f"point {kind}") for x, y in points)
    x, y = 8 + number % COLUMNS * WIDTH_PLOT / COLUMNS, 8 + number // COLUMNS * LINE
    yield tag("path", d=f"M{x} {y}h22", class_=f"curve {kind}")
    yield words(x + 27, y + 4, shortened(line.name, 24), "small")


def in_words(line: Curve) -> str:
    """Return *line* told: every point of a few, else where it begins and ends."""
    told = line.points if len(line.points) <= MOST_POINTS else (line.points[0], line.points[-1])
    return f"{line.name}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in told)
