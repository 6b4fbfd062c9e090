"""Confidence intervals against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sopdeploy.evaluation.statistics import student, wilson

DIFFERENCES = st.floats(-1, 1, allow_nan=False, allow_subnormal=False)


@settings(deadline=None, max_examples=20)
@given(st.lists(DIFFERENCES, min_size=2, max_size=30))
def test_a_paired_interval_is_that_of_the_t_test(differences) -> None:
    found = student(differences)
    if np.std(differences) < 1e-9:
        assert found == pytest.approx((np.mean(differences),) * 2, abs=1e-8)
        return
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_wilson_agrees_with_scipy(successes, failures) -> None:
    found = wilson(successes, successes + failures)
    if successes + failures == 0:
        assert found == (0.0, 1.0)
        return
    expected = stats.binomtest(successes, successes + failures).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-7)
