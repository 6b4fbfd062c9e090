"""Draw the network as SVG: exported modules in a column, training-only modules beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sopdeploy.html.charts import element, svg, text
from sopdeploy.html.templates import dimensions, short_number, shorten
from sopdeploy_export.report.network_summary import NetworkSummary, Part

WIDTH, ROW_HEIGHT, BOX_HEIGHT = 360, 50, 36
MAIN_WIDTH, SIDE_LEFT = 196, 226
NAME_LENGTH, SIDE_NAME_LENGTH = 19, 15  # characters
DOT = "\N{MIDDLE DOT}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One box of exported modules, and the training-only modules that start there."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    branches: tuple[Part, ...]


def draw_network(network: NetworkSummary) -> list[tuple[Markup, str]]:
    """Draw *network* before and after detaching, with captions; once if nothing is removed."""
    rows = network_rows(network)
    if not any(row.branches for row in rows):
        return [(_draw("network", "The network", rows, detached=False), "All modules are exported.")]
    return [
        (_draw("before", "The network during training", rows, detached=False), "During training."),
        (
            _draw("after", "The exported network", rows, detached=True),
            "As exported: the gray, dashed modules were removed.",
        ),
    ]


def network_rows(network: NetworkSummary) -> list[Row]:
    """Group the exported modules into rows; siblings without a branch between them share a row."""
    main = [part for part in network.parts if not part.training_only]
    branches = [part for part in network.parts if part.training_only]
    rows: list[Row] = []
    run: list[Part] = []
    for position, part in enumerate(main):
        run.append(part)
        starting = tuple(one for one in branches if (one.source or main[-1].name) == part.name)
        parent = part.name.rpartition(".")[0]
        following = main[position + 1].name.rpartition(".")[0] if position + 1 < len(main) else ""
        if not starting and parent and parent == following:
            continue
        kinds = ", ".join(sorted({one.kind for one in run}))
        single = len(run) == 1
        rows.append(
            Row(
                name=part.name if single else f"{run[0].name} to {part.name.rpartition('.')[2]}",
                kind=kinds if single else f"{len(run)} {kinds}",
                shape=part.shape,
                parameters=sum(one.parameters for one in run),
                branches=starting,
            )
        )
        run = []
    return rows


def _draw(id: str, title: str, rows: Sequence[Row], *, detached: bool) -> Markup:
    """Draw *rows* from top to bottom; *detached* grays the training-only modules."""
    middle = MAIN_WIDTH / 2

    def arrow(top: float, bottom: float) -> Markup:
        return element("path", d=f"M{middle} {top}V{bottom}m-4 -5l4 5l4 -5", class_="flow")

    shapes: list[Markup] = [text(middle, 12, "images", "small", "middle"), arrow(16, 22)]
    top, gap = 24.0, ROW_HEIGHT - BOX_HEIGHT
    for position, row in enumerate(rows):
        if position:
            shapes.append(arrow(top - gap, top - 2))
        texts = [
            text(8, top + 15, shorten(row.name, NAME_LENGTH), "name"),
            text(MAIN_WIDTH - 8, top + 15, short_number(row.parameters), "small", "end"),
            text(8, top + 29, shorten(f"{row.kind} {DOT} {dimensions(row.shape)}", 32), "small"),
        ]
        shapes.append(_box(0, top, MAIN_WIDTH, "box", _full_text(row, row.kind), texts))
        for number, branch in enumerate(row.branches):
            shapes += _draw_branch(top, top + number * ROW_HEIGHT, branch, detached=detached)
        below = top + max(1, len(row.branches)) * ROW_HEIGHT
        if below > top + ROW_HEIGHT:
            shapes.append(element("path", d=f"M{middle} {top + BOX_HEIGHT}V{below - gap}", class_="flow"))
        top = below
    sides = ", ".join(f"{branch.name} at {row.name}" for row in rows for branch in row.branches)
    state = "Removed" if detached else "Only for training"
    order = ", then ".join(row.name for row in rows)
    description = f"In order of execution: {order}. " + (f"{state}: {sides}." if sides else "")
    return svg(id, title, description, (WIDTH, top - gap + 2), *shapes)


def _draw_branch(row_top: float, top: float, branch: Part, *, detached: bool) -> list[Markup]:
    """Draw the box of a training-only module at *top*, and its line from the row at *row_top*."""
    middle, start = top + BOX_HEIGHT / 2, row_top + BOX_HEIGHT / 2
    line = f"M{MAIN_WIDTH} {start}H{(MAIN_WIDTH + SIDE_LEFT) / 2}V{middle}H{SIDE_LEFT}"
    state = "removed" if detached else branch.kind
    name = branch.name if len(branch.name) <= SIDE_NAME_LENGTH else branch.name.rpartition(".")[2]
    details = f"{state} {DOT} {short_number(branch.parameters)}"
    texts = [
        text(SIDE_LEFT + 8, top + 15, shorten(name, SIDE_NAME_LENGTH), "name"),
        text(SIDE_LEFT + 8, top + 29, shorten(details, 22), "small"),
    ]
    kind = "box gone" if detached else "box extra"
    box = _box(SIDE_LEFT, top, WIDTH - SIDE_LEFT, kind, _full_text(branch, state), texts)
    return [element("path", d=line, class_="flow gone" if detached else "flow"), box]


def _box(x: float, y: float, width: float, class_: str, title: str, texts: Sequence[Markup]) -> Markup:
    frame = element("rect", x=x + 1, y=y, width=width - 2, height=BOX_HEIGHT, rx=5)
    return element("g", element("title", title), frame, *texts, class_=class_)


def _full_text(what: Row | Part, state: str) -> str:
    shape, parameters = dimensions(what.shape), short_number(what.parameters)
    return f"{what.name}: {state}, output {shape}, {parameters} parameters"
