"""Evaluation of networks and checkpoints; metrics by hand and by definition; several classes per image."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn

import sopdeploy
from sopdeploy import create_model
from sopdeploy.bundle.decision import sigmoid
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.errors import ConfigError, DataError, TrainingError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.evaluation.decision_fit import fit_thresholds
from sopdeploy.evaluation.metrics import (
    ClassificationReport,
    ImageScore,
    Rate,
    classification_report,
)
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, average_precision
from sopdeploy.evaluation.prediction import classification_loss, evaluate_network
from sopdeploy.evaluation.predictions import describe_predictions
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import (
    Checkpoint,
    build_classifier,
    read_checkpoint,
    write_checkpoint,
)
from tests.sopdeploy.data.folders.test_folder import make
from tests.sopdeploy.training.runs import train_with_page
from tests.support.two_objects import CLASSES, draw_scenes

TINY = Preprocess(resize=4, crop=4)
RULES = Preprocess(resize=18, crop=16)


class FromPixels(nn.Module):
    """Predicts the class given by the red value of the first pixel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        prediction = (images[:, 0, 0, 0] * 0.229 + 0.485) * 255
        distance = (torch.arange(self.classes)[None] - prediction[:, None]).abs()
        return -distance * self.scale


def images(predictions: list[int], targets: list[int], classes: int) -> PreprocessedDataset:
    pixels = np.zeros((len(predictions), 4, 4, 3), np.uint8)
    pixels[:] = np.asarray(predictions, np.uint8)[:, None, None, None]
    labels = tuple(str(number) for number in range(classes))
    return PreprocessedDataset(ArrayImages(labels, pixels, np.asarray(targets, np.int64)), TINY)


@settings(deadline=None)
@given(data=st.data(), classes=st.integers(2, 9), size=st.integers(1, 9))
def test_evaluate_counts_top1_and_top5_of_every_image(data, classes, size) -> None:
    one = st.integers(0, classes - 1)
    pairs = data.draw(st.lists(st.tuples(one, one), min_size=1, max_size=20))
    predictions, targets = (list(column) for column in zip(*pairs, strict=True))
    progress: list[int] = []
    dataset = images(predictions, targets, classes)
    figures = evaluate_network(
        FromPixels(classes), dataset, TINY, batch_size=size, on_batch=progress.append
    )

    assert figures.count == progress[-1] == len(pairs)
    assert figures.top1 == pytest.approx(np.mean([a == t for a, t in pairs]))

    # Nearer classes have larger logits, and classes at the same distance are tied.
    near = [sum(abs(c - a) < abs(t - a) for c in range(classes)) for a, t in pairs]
    tied = [sum(abs(c - a) == abs(t - a) for c in range(classes)) - 1 for a, t in pairs]
    low = np.mean([n + e < min(5, classes) for n, e in zip(near, tied, strict=True)])
    high = np.mean([n < min(5, classes) for n in near])

    assert low <= figures.top5 <= high


def test_a_diverged_network_and_an_empty_dataset_are_errors() -> None:
    model = FromPixels(3)
    with pytest.raises(DataError, match="no images"):
        evaluate_network(model, images([], [], 3), TINY)

    model.scale.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        evaluate_network(model, images([0], [0], 3), TINY)


@pytest.fixture
def stored(tmp_path) -> Path:
    """Write a checkpoint of a new network for the classes b and a, in this order."""
    torch.manual_seed(0)
    model = "dsop-resnet8"
    config = {"base_width": 4}
    weights = create_model(model, num_classes=2, **config).state_dict()
    write_checkpoint(
        tmp_path / "ckpt.pt",
        Checkpoint(
            model=model,
            config=config,
            weights=weights,
            labels=("b", "a"),
            preprocess=RULES,
            training={},
        ),
    )
    return tmp_path / "ckpt.pt"


def measured(stored: Path, data: Path, **options: Any) -> ClassificationReport:
    progress: list[tuple[int, int]] = []
    found = score_checkpoint(
        stored, data, on_image=lambda *done: progress.append(done), **options
    )
    assert progress[-1] == (len(found.predictions), len(found.predictions))
    return classification_report(found.labels, found.predictions)


def test_classes_are_matched_by_name(stored, tmp_path) -> None:
    make(tmp_path / "val", a=3, b=4)
    model = build_classifier(read_checkpoint(stored), stored)
    normalize = Normalize(RULES, torch.contiguous_format)
    right = 0
    losses = []
    for target, name in enumerate(("b", "a")):
        for path in (tmp_path / "val" / name).iterdir():
            pixels = preprocess_image(Image.open(path), RULES)
            logits = model(normalize(torch.tensor(pixels[None]))).detach().double()[0]
            right += int(logits.argmax()) == target
            losses.append(-float(logits.log_softmax(0)[target]))
    figures = measured(stored, tmp_path / "val")

    assert (figures.count, figures.top1.right) == (7, right)
    assert [(one.label, one.count) for one in figures.classes] == [("a", 3), ("b", 4)]
    assert figures == measured(stored, tmp_path / "val", workers=2)
    assert figures.log_loss == pytest.approx(np.mean(losses), abs=1e-6)


@pytest.mark.parametrize(("settings", "count"), [({}, 0), ({"classes_from": r"^\D+"}, 7)])
def test_images_are_read_as_the_run_read_its_images(stored, tmp_path, settings, count) -> None:
    make(tmp_path / "val", a=3, b=4)
    for path in [*(tmp_path / "val").glob("*/*")]:
        path.rename(tmp_path / "val" / f"{path.parent.name}{path.name}")
        if not [*path.parent.iterdir()]:
            path.parent.rmdir()
    checkpoint = read_checkpoint(stored)
    recipe = {"data": {"kind": "folder", **settings}}
    write_checkpoint(stored, replace(checkpoint, training={"recipe": recipe}))

    if not count:
        with pytest.raises(DataError, match=r"val: .*class folders"):
            measured(stored, tmp_path / "val")
        return
    assert measured(stored, tmp_path / "val").count == count

    # Other images may have class folders.
    make(tmp_path / "sorted", a=2, b=1)
    assert measured(stored, tmp_path / "sorted").count == 3


@pytest.mark.parametrize("classes_from", ["x" * 10_001, "../labels.csv"])
def test_a_recipe_that_no_reading_may_repeat_is_ignored(stored, tmp_path, classes_from) -> None:
    make(tmp_path / "val", a=3, b=4)
    recipe = {"data": {"kind": "folder", "classes_from": classes_from}}
    checkpoint = replace(read_checkpoint(stored), training={"recipe": recipe})
    write_checkpoint(stored, checkpoint)

    assert measured(stored, tmp_path / "val").count == 7


def test_intervals_are_those_of_independent_groups(stored, tmp_path) -> None:
    # The folders in a class show one object each
    make(tmp_path / "val", a__one=3, a__two=3, b=4)
    figures = measured(stored, tmp_path / "val")

    assert figures.top1 == Rate.of(figures.top1.right, 10, 100 / 22)
    assert figures.top5.low == Rate.of(10, 10, 100 / 22).low
    assert [one.recall for one in figures.classes] == [
        Rate.of(figures.classes[0].recall.right, 6, 2),
        Rate.of(figures.classes[1].recall.right, 4, 4),
    ]


def test_a_decision_is_fitted_to_one_image_of_each_group(stored, tmp_path) -> None:
    make(tmp_path / "few", a__one=25, a__two=25, b=10)
    with pytest.raises(DataError, match="fit_decision: only 12"):
        score_checkpoint(stored, tmp_path / "few", accepts=0.9)

    make(tmp_path / "enough", a__one=5, a__two=5, b=48)
    decision = score_checkpoint(stored, tmp_path / "enough", accepts=0.9).decision
    assert decision is not None
    assert decision.calibration is not None
    assert decision.calibration.num_images == 50


def test_mirrored_scores_are_those_of_the_mean_logits_of_both_images(stored, tmp_path) -> None:
    make(tmp_path / "val", a=3, b=4)
    model = build_classifier(read_checkpoint(stored), stored)
    normalize = Normalize(RULES, torch.contiguous_format)
    probabilities = []

    for name in ("a", "b"):
        for path in sorted((tmp_path / "val" / name).iterdir()):
            pixels = torch.tensor(preprocess_image(Image.open(path), RULES)[None])
            views = [
                model(normalize(view)).detach().double()[0] for view in (pixels, pixels.flip(2))
            ]
            assert not torch.equal(*views)
            probabilities.append((sum(views) / 2).softmax(0).max().item())

    found = sopdeploy.evaluate(stored, tmp_path / "val", mirror=True)
    assert [score.confidence for score in found.scores] == pytest.approx(
        probabilities, abs=1e-6
    )
    assert found.summary()["mirror"] is True
    assert sopdeploy.evaluate(stored, tmp_path / "val").scores != found.scores


LABELS = ("a", "b", "c")


def score(target: int, *probabilities: float) -> ImageScore:
    order = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])
    return ImageScore(target, tuple(order), max(probabilities), probabilities[target])


def test_a_report_on_four_images_computed_by_hand() -> None:
    rows = [(0, 0.7, 0.2, 0.1), (0, 0.3, 0.6, 0.1), (1, 0.1, 0.8, 0.1), (2, 0.5, 0.3, 0.2)]
    found = classification_report(LABELS, [score(*row) for row in rows])

    assert found.count == 4
    assert found.top1 == Rate.of(2, 4)  # images without a group are independent
    assert found.top1.share == 0.5
    assert found.top5.share == 1.0
    assert found.confusion == ((1, 1, 0), (0, 1, 0), (1, 0, 0))
    assert [(one.label, one.count, one.answered, one.precision) for one in found.classes] == [
        ("a", 2, 2, 0.5),
        ("b", 1, 2, 0.5),
        ("c", 1, 0, None),
    ]
    assert [one.recall.share for one in found.classes] == [0.5, 1.0, 0.0]
    assert found.log_loss == pytest.approx(-np.mean(np.log([0.7, 0.3, 0.8, 0.2])))


def test_a_probability_of_0_has_a_finite_loss() -> None:
    report = classification_report(("a", "b"), [ImageScore(1, (0, 1), 1.0, 0.0)])

    assert report.log_loss == pytest.approx(708.4, abs=0.1)
    with pytest.raises(DataError, match="no images"):
        classification_report(LABELS, [])


SHORT = [
    "epochs=2",
    "batch_size=16",
    "threads=1",
    "model.config.base_width=4",
    "preprocess.resize=16",
]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30))
def test_average_precision_and_f1_equal_those_of_scikit_learn(pairs) -> None:
    true, ranks = (np.asarray(column) for column in zip(*pairs, strict=True))
    scores = ranks / 7
    if not true.any():
        assert average_precision(true, scores) is None
        return
    assert average_precision(true, scores) == pytest.approx(
        average_precision_score(true, scores)
    )

    both = MultiLabelPredictions(
        labels=("b", "a"),
        targets=np.stack([true, true[::-1]], axis=1).astype(np.float32),
        probabilities=np.stack([scores, scores], axis=1),
        thresholds=(0.5, 0.25),
    )
    predicted = both.probabilities >= np.asarray(both.thresholds)
    found = both.report()

    assert [one.label for one in found.classes] == ["a", "b"]
    for name, value in {"macro": found.macro_f1, "micro": found.micro_f1}.items():
        assert value == pytest.approx(
            f1_score(both.targets > 0, predicted, average=name, zero_division=0.0)
        )


def test_the_worst_classes_are_first_and_those_without_images_last() -> None:
    predicted = MultiLabelPredictions(
        labels=("a", "b", "c"),
        targets=np.asarray([[1, 1, 0], [1, 0, 0]], dtype=np.float32),
        probabilities=np.asarray([[0.9, 0.2, 0.1], [0.8, 0.3, 0.1]]),
        thresholds=(0.5, 0.5, 0.5),
    )
    (table,) = describe_predictions(predicted.report(), "2 images").tables

    assert [row[0] for row in table.rows] == ["b", "a", "c"]


def test_thresholds_maximize_f1_and_move_to_one_half_for_rare_classes() -> None:
    random = np.random.default_rng(0)
    true = (random.random((4000, 1)) < 0.2).astype(float)
    probabilities = sigmoid(random.normal(size=(4000, 1)) + 3 * true - 3)
    (threshold,) = fit_thresholds(true, probabilities)

    def f1(value: float) -> float:
        return f1_score(true > 0, probabilities >= value)

    assert f1(threshold) >= max(f1(value) for value in np.linspace(0.01, 0.99, 99)) - 0.005
    few = np.asarray([[1.0], [0.0], [0.0]])
    (rare,) = fit_thresholds(few, sigmoid(np.asarray([[-3.0], [-5.0], [-6.0]])))
    assert rare == pytest.approx(float(sigmoid(np.asarray(-4.0 / 11))))
    for constant in (np.zeros((3, 1)), np.ones((3, 1))):
        assert fit_thresholds(constant, np.asarray([[0.9], [0.1], [1.0]])) == (0.5,)


def test_the_loss_averages_classes_and_smooths_towards_one_half() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64)
    labels = torch.tensor([[0.0, 1, 0, 1]]).repeat(3, 1)
    target = labels.double() * 0.8 + 0.1
    expected = torch.nn.functional.binary_cross_entropy(
        logits.sigmoid(), target, reduction="none"
    ).mean(dim=1)
    loss = classification_loss(logits, labels, "sigmoid", label_smoothing=0.2)

    assert float(loss) == pytest.approx(float(expected.mean()))


def recipe(scenes: Path, *changes: str) -> Recipe:
    short = [*SHORT, "preprocess.crop=16", "loss.label_smoothing=0.1", f"data.path={scenes}"]
    return read_recipe("photos-dsop", [*short, *changes])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", count=60)


@pytest.mark.slow
def test_a_run_selects_by_map_and_stores_the_thresholds(scenes: Path, tmp_path: Path) -> None:
    result = train_with_page(recipe(scenes, "ema={decay=0.5}"), tmp_path / "run")
    stored = read_checkpoint(result.best)
    assert stored.labels == CLASSES
    assert stored.decision is not None
    assert (stored.decision.activation, len(stored.decision.thresholds or ())) == ("sigmoid", 4)
    assert result.best_map == stored.training["metrics"]["map"]
    assert result.best_top1 is None

    rows = list(csv.DictReader(result.history.read_text().splitlines()))
    assert max(float(row["map"]) for row in rows) == result.best_map
    assert {"macro_f1", "micro_f1", "main_map", "layer1_0_loss"} <= rows[0].keys()

    scored = score_checkpoint(result.best, scenes)
    found = scored.predictions
    assert isinstance(found, MultiLabelPredictions)
    assert (scored.labels, found.thresholds) == (CLASSES, stored.decision.thresholds)

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "average precision" in page
    assert ", too high" in page


def test_distillation_needs_one_class_per_image(scenes, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"teacher: .* one class"):
        train_recipe(recipe(scenes, "teacher={}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
