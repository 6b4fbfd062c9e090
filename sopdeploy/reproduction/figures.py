"""The charts of a table's page: the figures of the papers, training curves, and what the runs record."""

from collections.abc import Iterator, Sequence

from sopdeploy.html.plots import Points, bars, plot
from sopdeploy.html.report import Figure
from sopdeploy.report.page import component_chart, epoch_curve, head_metric
from sopdeploy.reproduction.plan import ReproducedRow
from sopdeploy.reproduction.tables import PrintedTable

_ERRORS = {"top1": "top-1 error in %", "top5": "top-5 error in %"}


def curve_charts(rows: Sequence[ReproducedRow]) -> Iterator[Figure]:
    """Plot training loss, top-1 and top-5 error over the epochs: one curve per row, for the first seed."""
    curves: dict[str, dict[str, Points]] = {"training loss": {}, **{label: {} for label in _ERRORS.values()}}
    for row in rows:
        history, name = row.runs[0].history, row.printed.name
        curves["training loss"][name] = epoch_curve(history, [epoch.losses.get("loss") for epoch in history])
        for metric, label in _ERRORS.items():
            errors = [_percent_wrong(getattr(epoch.metrics, metric)) for epoch in history]
            curves[label][name] = epoch_curve(history, errors)
    for label, drawn in curves.items() if rows else ():
        title = f"{label.capitalize()} over the epochs, seed 0."
        yield Figure(image=plot(drawn, "epoch", label), caption=title)


def table_charts(table: PrintedTable, rows: Sequence[ReproducedRow]) -> Iterator[Figure]:
    """Draw *table* as the paper's chart: errors over an option of the networks, or the times of layers."""
    values: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        options = row.runs[0].network if row.runs else {}
        if table.over in options and row.top1 is not None:
            name = f"{table.curve} = {options[table.curve]}" if table.curve else "measured"
            values.setdefault(name, []).append((float(options[table.over]), row.top1.mean))
    used = {x for points in values.values() for x, _ in points}
    if len(used) > 1:
        curves = {name: sorted(points) for name, points in values.items()}
        chart = plot(curves, table.over, _ERRORS["top1"], logarithmic=max(used) > 100 * min(used))
        yield Figure(image=chart, caption=f"Top-1 error over {table.over}, {table.title}.")
    timed = [row for row in rows if row.printed.layer is not None and row.facts]
    for name in timed[0].facts if timed else ():
        chart = bars({row.printed.name: row.facts[name] for row in timed}, name)
        yield Figure(image=chart, caption=f"{name}, measured here.")


def row_charts(rows: Sequence[ReproducedRow]) -> Iterator[Figure]:
    """Draw the heads and the components of the first run of each row that has them."""
    for row in rows:
        yield from _head_charts(row)
        if row.runs[0].usage:
            yield component_chart(row.runs[0].usage, f"Images per component, {row.printed.name}")


def _head_charts(row: ReproducedRow) -> Iterator[Figure]:
    """Plot the errors of the heads over the epochs, and the share of each head in the weighted loss."""
    run = row.runs[0]
    heads = sorted(run.heads, key=lambda head: head == "main")  # the network's own head is the last one
    if not heads:
        return
    diagnostics = run.history[-1].diagnostics
    subset = diagnostics.num_images if diagnostics is not None else 0
    for metric, label in _ERRORS.items() if subset else ():
        errors = {head: [_percent_wrong(head_metric(e, head, metric)) for e in run.history] for head in heads}
        curves = {head: epoch_curve(run.history, values) for head, values in errors.items()}
        caption = f"Heads of {row.printed.name}: {label} on a fixed subset of {subset} held-out images."
        yield Figure(image=plot(curves, "epoch", label), caption=caption)
    shares = {head: run.heads[head].share for head in heads}
    caption = f"Shares of the heads of {row.printed.name} in the weighted loss, last epoch."
    yield Figure(image=bars(shares, "share"), caption=caption)


def _percent_wrong(accuracy: float | None) -> float | None:
    return None if accuracy is None else 100 * (1 - accuracy)
