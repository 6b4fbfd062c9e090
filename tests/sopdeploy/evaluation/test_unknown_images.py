"""Folders of unknown images: they choose score and threshold, and other ones test it."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.decision import Rejection, known_score
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.decision_fit import (
    UnknownLogits,
    choose_rejected,
    describe_weakness,
    fit_decision,
)
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.painted import SMALL, paint

NOTHING = np.zeros((0, 3))


def peaks(heights: list[float], base: float = 0.0) -> np.ndarray:
    """Logits (N, 3) with one peak of the given height above *base*."""
    logits = np.full((len(heights), 3), base)
    logits[np.arange(len(heights)), np.arange(len(heights)) % 3] += heights
    return logits


@pytest.mark.parametrize(
    ("unknown", "score", "rejected"),
    [
        (peaks([0.0] * 10), "max_probability", 1),  # no known image has such a score
        (peaks([3.25] * 10), "max_probability", 4),  # as some known ones: as many as allowed
        (peaks([9.0] * 10), "max_probability", 1),  # not recognized by any threshold
        (peaks([5.0] * 10, base=-9.0), "energy", 1),  # only the sum of the logits differs
    ],
)
def test_unknown_images_choose_the_score_and_how_many_known_ones_are_rejected(unknown, score, rejected):
    known = peaks(list(np.linspace(3.0, 8.0, 50)))
    assert choose_rejected(known, unknown, 4) == (score, rejected)


def known_images(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    targets = np.arange(count) % 3
    return random.normal(size=(count, 3)) + 5 * np.eye(3)[targets], targets


@pytest.mark.parametrize("scalable", [True, False])
def test_the_images_that_test_the_threshold_have_no_part_in_setting_it(scalable):
    logits, targets = known_images()
    setting = np.random.default_rng(1).normal(size=(40, 3))

    def fit(unknown):
        options = {"estimated_on": "held-out", "scalable": scalable}
        return fit_decision(logits, targets, unknown=unknown, **options)

    tests = {"same": setting, "known": logits[:40], "none": NOTHING}
    found = {name: fit(UnknownLogits(setting, testing)) for name, testing in tests.items()}
    rules = {name: decision.rejection for name, decision in found.items()}
    assert len({(rule.score, rule.threshold, rule.accepts) for rule in rules.values()}) == 1
    assert rules["none"].recognized == (0, 0)
    counts = {name: rule.recognized for name, rule in rules.items()}
    assert (counts["same"][0] > 30, counts["known"][0] < 5) == (True, True)
    scaled = known_score(setting / found["same"].temperature, rules["same"].score)
    assert counts["same"] == ((scaled < rules["same"].threshold).sum(), 40)
    without = fit(None).rejection
    assert without.recognized is None
    assert rules["same"].accepts >= without.accepts
    rows = dict(found["same"].rows())
    assert rows["recognized unknown images"].startswith(f"{counts['same'][0]} of 40 images of your folder")


def test_without_images_that_set_it_the_threshold_stays_as_it_is():
    logits, targets = known_images()
    testing = np.random.default_rng(1).normal(size=(40, 3))
    plain = fit_decision(logits, targets, estimated_on="held-out").rejection
    tested = fit_decision(
        logits, targets, estimated_on="held-out", unknown=UnknownLogits(NOTHING, testing)
    ).rejection
    assert tested.model_copy(update={"recognized": None}) == plain
    assert tested.recognized[1] == 40


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (None, None, ""),
        (None, (0, 0), ""),
        (None, (5, 9), ""),
        (None, (0, 9), "only 0 of 9 unknown images are recognized; add"),
        ((38, 40), (7, 40), "only 7 of 40 unknown images are recognized, 38 of 40 before; add"),
        ((38, 40), (24, 40), "only 24 of 40 unknown images are recognized, 38 of 40 before; add"),
        ((38, 40), (34, 40), ""),
    ],
)
def test_a_low_or_fallen_share_of_recognized_images_is_a_warning(before, now, found):
    was, rule = (Rejection(score="energy", threshold=0.0, recognized=one) for one in (before, now))
    assert describe_weakness(rule, was).startswith(found)
    assert bool(describe_weakness(rule, was)) == bool(found)


def stripes(folder, count: int):
    """Write *count* striped images, which show no color of `paint`."""
    folder.mkdir()
    for number in range(count):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[:: 2 + number % 5] = 255 - number
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def labelled_twice(photos):
    """Give the images of *photos* several classes."""
    classes = "|".join(sorted(path.name for path in photos.iterdir()))
    rows = [f"{path.relative_to(photos)},{classes}" for path in sorted(photos.rglob("*.png"))]
    (photos / "labels.csv").write_text("\n".join(["file,classes", *rows]))
    return photos


@pytest.mark.parametrize(
    "procedure",
    [
        "few_shot",
        pytest.param("loop", marks=pytest.mark.slow),
    ],
)
def test_train_reports_how_many_unknown_images_it_recognizes(tmp_path, procedure):
    photos, unknown = paint(tmp_path / "photos", 17), stripes(tmp_path / "photos-unknown", 12)
    if procedure == "loop":
        paint(tmp_path / "data" / "train", 4)
        photos.rename(tmp_path / "data" / "val")
        photos = tmp_path / "data"
    settings = [*SMALL, f"data.path={photos}", f"procedure.kind={procedure}", f"rejection.unknown={unknown}"]
    recipe = read_recipe("photos", [*settings, "epochs=1"])
    result = train_recipe(recipe, tmp_path / "run")
    count, tested = result.decision.rejection.recognized
    assert 0 < tested < 12
    assert 0 <= count <= tested
    assert read_checkpoint(result.best).decision == result.decision


def test_a_folder_that_cannot_be_used_is_refused_before_the_training(tmp_path):
    photos = paint(tmp_path / "photos", 3)
    (tmp_path / "empty").mkdir()
    cases = {"none": "no such folder", "empty": "holds no images"}
    for name, message in cases.items():
        recipe = read_recipe(
            "photos", [*SMALL, f"data.path={photos}", f"rejection.unknown={tmp_path / name}"]
        )
        with pytest.raises(DataError, match=message):
            train_recipe(recipe, tmp_path / "run")
        assert not (tmp_path / "run" / "best.pt").exists()
    result = CliRunner().invoke(
        app,
        ["train", "--data", str(photos), "--unknown", str(tmp_path / "none"), "--out", str(tmp_path / "run")],
    )
    assert result.exit_code == 2
    assert "no such folder" in result.stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "a.jpg").write_bytes(b"no picture")
    recipe = read_recipe("photos", [*SMALL, f"data.path={photos}", f"rejection.unknown={damaged}"])
    with pytest.raises(DataError, match=r"a\.jpg"):
        train_recipe(recipe, tmp_path / "run")
    recipe = read_recipe(
        "photos", [*SMALL, f"data.path={labelled_twice(photos)}", f"rejection.unknown={photos}"]
    )
    with pytest.raises(ConfigError, match="without effect where images have several classes"):
        train_recipe(recipe, tmp_path / "run")
