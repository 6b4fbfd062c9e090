"""Charts of a training run: losses, accuracies, learning rate, spectra, components, throughput."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, plot
from sopdeploy.html.templates import short_number
from sopdeploy.training.diagnostics import EpochRow, history_table

EPOCHS = Axis("epoch")
MIN_EIGENVALUE = 1e-6  # relative to the largest; smaller ones are rounding errors

Figure = tuple[Markup, str]  # a chart and its caption


def training_context(history: Sequence[EpochRow]) -> dict[str, Any]:
    """Build the template variables that describe the training."""
    columns, rows = history_table(history)
    rates = sorted(row.speed.images_per_second for row in history if row.speed)
    diagnostics = history[-1].diagnostics
    return {
        "learning": _learning_figures(history),
        "branch_images": diagnostics.images if diagnostics and len(_head_names(history)) > 1 else 0,
        "course": _course_figures(history),
        "throughput": short_number(round(rates[len(rates) // 2], 1)) if rates else "",
        "columns": columns,
        "rows": [[f"{row[name]:.5g}" if name in row else "" for name in columns] for row in rows],
        "spectra": _spectrum_figures(history),
        "components": _component_figures(history),
    }


def _curve(history: Sequence[EpochRow], name: str, value: Callable[[EpochRow], float | None]) -> Curve:
    """Build the curve of *value* over the epochs, without the epochs in which it is None."""
    points = ((float(row.epoch), value(row)) for row in history)
    return Curve(name=name, points=tuple((x, y) for x, y in points if y is not None))


def _head_names(history: Sequence[EpochRow]) -> list[str]:
    names = {name for row in history if row.diagnostics for name in row.diagnostics.heads}
    return sorted(names, key=lambda name: (name != "main", name))


def _loss_curve(history: Sequence[EpochRow], part: str) -> Curve:
    return _curve(history, part, lambda row: row.losses.get(part))


def _head_curve(history: Sequence[EpochRow], head: str, metric: str) -> Curve:
    """Build the curve of the `score` or `loss` of *head* over the epochs that recorded it."""
    heads = [(float(row.epoch), row.diagnostics.heads) for row in history if row.diagnostics]
    points = tuple((epoch, getattr(metrics[head], metric)) for epoch, metrics in heads if head in metrics)
    return Curve(name=head, points=points)


def _learning_figures(history: Sequence[EpochRow]) -> list[Figure]:
    """Plot the training losses, and the score and loss of every head on the held-out images."""
    parts = dict.fromkeys(name for row in history for name in row.losses)
    losses = [_loss_curve(history, part) for part in parts]
    heads = _head_names(history)
    branched = heads if len(heads) > 1 else []
    scores = [_curve(history, "deployed", lambda row: row.metrics.score)]
    scores += [_head_curve(history, head, "score") for head in branched]
    held_out = [_curve(history, "deployed", lambda row: row.metrics.loss)]
    held_out += [_head_curve(history, head, "loss") for head in branched]
    score = history[-1].metrics.score_name
    title = "mAP" if score == "mAP" else "Top-1 accuracy"
    return [
        (
            plot("losses", "Training loss", _join_others(losses), EPOCHS, Axis("loss")),
            'Losses of the heads, the penalties, and their weighted sum. "All numbers" lists every branch.',
        ),
        (
            plot("top1", f"{title} on held-out images", _join_others(scores), EPOCHS, Axis(title)),
            f"{title} on held-out images.",
        ),
        (
            plot("held-out-loss", "Loss on held-out images", _join_others(held_out), EPOCHS, Axis("loss")),
            f"If the loss rises and {score} does not fall, the network is overconfident.",
        ),
    ]


def _join_others(curves: Sequence[Curve]) -> list[Curve]:
    """Limit *curves* to `MAX_CURVES`; the last one is the mean of all that were left out."""
    if len(curves) <= MAX_CURVES:
        return list(curves)
    others = curves[MAX_CURVES - 1 :]
    by_epoch: dict[float, list[float]] = {}
    for curve in others:
        for x, y in curve.points:
            by_epoch.setdefault(x, []).append(y)
    points = tuple((x, sum(values) / len(values)) for x, values in sorted(by_epoch.items()))
    return [*curves[: MAX_CURVES - 1], Curve(name=f"{len(others)} other branches: mean", points=points)]


def _course_figures(history: Sequence[EpochRow]) -> list[Figure]:
    rate = _curve(history, "learning rate", lambda row: row.lr)
    gradient = _curve(history, "gradient norm", lambda row: row.gradient)
    waiting = _curve(history, "waiting for data", lambda row: row.speed.data_fraction if row.speed else None)
    series = [
        ("rate", rate, Axis("rate", low=0.0), "At the end of each epoch."),
        ("gradient", gradient, Axis("norm", logarithmic=True), "Mean norm before clipping."),
        (
            "waiting",
            waiting,
            Axis("fraction of the time", low=0.0, high=1.0),
            "If it is high, use more workers or smaller images.",
        ),
    ]
    return [
        (plot(id_, curve.name.capitalize(), [curve], EPOCHS, axis), caption)
        for id_, curve, axis, caption in series
        if len(curve.points) > 1
    ]


def _spectrum_figures(history: Sequence[EpochRow]) -> list[Figure]:
    """Plot the eigenvalues before and after the square root, at the first and the last recorded epoch."""
    recorded = [(row.epoch, row.diagnostics.spectra) for row in history if row.diagnostics]
    figures = []
    for number, name in enumerate(dict.fromkeys(name for _, spectra in recorded for name in spectra)):
        of_layer = [(epoch, spectra[name]) for epoch, spectra in recorded if name in spectra]
        ends = [of_layer[0], of_layer[-1]] if len(of_layer) > 1 else of_layer
        curves = []
        for side in ("before", "after"):
            for epoch, spectrum in ends:
                values = getattr(spectrum, side)
                relative = [value / (values[0] or 1.0) for value in values]
                points = tuple(zip(map(float, spectrum.ranks), relative, strict=True))
                curves.append(Curve(name=f"{side}, epoch {epoch}", points=points))
        x_axis = Axis("rank of the eigenvalue", logarithmic=True)
        y_axis = Axis("relative to the largest", logarithmic=True, low=MIN_EIGENVALUE, high=1.0)
        chart = plot(f"spectrum-{number}", f"Eigenvalues at {name}", curves, x_axis, y_axis)
        figures.append((chart, f"{name}: before and after the square root."))
    return figures


def _component_figures(history: Sequence[EpochRow]) -> list[Figure]:
    """Draw how many training images each component of a gated network received in the last epoch."""
    counts = history[-1].component_counts
    if not counts:
        return []
    usage = [Bar(label=f"component {n}", value=float(c), text=f"{c:,}") for n, c in enumerate(counts)]
    return [(bars("components", "Images per component", usage, float(max(counts))), "In the last epoch.")]
