"""Predictions of images from the logits of a checkpoint, a bundle or a cross-validation; their metrics.

This module does not import torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.decision import Decision, sigmoid
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.evaluation.metrics import (
    TOP_K,
    ClassificationReport,
    ImageScore,
    Rate,
    classification_report,
)
from sopdeploy.evaluation.multi_label import (
    MeanPrecision,
    MultiLabelPredictions,
    MultiLabelReport,
)
from sopdeploy.html.plots import plot, plot_bars, plot_counts
from sopdeploy.html.report import NO_BREAK_SPACE, Figure, Section, Table, percent

MAX_MATRIX_CLASSES = 30
MAX_CONFUSIONS = 15
_MAX_OPEN_CLASSES = 20  # more are folded
MIN_CURVE = 200  # images from which on curves say something
# Classes; a larger matrix is folded, and the frequent mistakes stand beside the photos
MAX_OPEN_MATRIX = 15
_MAX_POINTS = 60  # of a curve
_NUM_PARTS = 8  # of the images by confidence

Predictions = list[ImageScore] | MultiLabelPredictions


def make_predictions(
    logits: Iterable[NDArray[np.floating]],
    images: LabeledImages,
    labels: Sequence[str],
    decision: Decision | None,
) -> Predictions:
    """Predict *images* by the *logits* (C,) of each of them, which *decision* calibrates.

    *labels* are the classes in the order of the outputs. With one class per image,
    `images.labels` may have another order, and the classes of each `ImageScore` are indices
    into `images.labels`; with several, both orders are the same. Without a *decision*,
    `known` is None.
    """
    decision = Decision() if decision is None else decision

    if decision.is_multi_label:
        return MultiLabelPredictions(
            labels=images.labels,
            targets=images.targets.astype(np.float64),
            probabilities=np.stack([sigmoid(decision.calibrate(row)) for row in logits]),
            # With several classes per image, there are always thresholds.
            thresholds=cast(Sequence[float], decision.thresholds),
        )

    # Images have targets among sorted names, logits the order of the bundle or checkpoint.
    class_of_output = [images.labels.index(label) for label in labels]
    groups: Sequence[int | None] = [None] * len(images)
    if images.groups is not None:
        groups = np.unique(images.groups, return_inverse=True)[1].tolist()

    scores = []
    for target, group, row in zip(images.targets.tolist(), groups, logits, strict=True):
        answer = decision.answer(row)
        ranked = [class_of_output[output] for output, _ in answer.ranked]  # all classes
        probabilities = [probability for _, probability in answer.ranked]
        likelihood = probabilities[ranked.index(target)]
        top5 = tuple(ranked[:TOP_K])
        confidence = probabilities[0]
        scores.append(ImageScore(target, top5, confidence, likelihood, answer.known, group))

    return scores


def measure_predictions(
    predicted: Predictions,
    labels: Sequence[str],
    score: Rate | MeanPrecision | float | None = None,
) -> ClassificationReport | MultiLabelReport:
    """Compute the metrics of *predicted* for the sorted *labels*.

    *score* is the accuracy that the run has measured. If it has the same count of images and of
    right predictions, it is reported, because its interval takes copies and folds into account.
    """
    if isinstance(predicted, MultiLabelPredictions):
        return predicted.report()

    metrics = classification_report(labels, predicted)
    top1 = metrics.top1
    if isinstance(score, Rate) and (score.right, score.count) == (top1.right, top1.count):
        metrics = metrics.model_copy(update={"top1": score})
    return metrics


def describe_predictions(
    metrics: ClassificationReport | MultiLabelReport, which_images: str
) -> Section:
    """Describe the *metrics* of an evaluation by a sentence, the scores, and tables, the worst classes first.

    The sentence *which_images* says which images they are of.
    """
    if isinstance(metrics, ClassificationReport):
        return _describe_classes(metrics, which_images)

    values = {"mAP": metrics.map, "macro F1": metrics.macro_f1, "micro F1": metrics.micro_f1}
    scores = ", ".join(f"{name} {percent(value, 2)}" for name, value in values.items())

    # A row for each class, the worst average precision first.
    rows = []
    for row in sorted(
        metrics.classes,
        key=lambda row: math.inf if row.average_precision is None else row.average_precision,
    ):
        rates = (row.average_precision, row.precision, row.recall, row.f1)
        cells = ("-" if rate is None else percent(rate) for rate in rates)
        rows.append((row.label, row.count, row.answered, f"{row.threshold:.3f}", *cells))

    columns = [
        "class",
        "images",
        "predicted",
        "threshold",
        "average precision",
        "precision",
        "recall",
        "F1",
    ]

    explained = (
        f"{scores}. A class counts as present if its probability reaches its "
        "threshold. Precision is the share of the predictions that are right, "
        "recall the share of the images of a class that are found; F1 and "
        "the average precision, whose mean is the mAP, join both: 100 % is "
        "best."
    )
    tables = [Table(caption="Every class", columns=columns, rows=rows)]
    return Section(title="Predictions", text=[which_images, explained], tables=tables)


def _describe_classes(metrics: ClassificationReport, which_images: str) -> Section:
    """Describe accuracies, mistakes, and precision and recall by class; those without images are last.

    More than `MAX_MATRIX_CLASSES` have no confusion matrix.
    """
    # Accuracies and loss in one paragraph of text.
    top5 = f", top-5 {_with_interval(metrics.top5)}" if len(metrics.classes) > TOP_K else ""
    scores = (
        f"Top-1 {_with_interval(metrics.top1)}{top5}, log loss "
        f"{metrics.log_loss:.4f}. Top-1 is the share of images whose first "
        f"prediction is right{', top-5 of images with their class among the first five' if top5 else ''}. "
        "The log loss is 0 if each prediction is right and certain."
    )

    if metrics.accepted is not None:
        scores += f" {_with_interval(metrics.accepted)} accepted as known."
    tables = [*tabulate_matrix(metrics), tabulate_classes(metrics)]
    if not any(table.matrix and table.folded for table in tables):
        tables.append(tabulate_mistakes(metrics))
    return Section(title="Predictions", text=[which_images, scores], tables=tables)


def tabulate_matrix(
    metrics: ClassificationReport, links: Mapping[tuple[int, int], str] = MappingProxyType({})
) -> list[Table]:
    """Return the confusion matrix, whose cells have *links*; of more than `MAX_MATRIX_CLASSES`, none."""
    names = [row.label for row in metrics.classes]
    if len(names) > MAX_MATRIX_CLASSES:
        return []
    rows = [(name, *counts) for name, counts in zip(names, metrics.confusion, strict=True)]
    caption = "Confusion matrix: a row for each class, a column for each prediction"
    if links:
        caption += "; a number leads to its photos"
    columns = ["class", *names]
    folded = len(names) > MAX_OPEN_MATRIX
    matrix = Table(
        caption=caption, columns=columns, rows=rows, matrix=True, links=links, folded=folded
    )
    return [tabulate_mistakes(metrics, links), matrix] if folded else [matrix]


def tabulate_mistakes(
    metrics: ClassificationReport, links: Mapping[tuple[int, int], str] = MappingProxyType({})
) -> Table:
    """List the `MAX_CONFUSIONS` most frequent mistakes; the numbers of images have the *links* of a matrix."""
    names = [row.label for row in metrics.classes]
    mistakes = metrics.mistakes()[:MAX_CONFUSIONS]
    cells = [(names.index(true), names.index(predicted)) for true, predicted, _ in mistakes]
    return Table(
        caption="Most frequent mistakes",
        columns=["true", "predicted", "images"],
        rows=mistakes,
        links={(row, 1): links[cell] for row, cell in enumerate(cells) if cell in links},
    )


def tabulate_classes(metrics: ClassificationReport) -> Table:
    """List precision, recall with its interval, and support of each class, the worst recall first."""
    rows = []
    for row in sorted(
        metrics.classes, key=lambda row: math.inf if row.recall is None else row.recall.share
    ):
        precision = "none predicted" if row.precision is None else percent(row.precision)
        recall = "no images"
        interval = ""
        if row.recall is not None:
            recall = percent(row.recall.share)
            interval = f"{percent(row.recall.low)} to {percent(row.recall.high)}".replace(
                " ", NO_BREAK_SPACE
            )
        rows.append((row.label, precision, recall, interval, row.count))

    return Table(
        caption="Every class: how many of its predictions are right (precision), how many of its images "
        "are found (recall), and how many images it has (support)",
        columns=["class", "precision", "recall", "95 % interval of recall", "support"],
        rows=rows,
        folded=len(rows) > _MAX_OPEN_CLASSES,
    )


def describe_thresholds(metrics: ClassificationReport, scores: Sequence[ImageScore]) -> Section:
    """Show the confidence, and what a threshold on it does; from `MIN_CURVE` images on, also as curves."""
    rows = []
    for row in metrics.thresholds:
        share = percent(row.right / row.kept) if row.kept else "-"
        left = f"{row.left_to_person} ({percent(row.left_to_person / metrics.count, 0)})"
        rows.append((f"{row.confidence:g}", left, f"{row.right} of {row.kept}", share))
    table = Table(
        caption="If a person decides all images whose confidence is below a threshold",
        columns=["threshold", "for a person", "others right", "share right"],
        rows=rows,
    )

    figures = [_plot_distribution(scores)]
    if len(scores) >= MIN_CURVE:
        figures = [*_plot_confidence(scores), *figures]
    return Section(title="Confidence", figures=figures, tables=[table])


def _plot_distribution(scores: Sequence[ImageScore]) -> Figure:
    """Plot how many images have which confidence, right and wrong."""
    edges = [10 * tenth for tenth in range(11)]
    counts = {}
    for name, is_right in (("right", True), ("wrong", False)):
        values = [100 * score.confidence for score in scores if score.correct is is_right]
        counts[name] = np.histogram(values, edges)[0].tolist()
    return Figure(
        image=plot_counts(counts, edges, "confidence, %"),
        caption="Images by their confidence, the probability of the predicted class.",
    )


def _plot_confidence(scores: Sequence[ImageScore]) -> list[Figure]:
    """Plot the errors by the share that the network decides, and the reliability of *scores*."""
    # The most confident images first: the share that is right among the first ones.
    ranked = sorted(scores, key=lambda score: -score.confidence)
    right_N = np.cumsum([score.correct for score in ranked])
    places = np.unique(np.linspace(1, len(ranked), min(_MAX_POINTS, len(ranked))).astype(int))
    trade_off = [
        (100 * place / len(ranked), 100 * (1 - right_N[place - 1] / place))
        for place in places.tolist()
    ]
    errors = Figure(
        image=plot(
            {"errors among them": trade_off}, "predicted without a person, %", "errors, %"
        ),
        caption="The more images you leave to a person, the fewer errors the network makes.",
    )

    # Parts of equal size by confidence.
    parts = np.array_split(np.arange(len(ranked)), _NUM_PARTS)
    curve = [
        (
            100 * float(np.mean([ranked[index].confidence for index in part])),
            100 * float(np.mean([ranked[index].correct for index in part])),
        )
        for part in reversed(parts)
    ]
    curves = {"this network": curve, "as it should be": [(0.0, 0.0), (100.0, 100.0)]}
    caption = (
        f"Reliability: the images in {_NUM_PARTS} parts, ordered by confidence. If the curve is below the "
        "diagonal, the network is too sure."
    )
    reliability = Figure(image=plot(curves, "mean confidence, %", "right, %"), caption=caption)
    return [errors, reliability]


def plot_recalls(metrics: ClassificationReport) -> list[Figure]:
    """Plot the recall of each class as bars, the worst first, if they are too many for a matrix."""
    found = [row for row in metrics.classes if row.recall is not None]
    if len(metrics.classes) <= MAX_MATRIX_CLASSES or not found:
        return []
    found.sort(key=lambda row: 0.0 if row.recall is None else row.recall.share)
    shares = {row.label: 100 * row.recall.share for row in found if row.recall is not None}
    caption = "Recall by class: the share of its images that are found."
    return [Figure(image=plot_bars(shares, "recall, %"), caption=caption)]


def _with_interval(rate: Rate) -> str:
    return f"{percent(rate.share)} ({percent(rate.low)} to {percent(rate.high)})"
