"""Paired differences equal SciPy's paired t test."""

import pytest
from gain.paired import paired
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
