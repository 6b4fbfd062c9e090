"""The order of labels: known photographs first; uncertain and different ones before others."""

import numpy as np
import pytest

from sopdeploy_service.labelling.folders import MAX_SPREAD, order_by_value


def two_classes(*probabilities: float) -> np.ndarray:
    """Probabilities (N, 2) whose first column is given."""
    return np.stack([probabilities, 1 - np.asarray(probabilities)], axis=1)


@pytest.mark.parametrize(
    ("probabilities", "known", "expected"),
    [
        ([], [], []),
        ([0.9], [True], [0]),
        ([0.99, 0.5], [True, True], [1, 0]),  # the uncertain one first
        ([0.5, 0.99], [False, True], [1, 0]),  # but known ones before it
        ([0.4, 0.5, 0.5], [True, True, True], [1, 0, 2]),  # a copy of the first one last
        ([0.8, 0.8, 0.8], [True, True, True], [0, 1, 2]),  # copies only
    ],
)
def test_small_cases_have_the_expected_order(probabilities, known, expected):
    found = order_by_value(two_classes(*probabilities), np.asarray(known, np.bool_))
    assert found.tolist() == expected


@pytest.mark.parametrize("count", [40, MAX_SPREAD + 100])
def test_each_photograph_occurs_once_and_the_order_is_the_same_each_time(count):
    logits = np.random.default_rng(0).normal(size=(count, 5)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    known = np.arange(count) % 10 > 0
    order = order_by_value(probabilities, known)
    assert sorted(order.tolist()) == list(range(count))
    assert known[order[: known.sum()]].all()
    assert order.tolist() == order_by_value(probabilities, known).tolist()


def test_the_first_photographs_come_from_all_regions_not_from_the_most_frequent_one():
    probabilities = np.zeros((103, 4))
    probabilities[:100, :2] = 0.5  # between two classes
    probabilities[100:, 2:] = 0.5  # between two others
    first = order_by_value(probabilities, np.ones(103, np.bool_))[:2]
    assert {index >= 100 for index in first.tolist()} == {False, True}
