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

from sopdeploy.config import Fraction
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.training.diagnostics import EpochRow, best_epoch
from sopdeploy.training.procedure_config import ProcedureResult

_RESAMPLES = 1000
SelectedBy = Literal["nothing", "other images", "same images"]


class LoopResult(ProcedureResult):
    """Top-1 accuracy or mAP of the best of `epochs` epochs on `count` held-out images.

    Attributes:
        epoch: The best epoch, from 1.
        top1: Accuracy with its 95 % interval; `None` with several classes per image.
        map: Mean average precision; only with several classes per image.
        selected_by: The images that select the measured epoch: none (`nothing`), `other images`, or the
            `same images`. The score is too high in the last case only.
    """

    kind: Literal["loop"] = "loop"
    epoch: int
    num_epochs: int
    top1: Rate | None = None
    map: Fraction | None = None
    count: int
    selected_by: SelectedBy

    @property
    def score(self) -> Rate | float:
        """The accuracy or mAP."""
        return self.top1 or self.map or 0.0

    @property
    def score_name(self) -> str:
        """The name of the score, which says if it is too high."""
        return (
            f"{'mAP' if self.top1 is None else 'top-1'}{', too high' * (self.selected_by == 'same images')}"
        )

    def describe(self) -> str:
        """Describe the score, its interval and its bias in one line."""
        score = f"mAP {100 * (self.map or 0.0):.1f} %"
        if self.top1 is not None:
            interval = f"95 % interval {100 * self.top1.low:.0f} to {100 * self.top1.high:.0f} %"
            score = f"top-1 {100 * self.top1.share:.1f} % ({interval})"
        note = {
            "nothing": "",
            "other images": ", corrected for their choice of the epoch",
            "same images": ", too high: they also select the epoch",
        }[self.selected_by]
        return f"{score} of {self.count} held-out images{note}"

    def lines(self) -> tuple[str]:
        """Describe the best epoch and its score."""
        return (f"epoch {self.epoch} of {self.num_epochs}: {self.describe()}",)

    def rows(self) -> list[tuple[str, str]]:
        """Describe the score."""
        return [("accuracy", self.describe())]


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
