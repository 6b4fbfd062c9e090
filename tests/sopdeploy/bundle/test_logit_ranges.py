"""Which classes a large number masks, and how much of a difference rounding explains."""

import numpy as np
import pytest

from sopdeploy.bundle.logit_ranges import OWN_ROUNDING, LogitRanges, absolute_errors
from sopdeploy.bundle.probes import Probes, replay
from sopdeploy.errors import ParityError

# Two images and three classes, with 5 as the largest logit of the first two classes
LOGITS = np.array([[3.0, -1.0, 0.0], [-2.0, 5.0, 0.0]])


def with_third(*values: float) -> np.ndarray:
    return np.where([False, False, True], np.array(values)[:, None], LOGITS)


THIRD: dict[str, tuple[np.ndarray, bool]] = {
    "a usual one": (with_third(1, 2), True),
    "a constant": (with_third(3, 3), True),
    "zero": (with_third(0, 0), True),
    "below the limit": (with_third(-79, -79), True),
    "at the limit": (with_third(-80, -80), True),
    "above the limit": (with_third(-81, -81), False),
    "above the limit for one image": (with_third(-1, -81), False),
    "a mask": (with_third(-1e9, -1e9), False),
    "a mask beside a logit": (with_third(-1e4 + 2, -1e4 - 1), False),
    "minus infinity": (with_third(-np.inf, -np.inf), False),
    "large, but predicted": (with_third(1e6, -1e6), True),
}


@pytest.mark.parametrize("case", THIRD)
def test_a_class_is_masked_if_it_is_much_larger_than_those_that_are_predicted(
    case: str,
) -> None:
    logits, is_ordinary = THIRD[case]
    ranges = LogitRanges.of(logits)

    assert ranges.is_ordinary.tolist() == [True, True, is_ordinary]
    assert ranges.spread[:2].tolist() == [5, 6]
    if not is_ordinary:
        largest = np.abs(logits[:, 2]).max()
        expected = OWN_ROUNDING * largest if np.isfinite(largest) else 0
        assert ranges.masked_rounding.tolist() == [0, 0, expected]
        assert ranges.rounding[:2].tolist() == [5 * OWN_ROUNDING] * 2


def test_errors_of_infinities_are_zero_only_where_both_are_minus_infinity() -> None:
    values = np.array([-np.inf, -np.inf, 1.0, np.inf, np.nan])
    expected = np.array([-np.inf, 1.0, -np.inf, np.inf, 1.0])
    errors = absolute_errors(values, expected)
    np.testing.assert_equal(errors, [0, np.inf, np.inf, np.nan, np.nan])


# What is added to the logits of the classes, of which the last one has the value of the mask
REPLAYED: dict[str, tuple[float, tuple[float, float, float], bool]] = {
    "equal": (-1e9, (0, 0, 0), True),
    "rounding of the mask": (-1e9, (0, 0, 64), True),
    "more than rounding of the mask": (-1e9, (0, 0, 2e4), False),
    "an error beside the mask": (-1e9, (0.01, 0, 0), False),
    "equal infinities": (-np.inf, (0, 0, 0), True),
    "an error beside infinities": (-np.inf, (0.01, 0, 0), False),
    "no infinity": (-np.inf, (0, 0, np.inf), False),
    "a usual class": (2.0, (0, 0, 0.01), False),
}


@pytest.mark.parametrize("case", REPLAYED)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_replay_measures_a_masked_class_by_its_mask(case: str, batch: int) -> None:
    mask, added, passes = REPLAYED[case]
    images = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    expected = with_third(mask, mask).astype(np.float32)
    probes = Probes(images=images, expected={"logits": expected}, tolerance={"logits": 1e-3})

    def run(part: np.ndarray) -> dict[str, np.ndarray]:
        logits = expected[part[:, 0, 0, 0]]
        with np.errstate(invalid="ignore"):
            return {"logits": (logits + np.array(added)).astype(np.float32)}

    if passes:
        replay(probes, run, batch=batch)
        return
    with pytest.raises(ParityError):
        replay(probes, run, batch=batch)
