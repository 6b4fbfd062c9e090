"""Statistics against published values, against scipy, and against what must hold for any numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sopdeploy.evaluation.statistics import (
    Interval,
    bootstrap,
    mcnemar,
    mean_and_sd,
    paired,
    t_quantile,
    wilson,
)

SHARES = st.floats(-1, 1, allow_nan=False, allow_subnormal=False)


@pytest.mark.parametrize(
    ("freedom", "share", "published"),
    [
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (4, 0.975, 2.776),
        (9, 0.975, 2.262),
        (30, 0.975, 2.042),
        (4, 0.5, 0.0),
        (10**9, 0.975, 1.959964),
    ],
)
def test_quantiles_of_t_are_those_of_the_printed_tables(freedom, share, published) -> None:
    assert t_quantile(share, freedom) == pytest.approx(published, abs=5e-4)


@settings(deadline=None)
@given(share=st.floats(0.55, 0.9999), freedom=st.integers(1, 10_000))
def test_quantiles_of_t_agree_with_another_library(share, freedom) -> None:
    assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(("share", "freedom"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_refused(share, freedom) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(share, freedom)


@settings(deadline=None)
@given(st.lists(SHARES, min_size=2, max_size=30))
def test_a_paired_interval_is_the_t_test_of_another_library(differences) -> None:
    found = paired(differences)
    assert found.wins + found.ties + found.losses == len(differences)
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-12)
    if found.sd < 1e-9:
        assert found.interval.high - found.interval.low <= 2e-8
        return
    wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((wanted.low, wanted.high), rel=1e-6, abs=1e-9)


def test_a_worked_example_of_five_pairs() -> None:
    found = paired([0.01, 0.02, 0.03, 0.04, 0.0])
    assert found.mean == pytest.approx(0.02)
    assert found.sd == pytest.approx(math.sqrt(0.001 / 4))
    assert found.interval == pytest.approx((0.02 - 0.0196324, 0.02 + 0.0196324), abs=1e-6)
    assert (found.wins, found.ties, found.losses) == (4, 1, 0)
    assert not found.interval.covers(0.0)
    assert paired([0.01, -0.01]).interval.covers(0.0)


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        paired([0.1])
    assert mean_and_sd([0.1]) == (0.1, 0.0)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_sign_test(first, second) -> None:
    wanted = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_ten_to_one_by_hand() -> None:
    assert mcnemar(10, 1) == pytest.approx(2 * (1 + 11) / 2**11)


@pytest.mark.parametrize(
    ("agree", "images", "low", "high"),
    [(50, 50, 0.9287, 1.0), (0, 50, 0.0, 0.0713), (95, 100, 0.8882, 0.9785), (0, 0, 0.0, 1.0)],
)
def test_wilsons_interval_is_the_published_one(agree, images, low, high) -> None:
    assert wilson(agree, images) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_wilsons_interval_is_that_of_another_library(right, wrong) -> None:
    found = wilson(right, right + wrong)
    if right + wrong == 0:
        assert found == (0.0, 1.0)
        return
    wanted = stats.binomtest(right, right + wrong).proportion_ci(method="wilson")
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-7)


def test_a_bootstrap_covers_the_mean_and_repeats_itself() -> None:
    gains = np.random.default_rng(3).choice([-1, 0, 1], size=(5, 300), p=[0.02, 0.9, 0.08]).astype(np.int8)
    found = bootstrap(gains, draws=500)
    assert found == bootstrap(gains, draws=500)
    assert found.covers(float(gains.mean()))
    assert found != bootstrap(gains, draws=500, seed=1)


def test_a_bootstrap_spreads_as_much_as_pictures_and_seeds_do() -> None:
    rng = np.random.default_rng(0)
    pictures = np.tile(rng.choice([-1, 1], size=(1, 400)), (4, 1)).astype(np.int8)
    expected = 2 * 1.96 / math.sqrt(400)  # seeds that agree add nothing
    found = bootstrap(pictures)
    assert found.high - found.low == pytest.approx(expected, rel=0.12)
    nothing = bootstrap(np.zeros((3, 50), dtype=np.int8), draws=10)
    assert nothing == Interval(0.0, 0.0)
    same = bootstrap(np.ones((3, 50), dtype=np.int8), draws=10)
    assert same == pytest.approx((1.0, 1.0))
