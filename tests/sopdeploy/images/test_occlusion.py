"""Occlusion maps: what the copies cover, and the probability that each part of the image is worth."""

import numpy as np
import pytest

from sopdeploy.bundle.decision import Decision, sigmoid, softmax
from sopdeploy.images.occlusion import GRID, IMAGES_PER_MAP, cell_slices, occlude
from sopdeploy.images.preprocess import Preprocess


@pytest.mark.parametrize("side", [7, 32, 224])
def test_every_pixel_has_the_mean_color_in_exactly_one_copy(side: int) -> None:
    pixels = np.full((side, side, 3), 255, np.uint8)
    copies = occlude(pixels, Preprocess(crop=side, mean=(0.2, 0.4, 0.6)))
    assert copies.shape == (IMAGES_PER_MAP - 1, side, side, 3)

    changed = (copies != pixels).all(axis=3)
    assert (changed.sum(axis=0) == 1).all()
    assert (copies[changed] == (51, 102, 153)).all()

    sizes = changed.reshape(GRID, GRID, -1).sum(axis=2)
    assert sizes.max() <= (side // GRID + 1) ** 2
    assert (pixels == 255).all()


def test_cells_are_counted_row_by_row() -> None:
    assert cell_slices(70, 0) == (slice(0, 10), slice(0, 10))
    assert cell_slices(70, 13) == (slice(10, 20), slice(60, 70))


@pytest.mark.parametrize("thresholds", [None, (0.9, 0.1, 0.1)])
def test_the_explanation_is_the_loss_of_the_first_listed_class(
    thresholds: tuple[float, ...] | None,
) -> None:
    activation, activate = ("softmax", softmax) if thresholds is None else ("sigmoid", sigmoid)
    decision = Decision(activation=activation, thresholds=thresholds)
    logits = np.array([1.0, 0.5, -4.0], np.float32)
    copies = np.tile(logits, (IMAGES_PER_MAP - 1, 1))
    copies[9] = (1.0, -3.0, 0.0)  # second row, third column
    answer = decision.answer(logits, occluded=copies)
    first = 0 if thresholds is None else 1  # class 0 does not reach its threshold

    assert answer.ranked[0][0] == first
    assert answer.explanation is not None
    expected = np.zeros((GRID, GRID))
    expected[1, 2] = activate(logits)[first] - activate(copies[9])[first]

    assert np.array(answer.explanation) == pytest.approx(expected)


def test_there_is_no_explanation_without_a_request_or_a_class() -> None:
    logits = np.zeros(2, np.float32)
    assert Decision().answer(logits).explanation is None

    none_listed = Decision(activation="sigmoid", thresholds=(0.9, 0.9))
    assert (
        none_listed.answer(logits, occluded=np.zeros((49, 2), np.float32)).explanation is None
    )
