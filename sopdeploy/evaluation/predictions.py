"""Predictions of images from the logits of a checkpoint, a bundle or a cross-validation.

This module does not import torch.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.base import LabeledImages
from sopdeploy.decision import Decision, sigmoid, softmax
from sopdeploy.evaluation.metrics import ImageScore
from sopdeploy.evaluation.multi_label import MultiLabelPredictions

Predictions = list[ImageScore] | MultiLabelPredictions


def make_predictions(
    logits: Iterable[NDArray[np.floating]],
    images: LabeledImages,
    labels: Sequence[str],
    decision: Decision | None,
) -> Predictions:
    """Predict *images* by the calibrated *logits* (V, C) of the V views of each image.

    *labels* are the classes in output order. The labels of *images* may have another order if each image has
    one class. Probabilities are averaged over the views. A rejection threshold applies to single views only.
    """
    decision = decision or Decision()
    if decision.thresholds is not None:
        return MultiLabelPredictions(
            labels=images.labels,
            targets=images.targets.astype(np.float64),
            probabilities=np.stack([sigmoid(views).mean(axis=0) for views in logits]),
            thresholds=decision.thresholds,
        )
    columns = [images.labels.index(label) for label in labels]
    scores = []
    for target, views in zip(images.targets.tolist(), logits, strict=True):
        probabilities = softmax(views).mean(axis=0)
        # Logits still differ where probabilities have become 0.
        best_first = np.argsort(-(views[0] if len(views) == 1 else probabilities), kind="stable")
        ranked = [(columns[index], float(probabilities[index])) for index in best_first]
        known = decision.is_known(views[0]) if len(views) == 1 else None
        scores.append(ImageScore.from_ranking(target, ranked, known=known))
    return scores
