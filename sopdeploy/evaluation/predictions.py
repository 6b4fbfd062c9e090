"""Predictions of images from the logits of a checkpoint, a bundle or a cross-validation.

This module does not import torch.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.evaluation.metrics import TOP_K, ImageScore
from sopdeploy.evaluation.multi_label import MultiLabelPredictions

Predictions = list[ImageScore] | MultiLabelPredictions


def make_predictions(
    logits: Iterable[NDArray[np.floating]],
    images: LabeledImages,
    labels: Sequence[str],
    decision: Decision | None,
) -> Predictions:
    """Predict *images* by the calibrated *logits* (C,) of each of them.

    *labels* are the classes in output order. With one class per image, `images.labels` may have another
    order; the classes of each `ImageScore` are indices into `images.labels`.
    """
    decision = decision or Decision()
    if decision.thresholds is not None:
        return MultiLabelPredictions(
            labels=images.labels,
            targets=images.targets.astype(np.float64),
            probabilities=np.stack([sigmoid(row) for row in logits]),
            thresholds=decision.thresholds,
        )
    class_of_output = [images.labels.index(label) for label in labels]
    scores = []
    for target, row in zip(images.targets.tolist(), logits, strict=True):
        answer = decision.answer(row)
        ranked = [class_of_output[output] for output, _ in answer.ranked]  # all classes
        probabilities = [probability for _, probability in answer.ranked]
        likelihood = probabilities[ranked.index(target)]
        scores.append(ImageScore(target, tuple(ranked[:TOP_K]), probabilities[0], likelihood, answer.known))
    return scores
