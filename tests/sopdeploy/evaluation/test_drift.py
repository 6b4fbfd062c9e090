"""The drift test: its false-alarm rate, what it detects, and its tail probabilities."""

import numpy as np
import pytest

from sopdeploy.evaluation.drift import SIGNIFICANCE, PredictionCounts, compare

SAMPLES = 1000


def alarm_rate(shares, reference, images, drifted=None) -> float:
    """Fraction of alarms over random references and predictions with *shares*, then *drifted*."""
    rng = np.random.default_rng(0)
    first = rng.multinomial(reference, shares, SAMPLES)
    second = rng.multinomial(images, shares if drifted is None else drifted, SAMPLES)
    p_values = [compare(one, two).p_value for one, two in zip(first, second, strict=True)]
    return float(np.mean(np.array(p_values) < SIGNIFICANCE))


def zipf(classes: int) -> np.ndarray:
    weights = 1 / np.arange(1, classes + 1)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("shares", "reference", "images"),
    [
        (zipf(2), 50, 100_000),
        (zipf(100), 100, 20_000),
        (np.full(1000, 0.001), 500, 1000),
        (zipf(1000), 50_000, 1000),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, np.ndarray) else str(value),
)
def test_without_drift_each_test_raises_at_most_its_share_of_false_alarms(shares, reference, images):
    # 0.005 + 3 standard deviations of 1,000 samples
    assert alarm_rate(shares, reference, images) <= SIGNIFICANCE + 0.0067


def test_a_class_that_becomes_twice_as_frequent_is_detected():
    drifted = np.full(10, 0.8 / 9)
    drifted[0] = 0.2
    assert alarm_rate(np.full(10, 0.1), 2000, 1000, drifted) > 0.99


def test_logits_are_counted_by_their_best_class_and_its_probability():
    counts = PredictionCounts(3)
    counts.add_logits(np.log([[0.25, 0.5, 0.25], [0.15, 0.25, 0.6], [1e-9, 1.0, 1e-9]]))
    assert counts.classes.tolist() == [0, 2, 1]
    assert np.flatnonzero(counts.confidences).tolist() == [5, 6, 16]
    drift = counts.compare(counts.reference())
    assert drift.num_images == 3
    assert drift.tests == {"classes": (0.0, 1.0), "confidences": (0.0, 1.0)}
    assert PredictionCounts(3).compare(counts.reference()).tests["classes"].p_value == 1.0
    far = PredictionCounts(3)
    far.add_logits(np.eye(3)[[0] * 60] * 9)
    near = PredictionCounts(3)
    near.add_logits(np.eye(3)[[1] * 60] * 9)
    assert far.compare(near.reference()).tests["classes"].distance == 1.0
    assert far.compare(near.reference()).tests["classes"].p_value < SIGNIFICANCE
