"""The charts of a table's page: training curves of its runs, and the contents of the paper's figures."""

import math
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, plot
from sopdeploy.reproduction.results import Reproduction, RowResult, SeedResult
from sopdeploy.reproduction.tables import Figure
from sopdeploy.training.diagnostics import EpochRow

Chart = tuple[Markup, str]  # a chart and its caption
EPOCHS = Axis("epoch")
ERROR = Axis("top-1 error in %")


def curve_charts(reproduction: Reproduction) -> list[Chart]:
    """Plot training loss, top-1 and top-5 error over the epochs: one curve per row, for the first seed."""
    measures: list[tuple[str, str, Callable[[EpochRow], float | None]]] = [
        ("loss", "training loss", lambda row: row.losses.get("loss")),
        ("top1", "top-1 error in %", lambda row: 100 * (1 - row.metrics.top1)),  # type: ignore[union-attr]
        ("top5", "top-5 error in %", lambda row: 100 * (1 - row.metrics.top5)),  # type: ignore[union-attr]
    ]
    done = [row for row in reproduction.rows if row.runs]
    charts = []
    for start in range(0, len(done), MAX_CURVES):
        part = done[start : start + MAX_CURVES]
        for name, label, value in measures:
            curves = [_curve(row.printed.name, row.runs[0].history, value) for row in part]
            title = f"{label.capitalize()} over the epochs"
            charts.append((plot(f"{name}-{start}", title, curves, EPOCHS, Axis(label)), f"{title}, seed 0."))
    return charts


def figure_charts(reproduction: Reproduction, figures: Sequence[Figure]) -> list[Chart]:
    """Draw the charts *figures*, which a table adds to its page, from the finished runs."""
    draw: dict[Figure, Callable[[list[RowResult]], Iterator[Chart]]] = {
        "heads": _head_charts,
        "usage": _usage_charts,
        "alpha": _alpha_chart,
        "grid": _grid_charts,
        "spectra": _condition_charts,
    }
    done = [row for row in reproduction.rows if row.runs]
    return [chart for figure in figures for chart in draw[figure](done)]


def _curve(name: str, history: Sequence[EpochRow], value: Callable[[EpochRow], float | None]) -> Curve:
    points = ((float(row.epoch), value(row)) for row in history)
    return Curve(name=name, points=tuple((x, y) for x, y in points if y is not None))


def _head_charts(rows: list[RowResult]) -> Iterator[Chart]:
    """Plot the errors of the heads over the epochs, and the share of each head in the weighted loss."""
    for row in rows:
        run = row.runs[0]
        if not run.heads:
            continue
        names = [*(name for name in run.heads if name != "main"), "main"]
        if len(names) <= MAX_CURVES:
            curves = [_curve(name, run.history, _head_error(name)) for name in names]
            chart = plot(f"heads-{row.printed.id}", f"Heads of {row.printed.name}", curves, EPOCHS, ERROR)
            count = run.history[-1].diagnostics.images if run.history[-1].diagnostics else 0
            yield chart, f"{row.printed.name}: heads on a fixed subset of {count} held-out images."
        shares = [Bar(label=name, value=run.heads[name].share, text=_percent(run, name)) for name in names]
        title = f"Shares of the heads of {row.printed.name} in the weighted loss"
        yield bars(f"shares-{row.printed.id}", title, shares, 1.0), f"{title}, last epoch."


def _head_error(name: str) -> Callable[[EpochRow], float | None]:
    def error(row: EpochRow) -> float | None:
        heads = row.diagnostics.heads if row.diagnostics is not None else {}
        return 100 * (1 - heads[name].score) if name in heads else None

    return error


def _percent(run: SeedResult, name: str) -> str:
    return f"{run.heads[name].share:.1%}"


def _usage_charts(rows: list[RowResult]) -> Iterator[Chart]:
    """Draw the number of training images that each component receives (GM-SOP, Fig. 2 left)."""
    for row in rows:
        usage = row.runs[0].usage
        if not usage:
            continue
        counts = [
            Bar(label=f"component {number}", value=float(count), text=str(count))
            for number, count in enumerate(usage, 1)
        ]
        title = f"Images per component, {row.printed.name}"
        caption = f"{title}: training images received in the last epoch."
        yield bars(f"usage-{row.printed.id}", title, counts, float(max(usage))), caption


def _alpha_chart(rows: list[RowResult]) -> Iterator[Chart]:
    """Plot the error over alpha, the weight of the balance loss (GM-SOP, Fig. 2 right)."""
    points = [(_option(row, "balance_weight"), row.top1.mean) for row in rows if row.top1 is not None]
    if len(points) > 1:
        curve = Curve(name="measured", points=tuple(sorted(points)))
        chart = plot("alpha", "Error over alpha", [curve], Axis("alpha", logarithmic=True), ERROR)
        yield chart, "Error over alpha, the weight of the balance loss; 0 is at the left end."


def _grid_charts(rows: list[RowResult]) -> Iterator[Chart]:
    """Plot error and training throughput over K, one curve per N (GM-SOP, Fig. 3)."""
    gated = [row for row in rows if row.runs[0].usage]
    values: list[tuple[str, Axis, Callable[[RowResult], float]]] = [
        ("error", ERROR, lambda row: row.top1.mean if row.top1 is not None else 0.0),
        ("throughput", Axis("images/s"), lambda row: row.runs[0].images_per_second),
    ]
    for name, axis, value in values:
        by_n: dict[int, list[tuple[float, float]]] = {}
        for row in gated:
            by_n.setdefault(int(_option(row, "components")), []).append((_option(row, "chosen"), value(row)))
        curves = [Curve(name=f"N = {n}", points=tuple(sorted(points))) for n, points in sorted(by_n.items())]
        if curves:
            title = f"{axis.label} over N and K"
            yield plot(f"grid-{name}", title, curves, Axis("K"), axis), f"{title}, in training."


def _option(row: RowResult, key: str) -> float:
    """Return the option *key* of the network of a gated row."""
    return float(row.runs[0].network[key])


def _condition_charts(rows: list[RowResult]) -> Iterator[Chart]:
    """Draw the condition numbers before and after the matrix functions of every row."""
    entries = []
    for row in rows:
        for name, (before, after) in row.runs[0].condition.items():
            for side, number in (("before", before), ("after", after)):
                label = f"{row.printed.id}, {side}"
                entries.append(
                    Bar(label=label, value=math.log10(max(1.0, number)), text=f"{number:.3g} ({name})")
                )
    if entries:
        title = "Condition numbers of the covariances"
        chart = bars("condition", title, entries, max(entry.value for entry in entries))
        yield chart, f"{title} before and after the square root, at the last recorded epoch; logarithmic."
