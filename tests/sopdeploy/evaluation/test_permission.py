"""Which bundles may replace the live one: the level, the shrinking tolerance, the labels that are missing."""

import numpy as np
import pytest
from scipy import stats

from sopdeploy.evaluation.permission import (
    MIN_IMAGES,
    Counts,
    proves_class_loss,
    rule_of_all,
    rule_of_old,
)
from sopdeploy.evaluation.statistics import score_statistic


def share_that_passes(images: int, wins: float, losses: float) -> float:
    """The exact probability that the rule for all photographs passes, with these shares of changes."""
    rule = rule_of_all(5, 1)
    probability = 0.0
    for lost in range(images + 1):
        of_losses = stats.binom.pmf(lost, images, losses)
        if of_losses < 1e-6:
            continue
        needed = next(
            (
                won
                for won in range(images - lost + 1)
                if rule.bound(Counts(images, won, lost)).passes
            ),
            images + 1,
        )
        probability += of_losses * stats.binom.sf(
            needed - 1, images - lost, wins / (1 - losses)
        )
    return float(probability)


@pytest.mark.parametrize("images", [20, 60, 100])
@pytest.mark.parametrize("differing", [0.1, 0.3])
def test_a_bundle_that_is_worse_by_the_limit_passes_in_about_5_percent(
    images: int, differing: float
) -> None:
    limit = -rule_of_all(5, 1).limit(images)
    losses = (differing + limit) / 2
    assert share_that_passes(images, differing - losses, losses) < 0.06


@pytest.mark.parametrize(
    ("images", "difference", "smallest", "largest"),
    [(100, 0.0, 0.38, 0.6), (100, -0.03, 0.0, 0.15), (100, -0.08, 0.0, 0.01)],
)
def test_as_many_bundles_pass_as_the_goals_ask_for(
    images: int, difference: float, smallest: float, largest: float
) -> None:
    wins = (0.1 + difference) / 2
    assert smallest <= share_that_passes(images, wins, wins - difference) <= largest


def test_two_thirds_of_the_tolerance_remain_with_ten_times_as_many_photographs() -> None:
    rule = rule_of_all(5, 1)
    limits = [rule.limit(images) for images in (100, 1_000, 10_000)]
    assert limits == pytest.approx([-0.05, -0.1 / 3, -0.2 / 9])
    assert rule.limit(20) == rule.limit(60)
    assert rule_of_old(5).limit(100) == pytest.approx(-0.1)


@pytest.mark.parametrize("attempt", [1, 5])
def test_the_bound_is_where_the_score_test_begins_to_reject(attempt: int) -> None:
    rule = rule_of_all(5, attempt)
    bound = rule.bound(Counts(200, 12, 9))
    assert score_statistic(12, 9, 200, bound.low) == pytest.approx(rule.quantile, abs=1e-3)
    assert bound.low < bound.difference


def test_too_few_photographs_never_pass() -> None:
    rule = rule_of_all(5, 1)
    few = Counts(MIN_IMAGES - 1, MIN_IMAGES - 1, 0)
    assert not rule.bound(few).passes
    assert rule.labels_to_pass(few) == 1


@pytest.mark.parametrize(("wins", "losses"), [(8, 6), (12, 10)])
def test_as_many_labels_as_stated_let_most_bundles_pass(wins: int, losses: int) -> None:
    rule = rule_of_all(5, 1)
    more = rule.labels_to_pass(Counts(100, wins, losses))
    assert more is not None
    random = np.random.default_rng(0)
    shares = (wins / 100, losses / 100, 1 - (wins + losses) / 100)
    drawn = random.multinomial(100 + more, shares, 400)
    passed = [
        rule.bound(Counts(100 + more, won, lost)).passes for won, lost, _ in drawn.tolist()
    ]
    assert np.mean(passed) > 0.7


@pytest.mark.parametrize(
    ("images", "wins", "losses"), [(200, 2, 22), (200, 20, 20), (59, 0, 6), (18, 0, 6)]
)
def test_no_number_is_stated_that_nobody_would_label_for_one_decision(
    images: int, wins: int, losses: int
) -> None:
    assert rule_of_all(5, 1).labels_to_pass(Counts(images, wins, losses)) is None


@pytest.mark.parametrize(
    ("images", "wins", "losses", "is_refused"),
    [
        (20, 0, 12, True),  # of the photographs of a class: 60 points
        (140, 4, 20, False),  # significant (p = 0.002), 11 points
        (140, 4, 36, True),  # 23 points
        (1_400, 40, 110, False),  # 5 points
        (140, 0, 0, False),
    ],
)
def test_a_class_refuses_only_a_loss_that_is_proved_to_be_over_10_points(
    images: int, wins: int, losses: int, is_refused: bool
) -> None:
    assert proves_class_loss(Counts(images, wins, losses), 5.0, num_classes=7) is is_refused
    assert not proves_class_loss(Counts(images, wins, losses), 50.0, num_classes=7)
