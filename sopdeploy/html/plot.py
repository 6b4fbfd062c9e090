"""Curves over an axis, linear or logarithmic, that fit a telephone; told apart by more than colour."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sopdeploy.html.markup import Html, join, picture, shortened, tag, words

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360.0, 46.0, 346.0, 44.0, 190.0
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
        return LEFT + x * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP) + down

    shapes = [
        words(8, TOP - 12 + down, up.unit, "small"),
        *grid(y_scale, down),
        *(
            words(at((x, y_scale.low))[0], BOTTOM + 16 + down, f"{x:.3g}", "small", "middle")
            for x in ticks(places, x_scale)
        ),
        words((LEFT + RIGHT) / 2, BOTTOM + 32 + down, across.unit, "small", "middle"),
    ]
    for number, line in enumerate(lines):
        shapes += drawn(number, line, [at(point) for point in line.points])
    said = ". ".join(in_words(line) for line in lines)
    size = (WIDTH, BOTTOM + 36 + down)
    return picture(name, title, f"In {up.unit}, over {across.unit}. {said}.", size, *shapes)


def grid(scale: Scale, down: float) -> Iterator[Html]:
    """Yield the lines at both ends and in the middle, with their values."""
    for share in (0.0, 0.5, 1.0):
        y = BOTTOM - share * (BOTTOM - TOP) + down
        yield join(
            [
                tag("path", d=f"M{LEFT} {y:.2f}H{RIGHT}", class_="mark"),
                words(LEFT - 4, y + 4, f"{scale.between(share):.3g}", "small", "end"),
            ]
        )


def ticks(places: Sequence[float], scale: Scale) -> list[float]:
    """Return those of the sorted *places* that have room for a label, the last one always."""
    room = TICK / (RIGHT - LEFT)
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
    x, y = 8 + number % COLUMNS * WIDTH / COLUMNS, 8 + number // COLUMNS * LINE
    yield tag("path", d=f"M{x} {y}h22", class_=f"curve {kind}")
    yield words(x + 27, y + 4, shortened(line.name, 24), "small")


def in_words(line: Curve) -> str:
    """Return *line* told: every point of a few, else where it begins and ends."""
    told = line.points if len(line.points) <= MOST_POINTS else (line.points[0], line.points[-1])
    return f"{line.name}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in told)
