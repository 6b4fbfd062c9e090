"""Charts and tables of the predictions: accuracy, classes, confusions, calibration."""

from typing import Any

from markupsafe import Markup

from sopdeploy.evaluation.metrics import ClassificationReport
from sopdeploy.evaluation.multi_label import MultiLabelReport
from sopdeploy.html.charts import Axis, Curve, heat, interval, plot
from sopdeploy.html.templates import percent
from sopdeploy.report.run_data import Predictions
from sopdeploy.training.epoch_choice import HeldOutEstimate

MAX_MATRIX_CLASSES = 30
MAX_CONFUSIONS = 15


def predictions_context(predictions: Predictions | None) -> dict[str, Any]:
    """Build the template variables that describe *predictions*, which is None if there are no images."""
    if predictions is None:
        return {"predictions": None}
    metrics = predictions.metrics
    if isinstance(metrics, MultiLabelReport):
        return _multi_label_context(predictions, metrics)
    top1, top5 = metrics.top1, metrics.top5
    intervals = [
        f"{percent(rate.share, 2)} ({percent(rate.low)} to {percent(rate.high)})" for rate in (top1, top5)
    ]
    names = [row.label for row in metrics.classes]
    frequent = sorted(
        (-count, names[true], names[predicted])
        for true, row in enumerate(metrics.confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    )
    return {
        "predictions": predictions,
        "multi_label": False,
        "metrics": metrics,
        "accuracy": interval("accuracy", "Top-1 accuracy", top1.share, top1.low, top1.high),
        "accuracy_caption": f"Top-1 {intervals[0]}, top-5 {intervals[1]}, negative log-likelihood "
        f"{metrics.nll:.4f}.",
        "confusion": _confusion_matrix(metrics) if len(names) <= MAX_MATRIX_CLASSES else None,
        "frequent": [(true, predicted, -count) for count, true, predicted in frequent[:MAX_CONFUSIONS]],
        "classes": [
            (
                row.label,
                row.count,
                row.answered,
                "none predicted" if row.precision is None else percent(row.precision),
                "no images" if row.recall is None else percent(row.recall.share),
                "" if row.recall is None else f"{percent(row.recall.low)} to {percent(row.recall.high)}",
            )
            for row in metrics.classes
        ],
        "calibration": _calibration_plot(metrics),
        "bins": [
            (
                f"{group.low:.3f} to {group.high:.3f}",
                group.count,
                "" if group.confidence is None else f"{group.confidence:.4f}",
                "" if group.accuracy is None else f"{group.accuracy:.4f}",
            )
            for group in metrics.calibration.curve
        ],
    }


def score_tile(result: Any) -> dict[str, str]:
    """Format the score of a run with its interval, by name; the name says if the score is too high."""
    name = "top-1" if result.map is None else "mAP"
    score: Any = result.score
    if isinstance(result, HeldOutEstimate):
        name += ", too high" * (result.selected_by == "same images")
        if result.top1 is None:
            return {name: percent(result.score)}
        score = result.top1
    low, high = (f"{100 * end:.0f}" for end in (score.low, score.high))
    return {name: f"{percent(score.share)} ({low} to {high})"}


def metric_tiles(metrics: ClassificationReport | MultiLabelReport) -> dict[str, str]:
    """Format the metrics that a summary shows, by name."""
    if isinstance(metrics, MultiLabelReport):
        values = {"mAP": metrics.map, "macro F1": metrics.macro_f1, "micro F1": metrics.micro_f1}
        return {name: percent(value, 2) for name, value in values.items()}
    return {
        "top-1": percent(metrics.top1.share, 2),
        "top-5": percent(metrics.top5.share, 2),
        "calibration error": f"{metrics.calibration.error:.4f}",
    }


def _multi_label_context(predictions: Predictions, metrics: MultiLabelReport) -> dict[str, Any]:
    """Build the template variables that describe predictions of several classes per image."""
    columns = ("average_precision", "precision", "recall", "f1")
    tiles = ", ".join(f"{name} {value}" for name, value in metric_tiles(metrics).items())
    return {
        "predictions": predictions,
        "multi_label": True,
        "metrics": metrics,
        "accuracy_caption": f"{tiles}. A class counts as present if its probability reaches its threshold.",
        "classes": [
            (
                row.label,
                row.count,
                row.answered,
                f"{row.threshold:.3f}",
                *("-" if getattr(row, name) is None else percent(getattr(row, name)) for name in columns),
            )
            for row in metrics.classes
        ],
    }


def _confusion_matrix(metrics: ClassificationReport) -> Markup:
    names = [row.label for row in metrics.classes]
    rows = [
        (name, [count / max(1, sum(row)) for count in row])
        for name, row in zip(names, metrics.confusion, strict=True)
    ]
    counts = [[str(count) for count in row] for row in metrics.confusion]
    return heat("confusion", "Confusion matrix", rows, names, counts, wrong_off_diagonal=True)


def _calibration_plot(metrics: ClassificationReport) -> Markup:
    measured = [
        (row.confidence, row.accuracy)
        for row in metrics.calibration.curve
        if row.confidence is not None and row.accuracy is not None
    ]
    curves = (
        Curve(name="this network", points=tuple(measured)),
        Curve(name="perfect calibration", points=((0.0, 0.0), (1.0, 1.0))),
    )
    axes = (Axis("confidence", low=0.0, high=1.0), Axis("accuracy", low=0.0, high=1.0))
    return plot("calibrated", "Confidence and accuracy", curves, *axes)
