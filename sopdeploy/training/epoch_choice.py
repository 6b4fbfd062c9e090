"""The score of the best epoch on held-out images, although the same images select this epoch.

The score of the epoch that some images select is too high on these images. Therefore, resamples of the images
select an epoch, and the images outside of each resample measure it (bootstrap bias corrected
cross-validation: Tsamardinos et al., Machine Learning 107, 2018). This needs the predictions of all epochs
for all images, which runs record for at most `MAX_IMAGES` images.

Letters: N images, E epochs, B resamples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy.evaluation.metrics import Rate
from sopdeploy.training.diagnostics import EpochRow, best_epoch
from sopdeploy.training.results import LoopResult, SelectedBy

_RESAMPLES = 1000


def estimate_best(history: Sequence[EpochRow], *, frozen_backbone: bool = False) -> LoopResult:
    """Estimate the score of the best epoch of *history*, which has at least one epoch.

    With *frozen_backbone*, the exported network is the same in all epochs.
    """
    best = best_epoch(history, frozen_backbone=frozen_backbone)
    metrics, count = best.metrics, best.metrics.count
    selected_by: SelectedBy = "nothing" if len(history) == 1 or frozen_backbone else "same images"
    top1 = None
    if metrics.score_name != "mAP":
        right = round(metrics.score * count)
        recorded = [row.diagnostics.right if row.diagnostics else "" for row in history]
        all_recorded = count > 1 and all(len(right_N) == count for right_N in recorded)
        if selected_by == "same images" and all_recorded:
            right_EN = np.array([list(right_N) for right_N in recorded]) == "1"
            right, selected_by = round(corrected_score(right_EN) * count), "other images"
        top1 = Rate.of(right, count)
    return LoopResult(
        epoch=best.epoch,
        num_epochs=len(history),
        top1=top1,
        map=metrics.score if top1 is None else None,
        count=count,
        selected_by=selected_by,
    )


def corrected_score(right_EN: NDArray[np.bool_]) -> float:
    """Estimate the accuracy of the best of E epochs by the bootstrap of the module's docstring.

    *right_EN* tells which images each epoch classifies correctly.
    """
    count = right_EN.shape[1]
    resamples_BN = np.random.default_rng(0).multinomial(count, [1 / count] * count, _RESAMPLES)
    selected_B = (resamples_BN @ right_EN.T).argmax(axis=1)
    outside_BN = resamples_BN == 0
    num_outside_B = outside_BN.sum(axis=1)
    num_right_B = (right_EN[selected_B] & outside_BN).sum(axis=1)
    usable_B = num_outside_B > 0
    return float((num_right_B[usable_B] / num_outside_B[usable_B]).mean())
