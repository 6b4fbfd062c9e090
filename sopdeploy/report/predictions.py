"""Charts and tables of the predictions: accuracy, classes, confusions, calibration."""

from typing import Any

from markupsafe import Markup

from sopdeploy.evaluation.metrics import ClassificationReport
from sopdeploy.evaluation.multi_label import MultiLabelReport
from sopdeploy.html.charts import Axis, Curve, plot
from sopdeploy.html.templates import percent
from sopdeploy.report.run_data import EvaluatedImages
from sopdeploy.training.epoch_choice import LoopResult
from sopdeploy.training.procedure_config import ProcedureResult

MAX_MATRIX_CLASSES = 30
MAX_CONFUSIONS = 15


def predictions_context(predictions: EvaluatedImages | None) -> dict[str, Any]:
    """Build the template variables that describe *predictions*, which is None if there are no images."""
    if predictions is None:
        return {"predictions": None}
    metrics = predictions.metrics
    context = {"predictions": predictions, "metrics": metrics}
    if isinstance(metrics, MultiLabelReport):
        return {**context, "multi_label": True, **_multi_label_context(metrics)}
    return {**context, "multi_label": False, **_classification_context(metrics)}


def _classification_context(metrics: ClassificationReport) -> dict[str, Any]:
    """Build the template variables that describe predictions of one class per image."""
    intervals = [
        f"{percent(rate.share, 2)} ({percent(rate.low)} to {percent(rate.high)})"
        for rate in (metrics.top1, metrics.top5)
    ]
    names = [row.label for row in metrics.classes]
    return {
        "accuracy_caption": f"Top-1 {intervals[0]}, top-5 {intervals[1]}, negative log-likelihood "
        f"{metrics.nll:.4f}.",
        "names": names if len(names) <= MAX_MATRIX_CLASSES else [],
        "frequent": metrics.mistakes()[:MAX_CONFUSIONS],
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
    }


def score_tiles(result: ProcedureResult) -> dict[str, str]:
    """Format the score of a run with its interval, by name; of the training loop, its best epoch, too."""
    score = result.score
    epoch = {"epoch": f"{result.epoch} of {result.num_epochs}"} if isinstance(result, LoopResult) else {}
    if isinstance(score, float):
        return {**epoch, result.score_name: percent(score)}
    interval = f"{100 * score.low:.0f} to {100 * score.high:.0f}"
    return {**epoch, result.score_name: f"{percent(score.value)} ({interval})"}


def _multi_label_context(metrics: MultiLabelReport) -> dict[str, Any]:
    """Build the template variables that describe predictions of several classes per image."""
    values = {"mAP": metrics.map, "macro F1": metrics.macro_f1, "micro F1": metrics.micro_f1}
    scores = ", ".join(f"{name} {percent(value, 2)}" for name, value in values.items())
    rows = []
    for row in metrics.classes:
        values = (row.average_precision, row.precision, row.recall, row.f1)
        cells = ("-" if value is None else percent(value) for value in values)
        rows.append((row.label, row.count, row.answered, f"{row.threshold:.3f}", *cells))
    caption = f"{scores}. A class counts as present if its probability reaches its threshold."
    return {"accuracy_caption": caption, "classes": rows}


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
