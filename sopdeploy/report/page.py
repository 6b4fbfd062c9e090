"""Write the report of a run: one self-contained HTML page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import ClassificationReport
from sopdeploy.files import atomic_write
from sopdeploy.html.charts import MAX_CURVES, Axis, Bar, Curve, bars, plot
from sopdeploy.html.templates import render, short_number
from sopdeploy.report.predictions import predictions_context, score_tiles
from sopdeploy.report.run_data import RunData, read_run
from sopdeploy.training.diagnostics import EpochRow, history_table, median_throughput
from sopdeploy.training.epoch_choice import LoopResult, estimate_best
from sopdeploy.training.procedure import read_result
from sopdeploy.training.procedure_config import ProcedureResult
from sopdeploy.training.recipe import flatten

EPOCH_AXIS = Axis("epoch")

Chart = tuple[Markup, str]  # a chart and its caption


def write_run_report(
    run: Path,
    destination: Path | None = None,
    *,
    data: Path | None = None,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Path:
    """Write the report of the run in the folder *run* and return its path.

    The default *destination* is `report.html` in *run*. *data* is a folder with one subfolder per class; by
    default the held-out images are evaluated. Raises `ConfigError` if the page cannot be written.
    """
    path = destination or run / "report.html"
    page = _render_report(read_run(run, data, on_image))
    try:
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another file") from error
    return path


def _render_report(data: RunData) -> str:
    """Render the page as HTML; the same data always gives the same text."""
    recipe, best, record = data.recipe, data.best, data.best.training
    result = read_result(record) or estimate_best(data.history, frozen_backbone=recipe.frozen_backbone)
    tiles = {
        **score_tiles(result),
        "seed": str(recipe.seed),
        "time": f"{data.history[-1].seconds:.0f} s",
    }
    if data.predictions is not None and isinstance(data.predictions.metrics, ClassificationReport):
        tiles["calibration error"] = f"{data.predictions.metrics.calibration.error:.4f}"
    values = [*flatten(recipe.model_dump(mode="json")), *flatten(best.config, "network.")]
    environment = {f"{name} version": version for name, version in record.get("versions", {}).items()}
    environment |= record.get("machine", {})
    environment["weights in best.pt"] = f"{record.get('weights', 'raw')}, of epoch {record.get('epoch')}"
    return render(
        "sopdeploy.report",
        "run.html",
        recipe=recipe,
        model=best.model,
        training=_describe_training(data, result),
        labels=best.labels,
        result=result,
        history=data.history,
        tiles=tiles,
        decision=[] if best.decision is None else best.decision.rows(best.labels),
        reason=data.reason,
        wrong_labels=data.wrong_labels,
        groups=data.groups,
        recipe_values=[
            (key, value)
            for key, value in values
            if recipe.procedure.reads(key) and key != "summary" and not key.startswith("model.config.")
        ],
        environment=list(environment.items()),
        **training_context(data.history),
        **predictions_context(data.predictions),
    )


def _describe_training(data: RunData, result: ProcedureResult) -> str:
    """Describe in a sentence what was trained: the start weights, the images and the procedure."""
    start, side = data.best.training.get("start"), data.recipe.preprocess.crop
    weights = "random weights" if start is None else f"the weights of {start['file']} ({start['network']})"
    epochs, finished = data.recipe.epochs, len(data.history)
    how = f"by the {result.kind.replace('_', '-')} procedure"
    if isinstance(result, LoopResult):
        how = f"for {epochs} epoch{'s' * (epochs > 1)}"
        if finished < epochs:
            how += f" (in progress: {finished} finished)"
    images = f"{data.train_count} images, scaled to {side} x {side} pixels"
    return f"Trained from {weights} on {images}, {how}."


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
        "branch_images": diagnostics.num_images if diagnostics and len(_head_names(history)) > 1 else 0,
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
