"""McNemar's test, Tango's interval and the verdict; confidence intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sopdeploy.evaluation.metrics import Z_95, wilson
from sopdeploy.evaluation.statistics import (
    ALPHA,
    decide,
    difference_interval,
    mcnemar,
    score_statistic,
    smallest_difference,
    student,
)


def table_probabilities(images: int, wins: float, losses: float) -> np.ndarray:
    """Probabilities (images + 1, images + 1) of every number of wins (rows) and losses (columns)."""
    of_wins = stats.binom.pmf(np.arange(images + 1), images, wins)
    left = images - np.arange(images + 1)
    return of_wins[:, None] * stats.binom.pmf(
        np.arange(images + 1), left[:, None], losses / (1 - wins)
    )


def promoted(images: int, tolerance: float) -> np.ndarray:
    """Which of these numbers `decide` calls better or not worse; `decide` is monotonous in the wins."""
    accepted = np.zeros((images + 1, images + 1), bool)
    wins = 0
    for losses in range(images // 2 + 1):
        while wins <= images - losses and decide(wins, losses, images, tolerance) in {
            "worse",
            "undecided",
        }:
            wins += 1
        accepted[wins:, losses] = True
    return accepted


@pytest.mark.parametrize("wins", [0, 1, 6, 40, 700])
@pytest.mark.parametrize("losses", [0, 1, 5, 41])
def test_mcnemar_is_the_binomial_test_of_scipy(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


# Wins, losses, images: the smallest difference that is found in 80 % of cases
SMALLEST = {
    (30, 20, 1000): 2.8016 * math.sqrt(51 / 1002 / 1000),
    (0, 0, 10): 6 / 10,  # six images on which only one classifier is right are needed
    (0, 0, 2): 1.0,
}


@pytest.mark.parametrize("counts", SMALLEST)
def test_the_smallest_difference_is_that_of_six_images_at_least(counts) -> None:
    assert smallest_difference(*counts) == pytest.approx(SMALLEST[counts], rel=1e-4)


@pytest.mark.parametrize(
    ("wins", "losses", "images"), [(12, 5, 80), (0, 0, 50), (3, 30, 33), (1, 0, 1)]
)
def test_the_ends_of_the_interval_are_just_not_rejected(
    wins: int, losses: int, images: int
) -> None:
    low, high = difference_interval(wins, losses, images)
    assert -1 <= low <= (wins - losses) / images <= high <= 1

    for end, sign in ((low, 1), (high, -1)):
        if abs(end) < 1 - 1e-9:
            assert sign * score_statistic(wins, losses, images, end) == pytest.approx(
                Z_95, abs=1e-3
            )


@pytest.mark.parametrize("tolerance", [0.01, 0.03])
@pytest.mark.parametrize("images", [20, 60, 299, 300, 305])
def test_at_most_5_percent_of_bundles_worse_by_the_tolerance_pass(
    images: int, tolerance: float
) -> None:
    """The exact probability for any share of images on which the bundles differ."""
    accepted = promoted(images, tolerance)
    for differing in (*np.geomspace(1.001 * tolerance, 0.6, 12),):
        losses = (differing + tolerance) / 2
        assert (
            table_probabilities(images, differing - losses, losses)[accepted].sum() <= ALPHA
        ), differing


@pytest.mark.parametrize(
    ("differing", "power"), [(0.03, 0.99), (0.05, 0.92), (0.07, 0.8), (0.1, 0.66)]
)
def test_three_points_better_with_300_images_passes_as_often_as_documented(
    differing: float, power: float
) -> None:
    wins = (differing + 0.03) / 2
    found = table_probabilities(300, wins, differing - wins)[promoted(300, 0.01)].sum()
    assert power <= found < power + 0.03

    # The most powerful test of this level, which knows the shares, passes hardly more (Neyman
    # and Pearson).
    best = stats.norm.cdf(0.04 / math.sqrt((differing - 0.0009) / 300) - stats.norm.isf(ALPHA))
    assert found > best - 0.05


def test_the_verdict_of_each_kind() -> None:
    cases = {
        (20, 3, 300): "better",
        (3, 20, 300): "worse",
        (0, 0, 320): "not worse",
        (0, 0, 200): "undecided",
        (12, 7, 300): "not worse",
        (10, 12, 300): "undecided",
        (9000, 9200, 400_000): "not worse",
    }
    assert {counts: decide(*counts, 0.01) for counts in cases} == cases


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
