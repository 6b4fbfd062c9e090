"""Classes that seem to be exchanged, by their confusion."""

import pytest

from sopdeploy.evaluation.exchanged import describe_exchanged

LABELS = ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("confusion", "named"),
    [
        ([[9, 1, 0], [1, 9, 0], [0, 0, 9]], []),
        ([[1, 9, 0], [9, 1, 0], [0, 0, 9]], [("cat", "dog")]),
        ([[0, 9, 0], [0, 1, 9], [8, 0, 1]], [("cat", "dog", "owl")]),
        ([[0, 2, 0], [2, 0, 0], [0, 0, 9]], []),  # too few images
        ([[0, 3, 0], [3, 0, 0], [0, 0, 9]], [("cat", "dog")]),
        ([[5, 5, 0], [5, 5, 0], [0, 0, 9]], []),  # a network that cannot tell them apart
        ([[0, 9, 0], [0, 9, 0], [0, 0, 9]], []),  # a class that is never predicted
        ([[0, 9, 0], [9, 0, 0], [0, 12, 0]], []),  # few of what is predicted as dog are cats
        ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], []),
    ],
)
def test_a_circle_of_classes_is_named(
    confusion: list[list[int]], named: list[tuple[str, ...]]
) -> None:
    lines = describe_exchanged(LABELS, confusion)
    assert len(lines) == len(named)
    for line, names in zip(lines, named, strict=True):
        assert all(name in line for name in names)
