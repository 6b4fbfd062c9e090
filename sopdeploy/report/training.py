"""Charts of a training run: losses, accuracies, learning rate, spectra, gates, throughput."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, heat, plot
from sopdeploy.html.templates import short_number
from sopdeploy.training.diagnostics import EpochRow, GateMetrics, history_table

EPOCHS = Axis("epoch")
MIN_EIGENVALUE = 1e-6  # relative to the largest; smaller ones are rounding errors
MAX_COLUMNS = 24  # epochs shown in the chart of a gate's usage

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
        "gates": _gate_figures(history),
    }


def _curve(history: Sequence[EpochRow], name: str, value: Callable[[EpochRow], float | None]) -> Curve:
    """Build the curve of *value* over the epochs, without the epochs in which it is None."""
    points = ((float(row.epoch), value(row)) for row in history)
    return Curve(name=name, points=tuple((x, y) for x, y in points if y is not None))


def _head_names(history: Sequence[EpochRow]) -> list[str]:
    names = {name for row in history if row.diagnostics for name in row.diagnostics.heads}
    return sorted(names, key=lambda name: (name != "main", name))


def _learning_figures(history: Sequence[EpochRow]) -> list[Figure]:
    """Plot the training losses, and the score and loss of every head on the held-out images."""
    losses = []
    for name in dict.fromkeys(name for row in history for name in row.losses):
        points = tuple((float(row.epoch), row.losses[name]) for row in history if name in row.losses)
        losses.append(Curve(name=name, points=points))
    scores = [_curve(history, "deployed", lambda row: row.metrics.score)]
    held_out = [_curve(history, "deployed", lambda row: row.metrics.loss)]
    heads = _head_names(history)
    for head in heads if len(heads) > 1 else ():
        recorded = [(row.epoch, row.diagnostics.heads) for row in history if row.diagnostics]
        rows = [(float(epoch), metrics[head]) for epoch, metrics in recorded if head in metrics]
        scores.append(Curve(name=head, points=tuple((epoch, metrics.score) for epoch, metrics in rows)))
        held_out.append(Curve(name=head, points=tuple((epoch, metrics.loss) for epoch, metrics in rows)))
    score = history[-1].metrics.score_name
    title, label = ("mAP", "mAP") if score == "mAP" else ("Top-1 accuracy", "top-1 accuracy")
    return [
        (
            plot("losses", "Training loss", _join_others(losses), EPOCHS, Axis("loss")),
            'Losses of the heads, the penalties, and their weighted sum. "All numbers" lists every branch.',
        ),
        (
            plot("top1", f"{title} on held-out images", _join_others(scores), EPOCHS, Axis(label)),
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
    series: list[tuple[str, str, Callable[[EpochRow], float | None], Axis, str]] = [
        ("rate", "Learning rate", lambda row: row.lr, Axis("rate", low=0.0), "At the end of each epoch."),
        (
            "gradient",
            "Gradient norm",
            lambda row: row.gradient,
            Axis("norm", logarithmic=True),
            "Mean norm before clipping.",
        ),
        (
            "waiting",
            "Waiting for data",
            lambda row: row.speed.data_fraction if row.speed else None,
            Axis("fraction of the time", low=0.0, high=1.0),
            "If it is high, use more workers or smaller images.",
        ),
    ]
    figures = []
    for id_, title, value, axis, caption in series:
        curve = _curve(history, title.lower(), value)
        if len(curve.points) > 1:
            figures.append((plot(id_, title, [curve], EPOCHS, axis), caption))
    return figures


def _spectrum_figures(history: Sequence[EpochRow]) -> list[Figure]:
    """Plot the eigenvalues before and after the square root, at the first and the last recorded epoch."""
    recorded = [
        (row.epoch, row.diagnostics.spectra) for row in history if row.diagnostics and row.diagnostics.spectra
    ]
    figures = []
    for number, name in enumerate(dict.fromkeys(name for _, spectra in recorded for name in spectra)):
        of_layer = [(epoch, spectra[name]) for epoch, spectra in recorded if name in spectra]
        ends = [of_layer[0], of_layer[-1]] if len(of_layer) > 1 else of_layer
        curves = [
            Curve(
                name=f"{side}, epoch {epoch}",
                points=tuple(
                    (float(rank), value / (values[0] or 1.0))
                    for rank, value in zip(spectrum.ranks, values, strict=True)
                ),
            )
            for side in ("before", "after")
            for epoch, spectrum in ends
            for values in [getattr(spectrum, side)]
        ]
        chart = plot(
            f"spectrum-{number}",
            f"Eigenvalues at {name}",
            curves,
            Axis("rank of the eigenvalue", logarithmic=True),
            Axis("relative to the largest", logarithmic=True, low=MIN_EIGENVALUE, high=1.0),
        )
        figures.append((chart, f"{name}: before and after the square root."))
    return figures


def _gate_figures(history: Sequence[EpochRow]) -> list[list[Figure]]:
    """Draw, for each gate, its usage after the last epoch, its usage over the epochs, and its imbalance."""
    recorded = [
        (row.epoch, row.diagnostics.gates) for row in history if row.diagnostics and row.diagnostics.gates
    ]
    groups = []
    for number, name in enumerate(recorded[-1][1] if recorded else ()):
        of_gate: list[tuple[int, GateMetrics]] = [
            (epoch, gates[name]) for epoch, gates in recorded if name in gates
        ]
        usage = of_gate[-1][1].chosen
        components = [f"component {index}" for index in range(len(usage))]
        rows = [
            Bar(label=label, value=fraction, text=f"{fraction:.0%}")
            for label, fraction in zip(components, usage, strict=True)
        ]
        shown = of_gate[:: -(-len(of_gate) // MAX_COLUMNS)]
        grid = [(label, [gate.chosen[i] for _, gate in shown]) for i, label in enumerate(components)]
        texts = [[f"{round(100 * fraction)}" for fraction in fractions] for _, fractions in grid]
        epochs = [str(epoch) for epoch, _ in shown]
        imbalance = Curve(name=name, points=tuple((float(epoch), gate.imbalance) for epoch, gate in of_gate))
        groups.append(
            [
                (
                    bars(f"gate-{number}", f"Usage of the components of {name}", rows, 1.0),
                    f"{name}: fraction of images that select each component after the last epoch.",
                ),
                (
                    heat(f"gate-time-{number}", "Usage over the epochs", grid, epochs, texts),
                    "Percent of the images by epoch.",
                ),
                (
                    plot(
                        f"imbalance-{number}",
                        "Imbalance",
                        [imbalance],
                        EPOCHS,
                        Axis("(deviation / mean) squared", low=0.0),
                    ),
                    "Imbalance of the weights.",
                ),
            ]
        )
    return groups
