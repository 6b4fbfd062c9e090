"""Temperature, score and threshold: their fit, `eval --fit-decision`, and folders of unknown images."""

import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import sopdeploy
from sopdeploy.bundle.decision import (
    Calibration,
    Decision,
    Rejection,
    have_answers,
    log_sum_exp,
    most_probable,
)
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import SopdeployError
from sopdeploy.evaluation.decision_fit import (
    describe_weakness,
    fit_decision,
    fit_temperature,
    new_class_interval,
)
from sopdeploy.evaluation.known_threshold import choose_threshold, threshold_rank
from sopdeploy.evaluation.metrics import log_loss
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import (
    Checkpoint,
    build_classifier,
    read_checkpoint,
    write_checkpoint,
)
from sopdeploy_commands.verify import verify
from tests.sopdeploy.training.runs import SMALL, paint

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
    assert fitted.loss_after == pytest.approx(log_loss(logits, targets), rel=0.01)
    assert fitted.loss_after < fitted.loss_before
    assert (fitted.num_images, fitted.estimated_on) == (4000, "held-out")


LOGITS = calibrated(2000)[0]
UNDETERMINED = {
    "all correct": (LOGITS[:200], LOGITS[:200].argmax(axis=1)),
    "chance": (LOGITS, calibrated(2000, seed=1)[1]),
    "few": calibrated(60, seed=1),
}


@pytest.mark.parametrize("case", UNDETERMINED)
def test_the_temperature_stays_one_where_the_data_do_not_determine_it(case: str) -> None:
    assert fit_temperature(*UNDETERMINED[case]) == 1.0


def test_what_is_fitted_depends_on_the_number_of_images_and_classes() -> None:
    """Fifty images and two classes for anything, enough images for the quantile of the threshold."""
    fitted = {"temperature, threshold": (500, 10, 0.95), "temperature": (50, 10, 0.99)}
    fitted |= {
        "nothing": (49, 10, 0.95),
        "nothing for one class": (300, 1, 0.95),
        "accepts all": (500, 10, 1.0),
    }

    for name, (images, classes, accepts) in fitted.items():
        found = fit_decision(
            *calibrated(images, classes), estimated_on="held-out", accepts=accepts
        )
        assert (found.calibration is None) == ("nothing" in name), name
        assert (found.rejection is not None) == ("threshold" in name), name


def test_a_classifier_that_cannot_be_scaled_gets_a_threshold() -> None:
    logits, targets = calibrated(500)
    decision = fit_decision(3 * logits, targets, estimated_on="held-out", scalable=False)

    assert decision.temperature == 1.0
    assert decision.rejection is not None


@pytest.mark.parametrize(("images", "accepts"), [(60, 0.8), (1000, 0.95)])
def test_the_threshold_accepts_at_least_the_requested_fraction_on_average(
    images: int, accepts: float
) -> None:
    accepted = []
    for seed in range(40):
        options = {"accepts": accepts, "scalable": False}
        rejection = fit_decision(
            *calibrated(images, seed=seed), estimated_on="held-out", **options
        ).rejection
        assert rejection is not None
        others = calibrated(2000, seed=1000 + seed)[0]
        accepted.append(float((log_sum_exp(others) >= rejection.threshold).mean()))

    assert accepts - 0.01 < float(np.mean(accepted)) < accepts + 1 / images + 0.01


@pytest.mark.parametrize(
    ("limit", "is_known"), [(-np.inf, True), (None, True), (np.inf, False)]
)
def test_an_image_exactly_at_the_threshold_is_known(
    limit: float | None, is_known: bool
) -> None:
    logits = np.array([1.0, 2.0, 4.0])
    score = float(log_sum_exp(logits))
    threshold = score if limit is None else float(np.nextafter(score, limit))
    answer = Decision(rejection=Rejection(threshold=threshold)).answer(logits)

    assert (answer.known, answer.score) == (is_known, score)


def test_a_class_exactly_at_its_threshold_is_present() -> None:
    above = float(np.nextafter(0.5, 1))
    decision = Decision(activation="sigmoid", thresholds=(0.5, above))

    assert decision.answer(np.zeros(2)).ranked == ((0, 0.5),)
    assert decision.answer(np.zeros(2), threshold=0.5).ranked == ((0, 0.5), (1, 0.5))


def test_the_interval_holds_the_accepted_share_of_as_many_new_images() -> None:
    images = 100
    inside = 0
    for seed in range(200):
        known, targets = calibrated(images, seed=seed)
        new, _ = calibrated(images, seed=1000 + seed)
        rule = fit_decision(known, targets, estimated_on="held-out", scalable=False).rejection
        assert rule is not None
        assert rule.accepted is not None

        low, high = rule.accepted
        share = float((log_sum_exp(new) >= rule.threshold).mean())
        inside += low <= share <= high

    # Of 200 intervals of 95 %, 190 are expected.
    assert 188 <= inside < 200


LABELS = ("cat", "ant")  # not sorted, as in files of other projects
RULES = Preprocess(resize=8, crop=8, interpolation="bilinear")
CONFIG = {"depth": 8, "base_width": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `ckpt.pt` with logits that are four times too large, and 80 images, of which it misses 20."""
    home = tmp_path_factory.mktemp("home")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = sopdeploy.create_model("resnet8", num_classes=2, **CONFIG).eval()
    images = torch.from_numpy(
        np.stack([preprocess_image(Image.fromarray(one), RULES) for one in pixels])
    )

    with torch.no_grad():
        gaps = network(Normalize(RULES, torch.contiguous_format)(images)) @ torch.tensor(
            [1.0, -1.0]
        )
        layer = network.logits_layer()
        layer.bias[0] -= gaps.median()
        gaps = gaps - gaps.median()
        for parameter in layer.parameters():
            parameter.mul_(4 / float(gaps.abs().mean()))

    record = {"model": "resnet8", "config": CONFIG, "preprocess": RULES, "training": {}}
    checkpoint = Checkpoint(**record, weights=network.state_dict(), labels=LABELS)
    write_checkpoint(home / "ckpt.pt", checkpoint)

    for number, gap in enumerate(gaps.tolist()):
        label = LABELS[(gap < 0) ^ (number % 4 == 0)]
        (home / "photos" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(home / "photos" / label / f"{number}.png")
    return home


def test_the_new_checkpoint_has_a_decision_and_the_same_network(home: Path) -> None:
    source = (home / "ckpt.pt").read_bytes()
    plain = sopdeploy.evaluate(home / "ckpt.pt", home / "photos")
    found = sopdeploy.evaluate(
        home / "ckpt.pt", home / "photos", fit_decision=home / "fitted.pt"
    )

    assert found.metrics == plain.metrics
    assert found.scores == plain.scores
    assert plain.decision is None
    assert found.decision is not None
    assert found.decision.calibration is not None
    assert found.decision.rejection is not None
    assert found.decision.calibration.num_images == 80
    assert found.decision.calibration.temperature > 1.5
    assert found.decision.calibration.loss_after < found.decision.calibration.loss_before
    assert (home / "ckpt.pt").read_bytes() == source

    before = read_checkpoint(home / "ckpt.pt")
    after = read_checkpoint(home / "fitted.pt")
    assert before.decision is None
    assert after.decision == found.decision
    pairs = zip(
        *(build_classifier(one, home).state_dict().values() for one in (before, after)),
        strict=True,
    )

    assert all(torch.equal(*pair) for pair in pairs)
    fitted = sopdeploy.evaluate(home / "fitted.pt", home / "photos").metrics
    assert fitted.log_loss == pytest.approx(found.decision.calibration.loss_after)


def test_a_bundle_is_fitted_like_its_checkpoint(home: Path) -> None:
    exported = sopdeploy.export(home / "ckpt.pt", home / "exported").path
    before = open_bundle(exported)
    of_checkpoint = sopdeploy.evaluate(
        home / "ckpt.pt", home / "photos", fit_decision=home / "again.pt"
    ).decision
    found = sopdeploy.evaluate(exported, home / "photos", fit_decision=home / "new")

    assert of_checkpoint is not None
    assert found.decision is not None
    assert found.decision.temperature == pytest.approx(of_checkpoint.temperature, rel=1e-3)
    assert found.fitted is not None
    assert found.fitted.parent == home / "new"

    # The graph stays, the decision divides its logits, and everything is signed and described again.
    after = open_bundle(found.fitted)
    assert after.manifest.decision == found.decision.for_trained_logits()
    assert after.onnx.read() == before.onnx.read()
    assert after.name != before.name
    assert verify(found.fitted).id == after.manifest.id
    card = (found.fitted / "README.md").read_text(encoding="utf-8")
    assert all(f"- {key}: {text}\n" in card for key, text in found.decision.rows())

    metrics = sopdeploy.evaluate(found.fitted, home / "photos").metrics
    assert metrics.log_loss == pytest.approx(found.decision.calibration.loss_after, rel=1e-3)
    again = sopdeploy.evaluate(found.fitted, home / "photos", fit_decision=home / "new")
    assert again.decision == found.decision


def test_several_classes_per_image_get_a_threshold_each(home: Path) -> None:
    decision = Decision(activation="sigmoid", thresholds=(0.5, 0.5))
    write_checkpoint(
        home / "several.pt", replace(read_checkpoint(home / "ckpt.pt"), decision=decision)
    )
    rows = [
        f"{path.relative_to(home / 'photos')},{path.parent.name}"
        for path in (home / "photos").rglob("*.png")
    ]
    table = home / "photos" / "labels.csv"
    table.write_text("\n".join(["file,classes", *sorted(rows)]))
    fitted = sopdeploy.evaluate(
        home / "several.pt", home / "photos", fit_decision=home / "fitted-several.pt"
    ).decision
    table.unlink()

    assert fitted is not None
    assert fitted.thresholds is not None
    assert len(fitted.thresholds) == 2
    assert fitted.calibration is None
    assert fitted.rejection is None
    assert fitted.thresholds != decision.thresholds


CALIBRATION = Calibration(
    temperature=2, loss_before=1, loss_after=0.5, num_images=80, estimated_on="held-out"
)
PROBLEMS: dict[str, tuple[dict[str, object], str]] = {
    "the checkpoint itself": ({"fit_decision": "ckpt.pt"}, "fit_decision"),
    "no images to accept": ({"accepts": 0.0}, "accepts"),
    "mirror images": ({"mirror": True}, "fit_decision"),
    "few images": ({"data": "few"}, "fit_decision: .*2 images"),
    "no checkpoint": ({"source": "x.pt"}, "x.pt: "),
    "a damaged bundle": ({"source": "bundle"}, "bundle"),
    "a file in place of bundles": (
        {"source": "exported", "fit_decision": "ckpt.pt"},
        "fit_decision",
    ),
    "a bundle with the temperature of its training": (
        {"source": "divided", "fit_decision": "more"},
        "fit_decision",
    ),
}


@pytest.mark.parametrize(("changes", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_an_error_is_one_line_and_writes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(home)
    for label in LABELS:
        (home / "few" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(home / "few" / label / "0.png")
    (home / "bundle").mkdir(exist_ok=True)
    (home / "bundle" / "manifest.json").touch()
    if changes.get("source") in ("exported", "divided"):
        decision = (
            None if changes["source"] == "exported" else Decision(calibration=CALIBRATION)
        )
        checkpoint = replace(read_checkpoint(home / "ckpt.pt"), decision=decision)
        write_checkpoint(home / "source.pt", checkpoint)
        changes = {**changes, "source": sopdeploy.export(home / "source.pt", "exports").path}
    files = {path.name: path.stat().st_mtime_ns for path in home.glob("*.pt")}
    arguments = {"source": "ckpt.pt", "data": "photos", "fit_decision": "new.pt", **changes}
    with pytest.raises(SopdeployError, match=message) as caught:
        sopdeploy.evaluate(**arguments)

    assert "\n" not in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in home.glob("*.pt")} == files


def known_images(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    targets = np.arange(count) % 3
    return random.normal(size=(count, 3)) + 5 * np.eye(3)[targets], targets


def test_images_of_no_class_test_the_threshold_and_do_not_change_it():
    logits, targets = known_images()
    others = np.random.default_rng(1).normal(size=(40, 3))
    plain = fit_decision(logits, targets, estimated_on="held-out").rejection
    found = fit_decision(logits, targets, estimated_on="held-out", unknown=others)
    rule = found.rejection

    assert rule.model_copy(update={"recognized": None}) == plain
    rejected = log_sum_exp(others / found.temperature) < rule.threshold
    assert rule.recognized == (rejected.sum(), 40)
    assert rule.recognized[0] > 30

    left_out = np.linspace(rule.threshold - 1, rule.threshold + 2, 200)
    tested = fit_decision(logits, targets, estimated_on="held-out", left_out=left_out)
    assert tested.rejection.new_class == (67, 200)
    # An interval of more than half of all shares says nothing; it is not listed.
    name = "a new class of this kind"
    assert name not in dict(tested.rows())
    told = tested.rejection.model_copy(update={"new_class_share": (0.2, 0.6)})
    assert re.findall(r"\d+", dict(told.rows())[name])[1:] == ["95", "20", "60"]

    of_other_things = f"{rejected.sum()} of 40 rejected"
    assert dict(found.rows())["photos of other things"] == of_other_things
    shipped = fit_decision(
        logits, targets, estimated_on="held-out", unknown=others, is_unknown_shipped=True
    )

    assert dict(shipped.rows())["photos of other things"].startswith(of_other_things + " (")


# Rejected photographs of each class of ten, and the interval in percent
NEW_CLASS = {
    "alike": ([2, 2, 2, 2, 2, 2, 2, 2], (5, 55)),
    "unlike": ([0, 10, 0, 10, 0, 10, 0, 10], (0, 100)),
    "two": ([10, 10], (34, 100)),
    "one": ([5], (5, 95)),
}


@pytest.mark.parametrize(("rejected", "interval"), NEW_CLASS.values(), ids=NEW_CLASS)
def test_the_interval_of_a_new_class_depends_on_the_number_of_classes(rejected, interval):
    is_rejected = np.concatenate([np.arange(10) < count for count in rejected])
    targets = np.repeat(np.arange(len(rejected)), 10)
    found = new_class_interval(is_rejected, targets)

    assert tuple(round(100 * end) for end in found) == interval


# Images and the share that is accepted: the rank of the threshold. In floats, 10 * (1 - 0.9) is below 1.
RANKS = {(9, 0.9): 1, (9, 0.95): 0, (99, 0.95): 5, (98, 0.95): 4, (9, 0.0): 9}


@pytest.mark.parametrize(("images", "accepts"), RANKS)
def test_the_rank_of_a_threshold_rejects_at_most_the_share(images: int, accepts: float):
    assert threshold_rank(images, accepts) == RANKS[images, accepts]


@pytest.mark.parametrize("count", [20, 40, 98])
def test_the_threshold_of_few_cosines_is_a_prediction_bound(count: int):
    quantiles = NormalDist(0.7, 0.1)
    cosines = np.asarray([quantiles.inv_cdf((k + 0.5) / count) for k in range(count)])
    threshold = choose_threshold(cosines, 0.95, are_cosines=True)

    # 4 % of new ones are below, on average over samples: less than in this one, which is exact
    assert 0.95 < 1 - quantiles.cdf(threshold.value) < 0.975
    low, high = threshold.accepted
    assert low < 0.96 < high
    assert threshold_rank(count, 0.95) < 5

    # Energies of other networks are not cosines, and many cosines have quantiles.
    ordered = choose_threshold(cosines, 0.95, are_cosines=False)
    assert ordered.value == cosines[threshold_rank(count, 0.95) - 1]
    many = np.repeat(cosines, 5)
    assert choose_threshold(many, 0.95, are_cosines=True) == choose_threshold(
        many, 0.95, are_cosines=False
    )
    assert choose_threshold(cosines, 1.0, are_cosines=True) is None


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (None, None, ""),
        (None, (0, 0), ""),
        (None, (8, 9), ""),
        (None, (7, 9), "7 of 9"),
        (None, (0, 9), "0 of 9"),
        ((38, 40), (7, 40), "7 of 40"),
        ((38, 40), (24, 40), "24 of 40"),
        ((38, 40), (34, 40), ""),
    ],
)
def test_a_low_or_fallen_share_of_recognized_images_is_a_warning(before, now, found):
    was, rule = (Rejection(threshold=0.0, recognized=one) for one in (before, now))

    warning = describe_weakness(rule, was)
    assert found in warning
    assert bool(warning) == bool(found)
    assert before is None or not found or "38 of 40" in warning


def stripes(folder, count: int):
    """Write *count* striped images, which show no color of `paint`."""
    folder.mkdir()
    for number in range(count):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[:: 2 + number % 5] = 255 - number
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def few_images(folder: Path) -> Path:
    return paint(folder / "photos", 24)


def images_in_two_parts(folder: Path) -> Path:
    """The training images are four of the validation images, so the loop judges no copies of them."""
    paint(folder / "photos" / "train", 4)
    paint(folder / "photos" / "val", 24)
    return folder / "photos"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("procedure", "make", "own"),
    [
        ("few_shot", few_images, []),
        pytest.param("loop", images_in_two_parts, ["epochs=1"], marks=pytest.mark.nightly),
    ],
    ids=["few_shot", "loop"],
)
def test_train_reports_how_many_unknown_images_it_recognizes(tmp_path, procedure, make, own):
    photos = make(tmp_path)
    unknown = stripes(tmp_path / "photos-unknown", 12)
    settings = [
        *SMALL,
        f"data.path={photos}",
        f"procedure.kind={procedure}",
        f"rejection.unknown={unknown}",
    ]
    recipe = read_recipe("photos", [*settings, *own])
    result = train_recipe(recipe, tmp_path / "run")
    count, tested = result.decision.rejection.recognized

    assert tested == 12
    assert 0 <= count <= tested
    assert read_checkpoint(result.best).decision == result.decision


SCALED = {
    "softmax": Decision(rejection=Rejection(threshold=3.0)),
    "sigmoid": Decision(activation="sigmoid", thresholds=(0.5, 0.9, 0.2)),
}


@pytest.mark.parametrize("rules", SCALED.values(), ids=SCALED)
def test_a_decision_for_trained_logits_divides_them_before_everything_else(rules) -> None:
    calibration = Calibration(
        temperature=0.25, loss_before=1, loss_after=0.5, num_images=9, estimated_on="held-out"
    )
    rules = rules.model_copy(update={"calibration": calibration})
    for_trained = rules.for_trained_logits()
    logits_NC = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)

    for logits in logits_NC:
        occluded = logits_NC[:4]
        found = for_trained.answer(logits, occluded=occluded)
        assert found == rules.answer(
            logits.astype(float) / 0.25, occluded=occluded.astype(float) / 0.25
        )

    largest = np.array([3e38, -3e38, 0], np.float32)
    assert all(
        np.isfinite(probability) for _, probability in for_trained.answer(largest).ranked
    )


def test_the_key_is_written_only_if_the_decision_divides() -> None:
    with pytest.raises(ValueError, match="divides_logits"):
        Decision(divides_logits=True)
    assert "divides_logits" not in Decision().for_trained_logits().model_dump()


ROWS: dict[str, tuple[list[float], bool]] = {
    "logits": ([1.0, 2.0, -3.0], True),
    "a masked class": ([1.0, -np.inf, -3.0], True),
    "one class that is not masked": ([-np.inf, -np.inf, 2.0], True),
    "masked classes alone": ([-np.inf] * 3, False),
    "infinity": ([1.0, np.inf, 0.0], False),
    "NaN": ([1.0, np.nan, 0.0], False),
    "NaN beside a masked class": ([-np.inf, np.nan, 0.0], False),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_class_whose_logit_is_minus_infinity_has_probability_zero(
    case: str, activation: Any
) -> None:
    values, has_answer = ROWS[case]
    logits = np.array(values, np.float32)
    assert have_answers(logits[None]).tolist() == [has_answer]
    if not has_answer:
        return

    thresholds = (0.0,) * 3 if activation == "sigmoid" else None
    decision = Decision(activation=activation, thresholds=thresholds)
    probabilities = dict(decision.answer(logits).ranked)
    masked = np.flatnonzero(np.isneginf(logits)).tolist()
    assert [probabilities[number] for number in masked] == [0.0] * len(masked)
    assert np.isfinite([*probabilities.values()]).all()


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (None, [1, 3, 0, 4, 2]),
        (0, []),
        (1, [1]),
        (2, [1, 3]),
        (3, [1, 3, 0]),  # 0 and 4 are equal: the first class comes first
        (4, [1, 3, 0, 4]),
        (5, [1, 3, 0, 4, 2]),
        (6, [1, 3, 0, 4, 2]),
    ],
)
def test_the_most_probable_classes_come_first_and_ties_in_their_order(
    count: int | None, expected: list[int]
) -> None:
    logits = np.array([1.0, 3.0, -2.0, 3.0, 1.0], np.float32)
    assert most_probable(logits, count) == expected
    assert [index for index, _ in Decision().answer(logits, count).ranked] == expected
