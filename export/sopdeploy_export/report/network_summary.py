"""Summarize and draw a network: its modules in order of execution, and where each branch starts.

A forward pass in train mode on the `meta` device shows which module reads the output of which other module.
The summary lists the network's children. If training-only modules read outputs of several modules inside one
child, the children of that child are listed instead. The drawing is an SVG with exported modules in a column
and training-only modules beside it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor, nn

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.html.charts import element, svg, text
from sopdeploy.html.templates import dimensions, short_number, shorten
from sopdeploy.models.base import is_in
from sopdeploy.models.registry import create_model
from sopdeploy.models.stats import Counts, Tally, tally

MAX_DEPTH = 3


class Part(StrictModel):
    """One module of a network, with its parameters and its multiply-adds for one image.

    `shape` is the shape of its output without the batch axis. `source` is the exported module whose output a
    training-only module reads.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    training_only: bool = False
    source: str | None = None


class NetworkSummary(StrictModel):
    """The exported modules in order of execution, then the training-only ones, and the total counts."""

    parts: tuple[Part, ...]
    trained: Counts
    shipped: Counts


class ForwardTrace(NamedTuple):
    """The record of one forward pass.

    `shapes` maps modules, in the order in which they end, to output shapes without the batch axis. `sources`
    maps modules to the module whose output they read.
    """

    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, str]
    costs: Tally


def trace_forward(network: nn.Module, training_only: Collection[str], side: int) -> ForwardTrace:
    """Run *network* on an image of *side* x *side* pixels and record its modules with forward hooks."""
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, str] = {}
    producers: dict[int, str] = {}
    alive: list[Tensor] = []  # an id identifies a tensor only while the tensor lives
    last = [""]  # the exported module that ended last; its output may have passed functions such as silu

    def begin(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = [producers[id(v)] for v in inputs if isinstance(v, Tensor) and id(v) in producers]
        sources.setdefault(name, found[0] if found else last[0])

    def end(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            if not is_in(name, *training_only):
                last[0] = name
            producers.setdefault(id(output), name)  # the innermost module, not those that return its output
            shapes.pop(name, None)
            shapes[name] = tuple(output.shape[1:])

    handles = []
    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(begin, name)))
            handles.append(module.register_forward_hook(partial(end, name)))
    try:
        return ForwardTrace(shapes, sources, tally(network, side))
    finally:
        for handle in handles:
            handle.remove()


def summarize_checkpoint(checkpoint: Checkpoint) -> NetworkSummary:
    """Summarize the network of *checkpoint* at its input size, without allocating memory."""
    with torch.device("meta"):
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
        plain = network.inference_model() if network.training_only else network
    return summarize(network, plain, network.training_only, checkpoint.preprocess.crop)


def summarize(
    network: nn.Module, shipped: nn.Module, training_only: Collection[str], side: int
) -> NetworkSummary:
    """Summarize *network*, and count the costs of *shipped*, the network without its *training_only* parts.

    Both networks run on an image of *side* x *side* pixels, on `meta` or the CPU, and may change between
    train and eval mode. If *network* fails in train mode, for example without targets, it runs in eval mode.
    """
    exported_costs = tally(shipped.eval(), side)
    with torch.random.fork_rng(devices=()):  # dropout draws random numbers
        try:
            trace = trace_forward(network.train(), training_only, side)
        except Exception:  # the network's own code, which can raise anything
            trace = trace_forward(network.eval(), training_only, side)
    trained, branches = trace.costs, _training_only_modules(network, training_only)
    main = _exported_modules(network, branches, trace, training_only)
    modules = dict(network.named_modules())

    def total(counts: Mapping[str, int], name: str) -> int:
        return sum(count for key, count in counts.items() if is_in(key, name))

    parts = []
    for name in main:
        inner = [branch for branch in branches if is_in(branch, name)]
        # The output shape is that of the module inside *name* that ended last.
        shape = [shape for seen, shape in trace.shapes.items() if is_in(seen, name)][-1]
        parameters, macs = (
            total(counts, name) - sum(total(counts, branch) for branch in inner)
            for counts in (trained.parameters, trained.macs)
        )
        kind = type(modules[name]).__name__
        parts.append(Part(name=name, kind=kind, shape=shape, parameters=parameters, macs=macs))
    for name in branches:
        start = trace.sources.get(name, name)
        owners = [owner for owner in main if is_in(name, owner) or is_in(start, owner)]
        parts.append(
            Part(
                name=name,
                kind=type(modules[name]).__name__ if name in modules else "parameter",
                shape=trace.shapes.get(name, ()),
                parameters=total(trained.parameters, name),
                macs=total(trained.macs, name),
                training_only=True,
                source=owners[-1] if owners else None,
            )
        )
    return NetworkSummary(parts=tuple(parts), trained=trained.total(), shipped=exported_costs.total())


def _training_only_modules(network: nn.Module, training_only: Collection[str]) -> list[str]:
    """List the training-only modules, with the children of a container instead of the container."""
    modules, found = dict(network.named_modules()), []
    for name in training_only:
        module = modules.get(name)
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            found += [f"{name}.{child}" for child, _ in module.named_children()]
        else:
            found.append(name)
    return found


def _exported_modules(
    network: nn.Module, branches: Collection[str], trace: ForwardTrace, training_only: Collection[str]
) -> list[str]:
    """List the exported modules that have weights or change the shape, in order of execution."""
    starts = [trace.sources.get(name, "") for name in branches]
    names = [name for name, _ in network.named_children() if name not in training_only]
    for _ in range(MAX_DEPTH):
        split: list[str] = []
        for name in names:  # a module is split into its children if branches start in several of them
            children = [f"{name}.{child}" for child, _ in network.get_submodule(name).named_children()]
            used = [child for child in children if any(is_in(start, child) for start in starts)]
            split += children if len(used) > 1 else [name]
        names = split
    last: dict[str, int] = {}
    for position, seen in enumerate(trace.shapes):
        last.update((name, position) for name in names if is_in(seen, name))
    shown = []
    for name in last:
        changes_shape = trace.shapes.get(name) != trace.shapes.get(trace.sources.get(name, ""))
        if changes_shape or any(True for _ in network.get_submodule(name).parameters()):
            shown.append(name)
    return sorted(shown, key=lambda name: last[name])


WIDTH, ROW_HEIGHT, BOX_HEIGHT = 360, 50, 36
MAIN_WIDTH, SIDE_LEFT = 196, 226
NAME_LENGTH, SIDE_NAME_LENGTH = 19, 15  # characters
DOT = "\N{MIDDLE DOT}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One box of the drawing: exported modules, and the training-only modules that read their output."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    branches: tuple[Part, ...]


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


def draw_network(network: NetworkSummary) -> Markup:
    """Draw *network* from top to bottom, with removed modules beside the ones whose output they read."""
    rows = network_rows(network)
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
        shapes.append(element("g", *_box(0, top, MAIN_WIDTH, row, row.kind), *texts, class_="box"))
        for number, branch in enumerate(row.branches):
            shapes += _draw_branch(top, top + number * ROW_HEIGHT, branch)
        below = top + max(1, len(row.branches)) * ROW_HEIGHT
        if below > top + ROW_HEIGHT:
            shapes.append(element("path", d=f"M{middle} {top + BOX_HEIGHT}V{below - gap}", class_="flow"))
        top = below
    removed = ", ".join(f"{branch.name} at {row.name}" for row in rows for branch in row.branches)
    order = ", then ".join(row.name for row in rows)
    description = f"In order of execution: {order}. " + (f"Removed: {removed}." if removed else "")
    return svg("network", "The network", description, (WIDTH, top - gap + 2), *shapes)


def _draw_branch(row_top: float, top: float, branch: Part) -> list[Markup]:
    """Draw the box of a removed module at *top*, and its line from the row at *row_top*."""
    middle, start = top + BOX_HEIGHT / 2, row_top + BOX_HEIGHT / 2
    line = f"M{MAIN_WIDTH} {start}H{(MAIN_WIDTH + SIDE_LEFT) / 2}V{middle}H{SIDE_LEFT}"
    name = branch.name if len(branch.name) <= SIDE_NAME_LENGTH else branch.name.rpartition(".")[2]
    details = f"removed {DOT} {short_number(branch.parameters)}"
    texts = [
        text(SIDE_LEFT + 8, top + 15, shorten(name, SIDE_NAME_LENGTH), "name"),
        text(SIDE_LEFT + 8, top + 29, shorten(details, 22), "small"),
    ]
    frame = _box(SIDE_LEFT, top, WIDTH - SIDE_LEFT, branch, f"{branch.kind}, removed")
    box = element("g", *frame, *texts, class_="box gone")
    return [element("path", d=line, class_="flow gone"), box]


def _box(x: float, y: float, width: float, what: Row | Part, kind: str) -> list[Markup]:
    """Draw the frame of a box, with the full text as a tooltip."""
    shape, parameters = dimensions(what.shape), short_number(what.parameters)
    title = element("title", f"{what.name}: {kind}, output {shape}, {parameters} parameters")
    return [title, element("rect", x=x + 1, y=y, width=width - 2, height=BOX_HEIGHT, rx=5)]
