"""The drift test: its false-alarm rate, what it detects, and its tail probabilities."""

import numpy as np
import pytest
from scipy.stats import chi2

from sopdeploy.decision import Decision, sigmoid
from sopdeploy.evaluation.drift import (
    FALSE_ALARMS,
    PredictionCounts,
    PresenceCounts,
    chi_square_tail,
    compare,
    compare_counts,
    counts_for,
)
from sopdeploy.evaluation.multi_label import fit_presence

SAMPLES = 1000


def alarm_rate(shares, reference, images, drifted=None) -> float:
    """Fraction of alarms over random references and predictions with *shares*, then *drifted*."""
    rng = np.random.default_rng(0)
    first = rng.multinomial(reference, shares, SAMPLES)
    second = rng.multinomial(images, shares if drifted is None else drifted, SAMPLES)
    return float(np.mean([compare(one, two).alarm for one, two in zip(first, second, strict=True)]))


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
    assert alarm_rate(shares, reference, images) <= FALSE_ALARMS / 2 + 0.0067


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
    assert (drift.images, drift.alarm) == (3, False)
    assert drift.tests == {"classes": (0.0, 1.0), "confidences": (0.0, 1.0)}
    assert PredictionCounts(3).compare(counts.reference()).alarm is False
    far = PredictionCounts(3)
    far.add_logits(np.eye(3)[[0] * 60] * 9)
    near = PredictionCounts(3)
    near.add_logits(np.eye(3)[[1] * 60] * 9)
    assert far.compare(near.reference()).tests["classes"].distance == 1.0
    assert far.compare(near.reference()).alarm


def scenes(rng, images: int, classes: int, more: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw targets and logits (images, classes) of dependent classes; the first is *more* frequent."""
    rates = np.linspace(0.05, 0.4, classes)
    rates[0] += more
    together = rng.random((images, 1)) < 0.3  # in such images every class is more frequent
    targets = rng.random((images, classes)) < rates * np.where(together, 1.5, 1.0)
    return targets, rng.normal(size=targets.shape) + np.where(targets, 1.5, -1.5)


def presence_alarms(classes: int, held_out: int, images: int, more: float = 0.0) -> float:
    """Fraction of alarms of multi-label networks, whose thresholds are fitted to the held-out images."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(SAMPLES // 5):
        targets, logits = scenes(rng, held_out, classes)
        decision = fit_presence(targets.astype(np.float64), sigmoid(logits))
        counts = counts_for(decision, classes)
        counts.add_logits(scenes(rng, images, classes, more)[1])
        alarms += compare_counts(counts, decision).alarm
    return alarms / (SAMPLES // 5)


@pytest.mark.parametrize(("classes", "held_out", "images"), [(3, 200, 1000), (20, 300, 300)])
def test_without_drift_several_classes_per_image_raise_the_same_false_alarms(classes, held_out, images):
    # 0.01 + 3 standard deviations of 200 samples
    assert presence_alarms(classes, held_out, images) <= FALSE_ALARMS + 0.021


def test_a_class_that_is_present_more_often_is_detected():
    assert presence_alarms(20, 1000, 500, more=0.15) > 0.95


def test_present_classes_are_counted_by_class_and_per_image():
    counts = PresenceCounts([0.5, 0.9, 0.1])
    counts.add_logits(np.array([[1.0, 1.0, 1.0], [-9.0, -9.0, -9.0], [9.0, 9.0, -9.0], [0.0, -9.0, -9.0]]))
    assert counts.classes.tolist() == [3, 1, 1]
    assert (counts.images, counts.per_image[:4].tolist()) == (4, [1, 1, 2, 0])
    drift = counts.compare(counts.reference())
    assert drift.tests == {"classes": (0.0, 1.0), "per_image": (0.0, 1.0)}
    many = PresenceCounts([0.5] * 30)
    many.add_logits(np.full((2, 30), 5.0))
    assert many.per_image.tolist() == [0] * 10 + [2]


def test_a_reference_belongs_to_the_activation():
    decision = fit_presence(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.9, 0.2], [0.1, 0.8]]))
    assert Decision.model_validate_json(decision.model_dump_json()) == decision
    assert compare_counts(counts_for(Decision(), 2), Decision()) is None
    for wrong in (
        {"reference": decision.reference},
        {"activation": "sigmoid", "thresholds": (0.5, 0.5), "reference": PredictionCounts(2).reference()},
    ):
        with pytest.raises(ValueError, match="reference: belongs to another activation"):
            Decision(**wrong)


@pytest.mark.parametrize("degrees", [1, 2, 9, 100, 999])
def test_the_approximated_tail_is_close_to_the_exact_one(degrees):
    for level in (0.3, 0.01, 0.005):
        assert chi_square_tail(chi2.isf(level, degrees), degrees) == pytest.approx(level, rel=0.07)
    assert chi_square_tail(3.0, 0) == 1.0
