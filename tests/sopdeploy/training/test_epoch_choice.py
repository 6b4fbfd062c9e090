"""The printed accuracy of the best epoch is that of new images, or the text says that it is too high."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sopdeploy.evaluation.multi_label import MultiLabelMetrics
from sopdeploy.evaluation.prediction import EvalMetrics, HeldOutMetrics
from sopdeploy.training.diagnostics import Diagnostics, EpochRow
from sopdeploy.training.epoch_choice import estimate_best


def history(right_EN: NDArray[np.bool_], *, recorded: bool = True) -> list[EpochRow]:
    """Build the history of a run from the right predictions (epochs, images)."""
    rows = []
    for number, right_N in enumerate(right_EN, 1):
        top1 = float(right_N.mean())
        text = "".join("01"[int(one)] for one in right_N) if recorded else ""
        rows.append(
            EpochRow(
                epoch=number,
                lr=0.1,
                losses={},
                metrics=EvalMetrics(top1=top1, top5=1.0, count=len(right_N), loss=1.0),
                diagnostics=Diagnostics(num_images=len(right_N), right=text, heads={}),
                seconds=0.0,
            )
        )
    return rows


@pytest.mark.parametrize("alike", [0.0, 0.6], ids=["independent epochs", "epochs that agree"])
def test_the_estimate_of_the_best_of_40_epochs_is_unbiased_where_the_best_score_is_not(alike: float) -> None:
    """With *alike*, this share of the predictions is the same in all epochs."""
    random, estimates, best, covered = np.random.default_rng(0), [], [], []
    for _ in range(100):
        same = (random.random((1, 12)) < alike) & np.ones((40, 1), np.bool_)
        right = np.where(same, random.random((1, 12)) < 0.3, random.random((40, 12)) < 0.3)
        rows = history(right)
        found = estimate_best(rows).top1
        assert found is not None
        estimates.append(found.share)
        covered.append(found.low <= 0.3 <= found.high)
        best.append(max(row.metrics.score for row in rows))
    assert np.mean(estimates) == pytest.approx(0.3, abs=0.03)
    assert np.mean(covered) >= 0.95
    assert np.mean(best) > 0.4


def test_an_epoch_that_is_better_on_all_images_has_its_own_score() -> None:
    right = np.zeros((3, 20), np.bool_)
    right[1, :15] = True
    found = estimate_best(history(right))
    assert found.top1 is not None
    assert (found.top1.right, found.count, found.selected_by) == (15, 20, "other images")
    assert found.describe() == (
        "top-1 75.0 % (95 % interval 53 to 89 %) of 20 held-out images, corrected for their choice of the "
        "epoch"
    )


FAIR = "top-1 50.0 % (95 % interval 22 to 78 %) of 8 held-out images"
BIASED = "8 held-out images, too high: they also select the epoch"
MULTI_LABEL = MultiLabelMetrics(map=0.5, macro_f1=0.5, micro_f1=0.5, count=8, loss=1.0, thresholds=(0.5, 0.5))


@pytest.mark.parametrize(
    ("epochs", "recorded", "options", "metrics", "text"),
    [
        (1, True, {}, None, FAIR),
        (2, True, {"frozen_backbone": True}, None, FAIR),
        (2, False, {}, None, f"of {BIASED}"),
        (2, True, {}, MULTI_LABEL, f"mAP 50.0 % of {BIASED}"),
    ],
    ids=["one epoch", "a frozen backbone", "too many images to record", "several classes"],
)
def test_a_score_that_selected_the_epoch_says_so(
    epochs: int, recorded: bool, options: dict[str, bool], metrics: HeldOutMetrics | None, text: str
) -> None:
    rows = history(np.tile([True, False], (epochs, 4)), recorded=recorded)
    if metrics is not None:
        rows = [row.model_copy(update={"metrics": metrics}) for row in rows]
    assert estimate_best(rows, **options).describe().endswith(text)
