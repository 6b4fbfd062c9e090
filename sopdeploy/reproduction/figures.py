"""The charts of a table's page: the figures of the papers, training curves, and what the runs record."""

from collections.abc import Iterator, Sequence

from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, plot
from sopdeploy.report.page import EPOCH_AXIS, Chart, component_chart, epoch_curve, head_metric
from sopdeploy.reproduction.plan import ReproducedRow
from sopdeploy.reproduction.tables import PrintedTable

_ERRORS = {"top1": "top-1 error in %", "top5": "top-5 error in %"}


def curve_charts(rows: Sequence[ReproducedRow]) -> list[Chart]:
    """Plot training loss, top-1 and top-5 error over the epochs: one curve per row, for the first seed."""
    charts = []
    for start in range(0, len(rows), MAX_CURVES):
        part = rows[start : start + MAX_CURVES]
        for name, label in {"loss": "training loss", **_ERRORS}.items():
            curves = []
            for row in part:
                history = row.runs[0].history
                if name == "loss":
                    values = [epoch.losses.get("loss") for epoch in history]
                else:
                    values = [_percent_wrong(getattr(epoch.metrics, name)) for epoch in history]
                curves.append(epoch_curve(row.printed.name, history, values))
            title = f"{label.capitalize()} over the epochs"
            charts.append(
                (plot(f"{name}-{start}", title, curves, EPOCH_AXIS, Axis(label)), f"{title}, seed 0.")
            )
    return charts


def table_charts(table: PrintedTable, rows: Sequence[ReproducedRow]) -> Iterator[Chart]:
    """Draw *table* as the paper's chart: errors over an option of the networks, or the times of layers."""
    values: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        options = row.runs[0].network if row.runs else {}
        if table.over in options and row.top1 is not None:
            name = f"{table.curve} = {options[table.curve]}" if table.curve else "measured"
            values.setdefault(name, []).append((float(options[table.over]), row.top1.mean))
    used = {x for points in values.values() for x, _ in points}
    if len(used) > 1:
        curves = [Curve(name=name, points=tuple(sorted(points))) for name, points in values.items()]
        x_axis = Axis(table.over, logarithmic=max(used) > 100 * min(used))
        title = f"Top-1 error over {table.over}"
        yield plot("over", title, curves, x_axis, Axis(_ERRORS["top1"])), f"{title}, {table.title}."
    timed = [row for row in rows if row.printed.layer is not None and row.facts]
    for number, name in enumerate(timed[0].facts if timed else ()):
        entries = [
            Bar(label=row.printed.name, value=row.facts[name], text=f"{row.facts[name]:.3g}") for row in timed
        ]
        largest = max(entry.value for entry in entries)
        yield bars(f"times-{number}", name, entries, largest), f"{name}, measured here."


def row_charts(rows: Sequence[ReproducedRow]) -> list[Chart]:
    """Draw the heads and the components of the first run of each row that has them."""
    charts: list[Chart] = []
    for row in rows:
        charts += _head_charts(row)
        if row.runs[0].usage:
            title = f"Images per component, {row.printed.name}"
            charts.append(component_chart(f"usage-{row.printed.id}", title, row.runs[0].usage))
    return charts


def _head_charts(row: ReproducedRow) -> Iterator[Chart]:
    """Plot the errors of the heads over the epochs, and the share of each head in the weighted loss."""
    run, row_id = row.runs[0], row.printed.id
    heads = sorted(run.heads, key=lambda head: head == "main")  # the network's own head is the last one
    if not heads:
        return
    diagnostics = run.history[-1].diagnostics
    if len(heads) <= MAX_CURVES and diagnostics is not None:
        for name, label in _ERRORS.items():
            curves = [
                epoch_curve(
                    head,
                    run.history,
                    [_percent_wrong(head_metric(epoch, head, name)) for epoch in run.history],
                )
                for head in heads
            ]
            title = f"Heads of {row.printed.name}"
            caption = f"{title}: {label} on a fixed subset of {diagnostics.num_images} held-out images."
            yield plot(f"heads-{name}-{row_id}", title, curves, EPOCH_AXIS, Axis(label)), caption
    shares = {head: run.heads[head].share for head in heads}
    entries = [Bar(label=head, value=share, text=f"{share:.1%}") for head, share in shares.items()]
    title = f"Shares of the heads of {row.printed.name} in the weighted loss"
    yield bars(f"shares-{row_id}", title, entries, 1.0), f"{title}, last epoch."


def _percent_wrong(accuracy: float | None) -> float | None:
    return None if accuracy is None else 100 * (1 - accuracy)
