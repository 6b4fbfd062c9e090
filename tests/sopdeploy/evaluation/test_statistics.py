"""Statistics against published values, scipy and properties that hold for any numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sopdeploy.evaluation.statistics import Interval, bootstrap, mcnemar, mean_and_sd, paired, wilson

DIFFERENCES = st.floats(-1, 1, allow_nan=False, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(DIFFERENCES, min_size=2, max_size=30))
def test_a_paired_interval_is_that_of_the_t_test(differences) -> None:
    found = paired(differences)
    assert found.wins + found.ties + found.losses == len(differences)
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-12)
    if found.sd < 1e-9:
        assert found.interval.high - found.interval.low <= 2e-8
        return
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


def test_a_worked_example_of_five_pairs() -> None:
    found = paired([0.01, 0.02, 0.03, 0.04, 0.0])
    assert found.mean == pytest.approx(0.02)
    assert found.sd == pytest.approx(math.sqrt(0.001 / 4))
    assert found.interval == pytest.approx((0.02 - 0.0196324, 0.02 + 0.0196324), abs=1e-6)
    assert (found.wins, found.ties, found.losses) == (4, 1, 0)
    low, high = paired([0.01, -0.01]).interval
    assert low < 0 < found.interval.low
    assert high > 0


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        paired([0.1])
    assert mean_and_sd([0.1]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(10, 1, 2 * (1 + 11) / 2**11), (1, 10, 2 * (1 + 11) / 2**11), (0, 0, 1.0), (5, 5, 1.0)],
)
def test_mcnemar_is_the_exact_sign_test(first, second, expected) -> None:
    assert mcnemar(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(50, 50, 0.9287, 1.0), (0, 50, 0.0, 0.0713), (95, 100, 0.8882, 0.9785), (0, 0, 0.0, 1.0)],
)
def test_wilson_gives_the_published_intervals(successes, trials, low, high) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_wilson_agrees_with_scipy(successes, failures) -> None:
    found = wilson(successes, successes + failures)
    if successes + failures == 0:
        assert found == (0.0, 1.0)
        return
    expected = stats.binomtest(successes, successes + failures).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_a_bootstrap_covers_the_mean_and_depends_on_its_seed_alone() -> None:
    gains = np.random.default_rng(3).choice([-1, 0, 1], size=(5, 300), p=[0.02, 0.9, 0.08]).astype(np.int8)
    found = bootstrap(gains, draws=500)
    assert found == bootstrap(gains, draws=500)
    assert found.low <= float(gains.mean()) <= found.high
    assert found != bootstrap(gains, draws=500, seed=1)


def test_a_bootstrap_is_as_wide_as_the_variance_of_images_and_seeds_requires() -> None:
    images = np.tile(np.random.default_rng(0).choice([-1, 1], size=(1, 400)), (4, 1)).astype(np.int8)
    found = bootstrap(images)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.12)  # seeds agree
    assert bootstrap(np.zeros((3, 50), dtype=np.int8), draws=10) == Interval(0.0, 0.0)
    assert bootstrap(np.ones((3, 50), dtype=np.int8), draws=10) == pytest.approx((1.0, 1.0))
