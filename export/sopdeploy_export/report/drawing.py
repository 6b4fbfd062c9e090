"""The network drawn: what ships runs down the left, what only training needs hangs on its right."""

from collections.abc import Sequence
from dataclasses import dataclass

from sopdeploy.html.markup import Html, figure, join, picture, shape, short, shortened, tag, words
from sopdeploy_export.report.network_summary import NetworkSummary, Part

WIDTH, ROW, BOX = 360, 50, 36
MAIN, SIDE = 196, 226  # where the boxes that ship end, and where those that leave begin
LETTERS, FEW_LETTERS = 19, 15
DOT = "\N{MIDDLE DOT}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One box that ships, of one part or several in a run, and what leaves beside it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    leavers: tuple[Part, ...]


def drawings(network: NetworkSummary) -> Html:
    """Return the network before and after detaching; once where nothing leaves."""
    rows = rows_of(network)
    if not any(row.leavers for row in rows):
        return figure(draw("network", "The network", rows, gone=False), "All of it ships.")
    return tag(
        "div",
        figure(draw("before", "The network while it trains", rows, gone=False), "While it trains."),
        figure(
            draw("after", "The network that ships", rows, gone=True),
            "What ships: the grey, dashed parts were taken off.",
        ),
        class_="pair",
    )


def rows_of(network: NetworkSummary) -> list[Row]:
    """Return the rows of the drawing; parts of one parent in a run without a branch share a box."""
    main = [part for part in network.parts if not part.leaves]
    leavers = [part for part in network.parts if part.leaves]
    rows: list[Row] = []
    run: list[Part] = []
    for position, part in enumerate(main):
        run.append(part)
        beside = tuple(one for one in leavers if (one.source or main[-1].name) == part.name)
        following = main[position + 1].name if position + 1 < len(main) else ""
        if not beside and parent(part.name) and parent(part.name) == parent(following):
            continue
        rows.append(row_of(run, beside))
        run = []
    return rows


def row_of(run: Sequence[Part], beside: tuple[Part, ...]) -> Row:
    """Return the row of a *run* of parts with the leavers *beside* its last one."""
    first, last = run[0], run[-1]
    kinds = sorted({part.kind for part in run})
    return Row(
        name=first.name if len(run) == 1 else f"{first.name} to {last.name.rpartition('.')[2]}",
        kind=", ".join(kinds) if len(run) == 1 else f"{len(run)} {', '.join(kinds)}",
        shape=last.shape,
        parameters=sum(part.parameters for part in run),
        leavers=beside,
    )


def parent(name: str) -> str:
    """Return the name of the part that *name* lies in; empty for a child of the network."""
    return name.rpartition(".")[0]


def draw(name: str, title: str, rows: Sequence[Row], *, gone: bool) -> Html:
    """Return one drawing; *gone* greys what leaves."""
    shapes: list[Html] = [words(MAIN / 2, 12, "images", "small", "middle"), arrow(16, 22)]
    top = 24.0
    for position, row in enumerate(rows):
        if position:
            shapes.append(arrow(top - (ROW - BOX), top - 2))
        shapes.append(shipping_box(top, row))
        for place, leaver in enumerate(row.leavers):
            shapes.append(beside(top, top + place * ROW, leaver, gone=gone))
        below = top + max(1, len(row.leavers)) * ROW
        if below > top + ROW:
            shapes.append(tag("path", d=f"M{MAIN / 2} {top + BOX}V{below - (ROW - BOX)}", class_="flow"))
        top = below
    return picture(name, title, in_words(rows, gone=gone), (WIDTH, top - (ROW - BOX) + 2), *shapes)


def beside(row_top: float, top: float, leaver: Part, *, gone: bool) -> Html:
    """Return the box of a part that leaves, and the line from the box that it starts at."""
    middle, start = top + BOX / 2, row_top + BOX / 2
    line = f"M{MAIN} {start}H{(MAIN + SIDE) / 2}V{middle}H{SIDE}"
    state = "removed" if gone else leaver.kind
    name = leaver.name if len(leaver.name) <= FEW_LETTERS else leaver.name.rpartition(".")[2]
    texts = [
        words(SIDE + 8, top + 15, shortened(name, FEW_LETTERS), "name"),
        words(SIDE + 8, top + 29, shortened(f"{state} {DOT} {short(leaver.parameters)}", 22), "small"),
    ]
    shown = box(SIDE, top, WIDTH - SIDE, "box gone" if gone else "box extra", full(leaver, state), texts)
    return join([tag("path", d=line, class_="flow gone" if gone else "flow"), shown])


def shipping_box(top: float, row: Row) -> Html:
    """Return the box of what ships: name and parameters, under them what it is and its output's shape."""
    texts = [
        words(8, top + 15, shortened(row.name, LETTERS), "name"),
        words(MAIN - 8, top + 15, short(row.parameters), "small", "end"),
        words(8, top + 29, shortened(f"{row.kind} {DOT} {shape(row.shape)}", 32), "small"),
    ]
    return box(0, top, MAIN, "box", full(row, row.kind), texts)


def box(x: float, y: float, width: float, kind: str, title: str, texts: Sequence[Html]) -> Html:
    """Return a box with *texts* in it; *title* is told to who points at it or listens."""
    frame = tag("rect", x=x + 1, y=y, width=width - 2, height=BOX, rx=5)
    return tag("g", tag("title", title), frame, *texts, class_=kind)


def full(what: Row | Part, state: str) -> str:
    """Return all that a box says, unabridged."""
    return f"{what.name}: {state}, output {shape(what.shape)}, {short(what.parameters)} parameters"


def arrow(top: float, bottom: float) -> Html:
    """Return an arrow down the middle of the boxes that ship."""
    return tag("path", d=f"M{MAIN / 2} {top}V{bottom}m-4 -5l4 5l4 -5", class_="flow")


def in_words(rows: Sequence[Row], *, gone: bool) -> str:
    """Return what a drawing shows."""
    order = ", then ".join(row.name for row in rows)
    state = "was taken off" if gone else "starts there and is needed in training only"
    sides = [f"{leaver.name} at {row.name}" for row in rows for leaver in row.leavers]
    return f"In the order of computing: {order}. " + (
        f"Each of these {state}: {', '.join(sides)}." if sides else ""
    )
