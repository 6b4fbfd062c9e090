"""The comparisons of `benchmarks/second_order_gain.py`."""

import numpy as np
import pytest
from gain.runs import describe_gain, equal_share

IMAGES = 100


def answers(wrong: int) -> dict[int, np.ndarray]:
    """Return the answers of one seed, of which the first *wrong* ones are wrong."""
    return {0: (np.arange(IMAGES) >= wrong).astype(float)}


@pytest.mark.parametrize(
    ("differing", "is_same"),
    [(0, True), (1, True), (2, False), (3, False)],  # 98 % equal is not more than 98 %
)
def test_network_that_answers_like_its_control_is_the_same_network(
    differing: int, is_same: bool
) -> None:
    described = describe_gain(answers(10 + differing), answers(10))
    assert ("same network" in described) == is_same
    assert f"{100 - differing}" in described


def test_equal_answers_are_counted_over_the_common_seeds() -> None:
    ours = {**answers(5), 1: np.ones(IMAGES)}
    assert equal_share(ours, answers(0)) == 0.95
    assert describe_gain({1: np.ones(IMAGES)}, answers(0)) == ""
