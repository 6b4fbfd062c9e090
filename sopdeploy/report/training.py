"""Charts of a training run: losses, accuracies, learning rate, components, throughput."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, plot
from sopdeploy.html.templates import short_number
from sopdeploy.training.diagnostics import EpochRow, history_table, median_throughput

EPOCH_AXIS = Axis("epoch")

Chart = tuple[Markup, str]  # a chart and its caption


def training_context(history: Sequence[EpochRow]) -> dict[str, Any]:
    """Build the template variables that describe the training."""
    columns, rows = history_table(history)
    diagnostics, component_counts = history[-1].diagnostics, history[-1].component_counts
    throughput = median_throughput(history)
    components = []
    if component_counts:
        components.append(component_chart("components", "Images per component", component_counts))
    return {
        "learning": _learning_charts(history),
        "branch_images": diagnostics.images if diagnostics and len(_head_names(history)) > 1 else 0,
        "throughput": short_number(round(throughput, 1)) if throughput else "",
        "columns": columns,
        "rows": [[f"{row[name]:.5g}" if name in row else "" for name in columns] for row in rows],
        "components": components,
    }


def epoch_curve(name: str, history: Sequence[EpochRow], values: Sequence[float | None]) -> Curve:
    """Build the curve of *values*, one for each epoch of *history*; epochs with None are left out."""
    points = ((float(row.epoch), value) for row, value in zip(history, values, strict=True))
    return Curve(name=name, points=tuple((epoch, value) for epoch, value in points if value is not None))


def head_metric(row: EpochRow, head: str, metric: str) -> float | None:
    """Return a metric of `HeadMetrics` of *head*; None if the epoch did not record it."""
    heads = row.diagnostics.heads if row.diagnostics else {}
    return getattr(heads[head], metric) if head in heads else None


def _head_names(history: Sequence[EpochRow]) -> list[str]:
    names = {name for row in history if row.diagnostics for name in row.diagnostics.heads}
    return sorted(names, key=lambda name: (name != "main", name))


def _learning_charts(history: Sequence[EpochRow]) -> list[Chart]:
    """Plot the training losses, and the score and loss of every head on the held-out images."""
    parts = dict.fromkeys(part for row in history for part in row.losses)
    losses = [epoch_curve(part, history, [row.losses.get(part) for row in history]) for part in parts]
    scores = [epoch_curve("deployed", history, [row.metrics.score for row in history])]
    held_out = [epoch_curve("deployed", history, [row.metrics.loss for row in history])]
    heads = _head_names(history)
    for head in heads if len(heads) > 1 else ():
        scores.append(epoch_curve(head, history, [head_metric(row, head, "score") for row in history]))
        held_out.append(epoch_curve(head, history, [head_metric(row, head, "loss") for row in history]))
    score = history[-1].metrics.score_name
    title = "mAP" if score == "mAP" else "Top-1 accuracy"
    return [
        (
            plot("losses", "Training loss", _join_others(losses), EPOCH_AXIS, Axis("loss")),
            'Losses of the heads, the penalties, and their weighted sum. "All numbers" lists every branch.',
        ),
        (
            plot("top1", f"{title} on held-out images", _join_others(scores), EPOCH_AXIS, Axis(title)),
            f"{title} on held-out images.",
        ),
        (
            plot(
                "held-out-loss", "Loss on held-out images", _join_others(held_out), EPOCH_AXIS, Axis("loss")
            ),
            f"If the loss rises and {score} does not fall, the network is overconfident.",
        ),
    ]


def _join_others(curves: list[Curve]) -> list[Curve]:
    """Limit *curves* to `MAX_CURVES`: if there are more, the last curve is the mean of the others."""
    if len(curves) <= MAX_CURVES:
        return curves
    others = curves[MAX_CURVES - 1 :]
    by_epoch: dict[float, list[float]] = {}
    for curve in others:
        for epoch, value in curve.points:
            by_epoch.setdefault(epoch, []).append(value)
    points = tuple((epoch, sum(values) / len(values)) for epoch, values in sorted(by_epoch.items()))
    return [*curves[: MAX_CURVES - 1], Curve(name=f"{len(others)} other branches: mean", points=points)]


def component_chart(id: str, title: str, counts: Sequence[int]) -> Chart:
    """Draw how many training images each component of a gated network received in the last epoch."""
    entries = [
        Bar(label=f"component {number}", value=float(count), text=f"{count:,}")
        for number, count in enumerate(counts)
    ]
    chart = bars(id, title, entries, float(max(counts)))
    return chart, f"{title}: training images received in the last epoch."
