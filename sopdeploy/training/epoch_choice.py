"""The score of the best epoch on held-out images, although the same images select this epoch.

The score of the epoch that some images select is too high on these images. Therefore, resamples of the images
select an epoch, and the images outside of each resample measure it (bootstrap bias corrected
cross-validation: Tsamardinos et al., Machine Learning 107, 2018). This needs the predictions of all epochs
for all images, which runs record for at most `MAX_IMAGES` images.

Letters: N images, E epochs, B resamples.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sopdeploy.config import Fraction, StrictModel
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.training.diagnostics import EpochRow, best_epoch

_RESAMPLES = 1000
SelectedBy = Literal["nothing", "other images", "same images"]


class HeldOutEstimate(StrictModel):
    """Top-1 accuracy or mAP of the exported network on `count` held-out images.

    Attributes:
        top1: Accuracy with its 95 % interval; `None` with several classes per image.
        map: Mean average precision; only with several classes per image.
        selected_by: The images that select the measured epoch: none (`nothing`), `other images`, or the
            `same images`. The score is too high in the last case only.
    """

    top1: Rate | None = None
    map: Fraction | None = None
    count: int
    selected_by: SelectedBy

    @property
    def score(self) -> float:
        """The accuracy or mAP."""
        score = self.map if self.top1 is None else self.top1.share
        assert score is not None  # noqa: S101  # one of the two is set
        return score

    def describe(self) -> str:
        """Describe the score, its interval and its bias in one line."""
        score = f"{'mAP' if self.top1 is None else 'top-1'} {100 * self.score:.1f} %"
        interval = ""
        if self.top1 is not None:
            interval = f" (95 % interval {100 * self.top1.low:.0f} to {100 * self.top1.high:.0f} %)"
        note = {
            "nothing": "",
            "other images": ", corrected for their choice of the epoch",
            "same images": ", too high: they also select the epoch",
        }[self.selected_by]
        return f"{score}{interval} of {self.count} held-out images{note}"


def estimate_best(history: Sequence[EpochRow], *, frozen_backbone: bool = False) -> HeldOutEstimate:
    """Estimate the score of the best epoch of *history*, which has at least one epoch.

    With *frozen_backbone*, the exported network is the same in all epochs.
    """
    metrics = best_epoch(history, frozen_backbone=frozen_backbone).metrics
    selected_by: SelectedBy = "nothing" if len(history) == 1 or frozen_backbone else "same images"
    count = metrics.count
    if metrics.score_name == "mAP":
        return HeldOutEstimate(map=metrics.score, count=count, selected_by=selected_by)
    right = round(metrics.score * count)
    recorded = [row.diagnostics.right if row.diagnostics else "" for row in history]
    all_recorded = count > 1 and all(len(right_N) == count for right_N in recorded)
    if selected_by == "same images" and all_recorded:
        right_EN = np.array([list(right_N) for right_N in recorded]) == "1"
        right, selected_by = round(corrected_score(right_EN) * count), "other images"
    return HeldOutEstimate(top1=Rate.of(right, count), count=count, selected_by=selected_by)


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
