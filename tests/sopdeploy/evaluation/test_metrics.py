"""Metrics computed by hand and by definition, detected sources, and views of an image."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.metrics import BINS, Score, classification_report
from sopdeploy.evaluation.sources import detect_source
from sopdeploy.images.preprocess import Preprocess, check_tta_mode, tta_views

LABELS = ("a", "b", "c")


def score(target: int, *probabilities: float) -> Score:
    ranked = sorted(enumerate(probabilities), key=lambda pair: -pair[1])
    return Score.from_ranking(target, ranked)


def test_a_report_on_four_images_computed_by_hand() -> None:
    rows = [(0, 0.7, 0.2, 0.1), (0, 0.3, 0.6, 0.1), (1, 0.1, 0.8, 0.1), (2, 0.5, 0.3, 0.2)]
    found = classification_report(LABELS, [score(*row) for row in rows])
    assert (found.count, found.top1.right, found.top1.share, found.top5.share) == (4, 2, 0.5, 1.0)
    assert found.confusion == ((1, 1, 0), (0, 1, 0), (1, 0, 0))
    assert [(one.label, one.count, one.answered, one.precision) for one in found.classes] == [
        ("a", 2, 2, 0.5),
        ("b", 1, 2, 0.5),
        ("c", 1, 0, None),
    ]
    assert [one.recall.share for one in found.classes] == [0.5, 1.0, 0.0]
    assert found.nll == pytest.approx(-np.mean(np.log([0.7, 0.3, 0.8, 0.2])))
    assert found.calibration.error == pytest.approx((0.3 + 0.6 + 0.2 + 0.5) / 4)
    assert found.top1.low < 0.5 < found.top1.high


def test_calibration_bins_include_their_upper_edge() -> None:
    scores = [Score(0, (0, 1), confidence, 0.5) for confidence in (1 / 15, 1 / 15 + 1e-9, 0.6, 1.0)]
    counts = [one.count for one in classification_report(("a", "b"), scores).calibration.curve]
    assert (len(counts), sum(counts)) == (BINS, 4)
    assert [place for place, count in enumerate(counts) if count] == [0, 1, 8, 14]


probability_rows = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.floats(0.01, 1), min_size=3, max_size=3)),
    min_size=1,
    max_size=40,
)


@given(probability_rows)
def test_metrics_follow_their_definitions(rows) -> None:
    scaled = [(target, np.asarray(row) / sum(row)) for target, row in rows]
    found = classification_report(LABELS, [score(target, *map(float, row)) for target, row in scaled])
    matrix = np.asarray(found.confusion)
    assert matrix.sum() == len(rows)
    assert found.top1.right == np.trace(matrix)
    assert [one.count for one in found.classes] == matrix.sum(axis=1).tolist()
    confidence = np.asarray([row.max() for _, row in scaled])
    right = np.asarray([int(row.argmax()) == target for target, row in scaled])
    wanted = 0.0
    for low in range(BINS):
        inside = (confidence > low / BINS) & (confidence <= (low + 1) / BINS)
        if inside.any():
            wanted += abs(confidence[inside].sum() - right[inside].sum()) / len(rows)
    assert found.calibration.error == pytest.approx(wanted, abs=2.0 / BINS / len(rows) + 1e-9)
    assert found.nll == pytest.approx(-np.mean([math.log(row[target]) for target, row in scaled]))


def test_a_probability_of_0_has_a_finite_loss() -> None:
    report = classification_report(("a", "b"), [Score(1, (0, 1), 1.0, 0.0)])
    assert report.nll == pytest.approx(708.4, abs=0.1)


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="no images to evaluate on"):
        classification_report(LABELS, [])


def test_sources_are_detected(tmp_path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    assert detect_source("http://host:8000") == detect_source("https://host") == "service"
    assert detect_source(str(tmp_path / "bundle")) == "bundle"
    assert detect_source("runs/a/best.pt") == "checkpoint"


@pytest.mark.parametrize(
    ("source", "message"),
    [("{tmp}", "it has no manifest.json"), ("ftp://host/x", "only services on http://")],
)
def test_an_unknown_source_is_refused(source, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        detect_source(source.format(tmp=tmp_path))


RULES = Preprocess(resize=12, crop=8)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))


def test_flip_gives_the_image_and_its_mirror() -> None:
    plain = RULES(IMAGE)
    found = tta_views(lambda rules: rules(IMAGE), RULES, "flip")
    assert np.array_equal(found, [plain, plain[:, ::-1]])
    assert np.array_equal(tta_views(lambda rules: rules(IMAGE), RULES, "none"), [plain])


def test_ten_crops_are_corners_center_and_their_mirrors() -> None:
    whole = np.asarray(IMAGE)
    found = tta_views(lambda rules: rules(IMAGE), RULES, "ten-crop")
    corners = [whole[:8, :8], whole[:8, 4:], whole[4:, :8], whole[4:, 4:]]
    assert np.array_equal(found[:5], [whole[2:10, 2:10], *corners])
    assert np.array_equal(found[5:], found[:5, :, ::-1])


@pytest.mark.parametrize(
    ("mode", "rules", "message"),
    [
        ("five", RULES, "--tta five: not one of none, flip, ten-crop"),
        ("ten-crop", Preprocess(resize=8, crop=8), "no corners to crop"),
    ],
)
def test_invalid_tta_modes_are_refused(mode, rules, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tta_mode(mode, rules)
