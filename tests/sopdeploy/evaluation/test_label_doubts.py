"""Labels are doubted only if right labels do not explain how many are contradicted."""

import numpy as np
import pytest

from sopdeploy.evaluation.label_doubts import (
    describe_unjudged,
    find_label_doubts,
    find_suspects,
)
from sopdeploy.evaluation.metrics import wilson
from sopdeploy.evaluation.multi_label import MeanPrecision

# Strongly and weakly contradicted labels of 60, and how many are listed
CONTRADICTED = {
    "none": (0, 5, 0),
    "one of one": (1, 0, 0),
    "two of two": (2, 0, 2),
    "a few of many": (3, 9, 0),
    "most": (6, 4, 6),
    "all": (9, 0, 9),
}


@pytest.mark.parametrize(("strong", "weak", "listed"), CONTRADICTED.values(), ids=CONTRADICTED)
def test_no_label_is_listed_where_errors_explain_the_list(strong: int, weak: int, listed: int):
    labels = np.arange(60) % 3
    margins = np.full(60, 4.0)
    margins[:strong] = -6.0
    margins[strong : strong + weak] = -0.5
    logits = np.zeros((60, 3))
    logits[np.arange(60), labels] = margins
    logits[np.arange(60), (labels + 1) % 3] = 0.1
    doubts = find_label_doubts(logits, labels)

    assert np.flatnonzero(doubts.listed).tolist() == list(range(listed))


def test_copies_of_a_photograph_are_one_error():
    labels = np.arange(60) % 3
    logits = np.where(labels[:, None] == np.arange(3), 4.0, 0.0)
    logits[:12] = np.where(labels[:12, None] == np.arange(3), -0.5, 0.1)  # weak errors
    logits[:3] = np.where(labels[:3, None] == np.arange(3), -6.0, 0.1)
    copied = [np.repeat(of_images, 3, axis=0) for of_images in (logits, labels)]

    assert find_label_doubts(*copied).listed.sum() == 9
    assert not find_label_doubts(*copied, np.repeat(np.arange(60), 3)).listed.any()


def test_the_interval_of_a_perfect_ranking_has_a_width():
    true = np.arange(36)[:, None] % 3 == np.arange(3)
    scores = true.astype(np.float64)
    for groups, units in ((None, 36), (np.arange(36) // 3, 12)):
        found = MeanPrecision.of(true, scores, 0, groups)
        assert (found.value, found.high) == (1.0, 1.0)
        assert found.low == pytest.approx(wilson(units, units).low)


# Shares of images that are classified as their label says, and whether wrong labels can be found
@pytest.mark.parametrize(("share", "is_told"), [(0.5, True), (0.75, True), (0.8, False)])
def test_it_is_told_that_labels_cannot_be_judged_at_a_low_accuracy(share, is_told) -> None:
    labels = np.repeat(np.arange(4), 25)
    predicted = np.where(np.arange(100) % 20 < 20 * share, labels, (labels + 1) % 4)
    logits = np.eye(4)[predicted]
    doubts = find_label_doubts(logits, labels)
    assert not doubts.listed.any()

    said = describe_unjudged(doubts)

    assert bool(said) == is_told
    assert not is_told or f"{100 * share:.0f} % of the labels" in said
    listed = doubts._replace(listed=np.arange(100) == 3)
    assert describe_unjudged(listed) == ""


def test_a_class_of_two_images_does_not_contradict_all_others() -> None:
    labels = np.repeat([0, 1], [98, 2])
    # Without margins, each image is rather of the class of two, but least of all one of the first
    logits = np.where(labels == 0, 1.0, 9.0)[:, None] * [0.0, 1.0]
    logits[:30, 1] = 1.5
    doubts = find_label_doubts(logits, labels)
    assert not doubts.listed.any()
    assert (doubts.probabilities.argmax(axis=1) == labels).mean() == 0.02

    said = describe_unjudged(doubts)

    assert "70 %" in said


def test_the_most_contradicted_labels_are_suspects_where_none_can_be_judged() -> None:
    labels = np.repeat(np.arange(4), 25)
    random = np.random.default_rng(0)
    logits = random.normal(scale=0.7, size=(100, 4))
    logits[np.arange(100), labels] += 1.0
    for wrong in (7, 60):
        logits[wrong] = [0.0, 0.0, 0.0, 4.0]
    doubts = find_label_doubts(logits, labels)

    suspects = find_suspects(doubts)

    assert not doubts.listed.any()
    assert {*suspects[:2].tolist()} == {7, 60}
    assert len(suspects) == 5
    assert not len(find_suspects(doubts._replace(listed=np.arange(100) == 3)))
