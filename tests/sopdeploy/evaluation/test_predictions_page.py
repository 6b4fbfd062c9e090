"""What the page says about confidence, and about many classes."""

import numpy as np
import pytest

from sopdeploy.evaluation.metrics import CONFIDENCES, ImageScore, classification_report
from sopdeploy.evaluation.predictions import (
    describe_thresholds,
    plot_recalls,
    tabulate_mistakes,
)


def scores_of(confidences: list[float], correct: list[bool]) -> list[ImageScore]:
    """Build predictions of two classes with these *confidences*; all images show the first one."""
    return [
        ImageScore(0, (0, 1) if right else (1, 0), confidence, 0.5)
        for confidence, right in zip(confidences, correct, strict=True)
    ]


def test_a_threshold_leaves_the_images_below_it_to_a_person() -> None:
    scores = scores_of([0.99, 0.9, 0.89, 0.4], [True, True, False, False])
    report = classification_report(("one", "other"), scores)
    rows = {
        row.confidence: (row.kept, row.right, row.left_to_person) for row in report.thresholds
    }
    assert list(rows) == list(CONFIDENCES)
    assert rows[0.5] == (3, 2, 1)
    assert rows[0.9] == (2, 2, 2)
    assert rows[0.99] == (1, 1, 3)

    section = describe_thresholds(report, scores)
    cells = {row[0]: row[1:] for row in section.tables[0].rows}
    assert cells["0.5"] == ("1 (25\N{NO-BREAK SPACE}%)", "2 of 3", "66.7\N{NO-BREAK SPACE}%")


@pytest.mark.parametrize(("count", "figures"), [(1, 1), (199, 1), (200, 3)])
def test_curves_need_enough_images(count: int, figures: int) -> None:
    confidences = np.linspace(0.5, 1.0, count).tolist()
    scores = scores_of(confidences, [number % 3 > 0 for number in range(count)])
    section = describe_thresholds(classification_report(("one", "other"), scores), scores)

    assert len(section.figures) == figures


@pytest.mark.parametrize(("num_classes", "bars"), [(3, 0), (30, 0), (31, 1), (60, 1)])
def test_classes_without_a_matrix_have_bars(num_classes: int, bars: int) -> None:
    labels = tuple(
        f"class {number:02d} with a long name in the folder" for number in range(num_classes)
    )
    scores = [ImageScore(number, (number,), 0.9, 0.9) for number in range(num_classes)]

    assert len(plot_recalls(classification_report(labels, scores))) == bars


def test_the_number_of_a_frequent_mistake_leads_to_its_photos() -> None:
    labels = tuple(f"class {number:02d}" for number in range(40))
    pairs = [(3, 4)] * 3 + [(7, 5)] * 2 + [(number, number) for number in range(40)]
    scores = [ImageScore(true, (predicted,), 0.9, 0.05) for true, predicted in pairs]
    links = {(3, 4): "mistake-3-4"}
    table = tabulate_mistakes(classification_report(labels, scores), links)

    assert table.rows == [("class 03", "class 04", 3), ("class 07", "class 05", 2)]
    assert table.links == {(0, 1): "mistake-3-4"}
