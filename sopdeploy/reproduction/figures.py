"""The charts of a table's page: training curves of its runs, and the contents of the papers' figures."""

import math
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, plot
from sopdeploy.reproduction.plan import Row
from sopdeploy.training.diagnostics import EpochRow

Chart = tuple[Markup, str]  # a chart and its caption
EPOCHS = Axis("epoch")
ERROR = Axis("top-1 error in %")
MEASURES: dict[str, tuple[str, Callable[[EpochRow], float | None]]] = {
    "loss": ("training loss", lambda epoch: epoch.losses.get("loss")),
    "top1": ("top-1 error in %", lambda epoch: 100 * (1 - epoch.metrics.top1)),  # type: ignore[union-attr]
    "top5": ("top-5 error in %", lambda epoch: 100 * (1 - epoch.metrics.top5)),  # type: ignore[union-attr]
}


def curve_charts(rows: Sequence[Row]) -> list[Chart]:
    """Plot training loss, top-1 and top-5 error over the epochs: one curve per row, for the first seed."""
    charts = []
    for start in range(0, len(rows), MAX_CURVES):
        part = rows[start : start + MAX_CURVES]
        for name, (label, value) in MEASURES.items():
            curves = [_curve(row.printed.name, row.runs[0].history, value) for row in part]
            title = f"{label.capitalize()} over the epochs"
            charts.append((plot(f"{name}-{start}", title, curves, EPOCHS, Axis(label)), f"{title}, seed 0."))
    return charts


def row_charts(rows: Sequence[Row]) -> list[Chart]:
    """Draw heads, components and condition numbers of the first run of each row that has them."""
    charts: list[Chart] = []
    for row in rows:
        charts += _head_charts(row)
        if row.runs[0].usage:
            charts.append(_usage_chart(row))
    gated = [row for row in rows if row.runs[0].usage]
    return [*charts, *_alpha_chart(gated), *_grid_charts(gated), *_condition_chart(rows)]


def _curve(name: str, history: Sequence[EpochRow], value: Callable[[EpochRow], float | None]) -> Curve:
    points = ((float(epoch.epoch), value(epoch)) for epoch in history)
    return Curve(name=name, points=tuple((x, y) for x, y in points if y is not None))


def _head_charts(row: Row) -> Iterator[Chart]:
    """Plot the errors of the heads over the epochs, and the share of each head in the weighted loss."""
    run = row.runs[0]
    names = sorted(run.heads, key=lambda name: name == "main")  # the network's own head is the last one
    if not names:
        return
    recorded = [(float(epoch.epoch), epoch.diagnostics) for epoch in run.history if epoch.diagnostics]
    if len(names) <= MAX_CURVES and recorded:
        count = recorded[-1][1].images
        for key in ("top1", "top5"):
            curves = []
            for name in names:
                points = (
                    (epoch, 100 * (1 - getattr(diagnostics.heads[name], key)))
                    for epoch, diagnostics in recorded
                    if name in diagnostics.heads
                )
                curves.append(Curve(name=name, points=tuple(points)))
            label, title = MEASURES[key][0], f"Heads of {row.printed.name}"
            chart = plot(f"heads-{key}-{row.printed.id}", title, curves, EPOCHS, Axis(label))
            yield chart, f"{title}: {label} on a fixed subset of {count} held-out images."
    shares = {name: run.heads[name].share for name in names}
    entries = [Bar(label=name, value=share, text=f"{share:.1%}") for name, share in shares.items()]
    title = f"Shares of the heads of {row.printed.name} in the weighted loss"
    yield bars(f"shares-{row.printed.id}", title, entries, 1.0), f"{title}, last epoch."


def _usage_chart(row: Row) -> Chart:
    """Draw the number of training images that each component receives (GM-SOP, Fig. 2 left)."""
    usage = row.runs[0].usage
    counts = [
        Bar(label=f"component {number}", value=float(count), text=str(count))
        for number, count in enumerate(usage, 1)
    ]
    title = f"Images per component, {row.printed.name}"
    chart = bars(f"usage-{row.printed.id}", title, counts, float(max(usage)))
    return chart, f"{title}: training images received in the last epoch."


def _alpha_chart(rows: Sequence[Row]) -> Iterator[Chart]:
    """Plot the error over alpha, the weight of the balance loss (GM-SOP, Fig. 2 right)."""
    points = {(_option(row, "balance_weight"), row.top1.mean) for row in rows if row.top1 is not None}
    if len({alpha for alpha, _ in points}) > 1:
        curve = Curve(name="measured", points=tuple(sorted(points)))
        chart = plot("alpha", "Error over alpha", [curve], Axis("alpha", logarithmic=True), ERROR)
        yield chart, "Error over alpha, the weight of the balance loss; 0 is at the left end."


def _grid_charts(rows: Sequence[Row]) -> Iterator[Chart]:
    """Plot error and training throughput over K, one curve per N (GM-SOP, Fig. 3)."""
    by_n: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (_option(row, "components"), _option(row, "chosen"))):
        by_n.setdefault(int(_option(row, "components")), []).append(row)
    if len({(_option(row, "components"), _option(row, "chosen")) for row in rows}) < 2:
        return
    values: list[tuple[str, Axis, Callable[[Row], float]]] = [
        ("error", ERROR, lambda row: row.top1.mean if row.top1 is not None else 0.0),
        ("throughput", Axis("images/s"), lambda row: row.runs[0].images_per_second),
    ]
    for name, axis, value in values:
        curves = []
        for n, members in by_n.items():
            points = tuple((_option(row, "chosen"), value(row)) for row in members)
            curves.append(Curve(name=f"N = {n}", points=points))
        title = f"{axis.label} over N and K"
        yield plot(f"grid-{name}", title, curves, Axis("K"), axis), f"{title}, in training."


def _option(row: Row, key: str) -> float:
    """Return the option *key* of the network of a gated row."""
    return float(row.runs[0].network[key])


def _condition_chart(rows: Sequence[Row]) -> Iterator[Chart]:
    """Draw the condition numbers before and after the matrix functions of every row."""
    entries = []
    for row in rows:
        for name, numbers in row.runs[0].condition.items():
            for when, number in zip(("before", "after"), numbers, strict=True):
                label, logarithm = f"{row.printed.id}, {when}", math.log10(max(1.0, number))
                entries.append(Bar(label=label, value=logarithm, text=f"{number:.3g} ({name})"))
    if entries:
        title = "Condition numbers of the covariances"
        chart = bars("condition", title, entries, max(entry.value for entry in entries))
        yield chart, f"{title} before and after the square root, at the last recorded epoch; logarithmic."
