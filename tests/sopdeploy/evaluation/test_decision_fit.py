"""The fit of temperature, score and rejection threshold to held-out predictions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sopdeploy.decision import Decision, known_score
from sopdeploy.evaluation.decision_fit import fit_decision, fit_temperature

Predictions = tuple[NDArray[np.float64], NDArray[np.int64]]


def calibrated(images: int, classes: int = 10, seed: int = 0) -> Predictions:
    """Draw logits (N, C) and targets (N,) from their own softmax, so that a temperature of 1 is right."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(images, classes))
    noise = generator.gumbel(size=logits.shape)
    return logits, (logits + noise).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.4, 1.7, 6.0])
def test_the_fit_finds_the_temperature_that_scaled_the_logits(temperature: float) -> None:
    logits, targets = calibrated(4000)
    fitted = fit_decision(logits * temperature, targets, estimated_on="held-out").calibration
    assert fitted is not None
    assert fitted.temperature == pytest.approx(temperature, rel=0.05)
    assert fitted.error_after < fitted.error_before / 4
    assert (fitted.num_images, fitted.estimated_on) == (4000, "held-out")


def all_correct() -> Predictions:
    logits, _ = calibrated(200)
    return logits, logits.argmax(axis=1)


def unrelated() -> Predictions:
    logits, _ = calibrated(2000)
    return logits, calibrated(2000, seed=1)[1]


@pytest.mark.parametrize(
    "predictions",
    [all_correct, unrelated, lambda: calibrated(60, seed=1)],
    ids=["all correct", "chance", "few"],
)
def test_the_temperature_stays_one_where_the_data_do_not_determine_it(predictions: object) -> None:
    assert callable(predictions)
    assert fit_temperature(*predictions()) == 1.0


@pytest.mark.parametrize(("images", "classes"), [(49, 10), (300, 1)])
def test_nothing_is_fitted_to_few_images_or_to_one_class(images: int, classes: int) -> None:
    assert fit_decision(*calibrated(images, classes), estimated_on="held-out") == Decision()


def test_a_classifier_that_cannot_be_scaled_keeps_its_probabilities_and_gets_a_threshold() -> None:
    logits, targets = calibrated(500)
    decision = fit_decision(3 * logits, targets, estimated_on="held-out", scalable=False)
    assert decision.calibration is not None
    assert decision.rejection is not None
    assert decision.calibration.temperature == 1.0


@pytest.mark.parametrize(("images", "accepts"), [(50, 0.99), (5000, 1.0)])
def test_a_threshold_needs_enough_images_for_its_quantile(images: int, accepts: float) -> None:
    logits, targets = calibrated(images)
    assert fit_decision(logits, targets, estimated_on="held-out", accepts=accepts).rejection is None


def test_a_threshold_that_accepts_almost_nothing_is_the_largest_score() -> None:
    logits, targets = all_correct()
    rejection = fit_decision(logits, targets, estimated_on="held-out", accepts=1e-13).rejection
    assert rejection.threshold == known_score(logits, rejection.score).max()


@pytest.mark.parametrize(("images", "accepts"), [(60, 0.8), (1000, 0.95)])
def test_the_threshold_accepts_at_least_the_requested_fraction_of_other_known_images_on_average(
    images: int, accepts: float
) -> None:
    accepted = []
    for seed in range(40):
        options = {"accepts": accepts, "scalable": False, "refitted": {"max_probability": 0.9}}
        rejection = fit_decision(*calibrated(images, seed=seed), estimated_on="held-out", **options).rejection
        assert rejection is not None
        others = calibrated(2000, seed=1000 + seed)[0]
        accepted.append(float((known_score(others, rejection.score) >= rejection.threshold).mean()))
    assert accepts - 0.01 < float(np.mean(accepted)) < accepts + 1 / images + 0.01


def test_the_interval_holds_the_accepted_share_of_as_many_new_images() -> None:
    inside, images = 0, 100
    for seed in range(200):
        options = {"scalable": False, "refitted": {"max_probability": 0.9}}
        rejection = fit_decision(*calibrated(images, seed=seed), estimated_on="held-out", **options).rejection
        assert rejection is not None
        assert rejection.accepted is not None
        others = calibrated(images, seed=1000 + seed)[0]
        share = float((known_score(others, rejection.score) >= rejection.threshold).mean())
        inside += rejection.accepted[0] <= share <= rejection.accepted[1]
    assert 188 <= inside < 200


def test_two_classes_have_no_leave_one_class_out_estimate() -> None:
    rejection = fit_decision(*calibrated(200, classes=2), estimated_on="held-out").rejection
    assert rejection is not None
    assert (rejection.score, rejection.auroc) == ("max_probability", None)
