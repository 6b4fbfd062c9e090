"""Paired differences equal SciPy's paired t test, and verdicts follow from intervals."""

import pytest
from gain.paired import Paired, paired
from scipy import stats


def test_a_paired_difference_is_the_paired_t_test() -> None:
    ours, other = [57.1, 58.0, 56.2, 57.7], [56.0, 57.2, 56.4, 56.1]
    found = paired(ours, other)
    expected = stats.ttest_rel(ours, other)
    low, high = expected.confidence_interval()
    assert (found.n, found.wins) == (4, 3)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (0.6, 0.7, "no effect detected"),
        (-0.6, 0.7, "no effect detected"),
        (0.7, 0.7, "no effect detected"),
        (0.9, 0.6, "better by 0.90 +- 0.60"),
        (-8.5, 1.0, "worse by 8.50 +- 1.00"),
        (0.0, 0.0, "no effect detected"),
    ],
)
def test_the_verdict_follows_from_the_interval_alone(mean: float, half: float, verdict: str) -> None:
    assert Paired(5, mean, half, 3, 0.5).verdict == verdict
