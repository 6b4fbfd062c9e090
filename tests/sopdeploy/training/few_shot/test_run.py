"""The few-shot procedure: classifier, folds, choice, decision, and whole runs on painted images."""

import html
import json
import re
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from sopdeploy.base.project import FolderReading
from sopdeploy.bundle.decision import Activation, softmax
from sopdeploy.data.photos.copies import NO_PAIRS, NearDuplicates
from sopdeploy.data.photos.photo import ArrayImages, ImageFiles, Photo
from sopdeploy.data.sources import open_data
from sopdeploy.errors import DataError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.evaluation.decision_fit import fit_decision
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import (
    MeanPrecision,
    average_precision,
    resampled_precision,
)
from sopdeploy.report.wrong_labels import find_wrong_labels, list_wrong_labels
from sopdeploy.training.callback import Callback, ExpectedTime
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.division import divide_images
from sopdeploy.training.few_shot.classifier import LinearProblem, Space, unit_length
from sopdeploy.training.few_shot.cross_validation import judge_few_apart, select_typical
from sopdeploy.training.few_shot.discriminant import SHRINKAGE, Discriminant
from sopdeploy.training.few_shot.features import CachedNetwork, Features, compute_features
from sopdeploy.training.few_shot.learning import estimate_gains
from sopdeploy.training.few_shot.scaling import OutOfFold, Scaling, estimate_excess
from sopdeploy.training.few_shot.score import estimate_score
from sopdeploy.training.few_shot.targets import Targets, share_groups
from sopdeploy.training.procedure import FEW_IMAGES, select_procedure
from sopdeploy.training.records.results import read_result
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.settings.head import FewShotConfig
from sopdeploy.training.settings.recipe import LoopConfig, Recipe, read_recipe
from sopdeploy.training.setup import set_up_run
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint, write_checkpoint
from sopdeploy_commands.app import app
from sopdeploy_commands.train import train
from tests.sopdeploy.training.runs import (
    COLORS,
    SMALL,
    RecordingCallback,
    paint,
    train_with_page,
)
from tests.support.golden import check_golden

pytestmark = pytest.mark.usefixtures("allow_random_features")
FEW_SHOT = ["procedure.kind=few_shot"]
# Without settings of branches
PLAIN = ["model.name=resnet8", "model.config={}", *SMALL[2:], *FEW_SHOT]


def blobs(count: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Draw features (count, 24) of *classes* overlapping clusters, and their classes."""
    random, targets = np.random.default_rng(0), np.arange(count) % classes
    means = 0.7 * random.normal(size=(classes, 24))
    return means[targets] + random.normal(size=(count, 24)), targets


def softmax_targets(classes: np.ndarray, count: int = 4) -> Targets:
    """Build targets of one class per image."""
    return Targets(np.eye(count)[classes], classes, "softmax")


def problem_of(
    parts: list[np.ndarray], targets: Targets, spanning: int | None = None
) -> LinearProblem:
    """Build the problem of the vectors with *parts*, in the span of the first *spanning* ones."""
    space = Space.of([part[:spanning] for part in parts])
    return LinearProblem(
        space, space.project(np.concatenate(parts, axis=1)), unit_length(parts[0]), targets
    )


UNSCALED = Scaling(temperature=1.0, excess=0.0)


def scaled_inputs(parts: list[np.ndarray]) -> np.ndarray:
    """Center and scale *parts* (N, D_i) as `Space.of` describes, and join them."""
    centered = [part - part.mean(axis=0) for part in parts]
    return np.concatenate(
        [part / np.sqrt(np.square(part).sum(axis=1).mean()) for part in centered], axis=1
    )


def test_sums_do_not_depend_on_how_many_images_are_added_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    features, classes = blobs()
    found = []
    for rows in (4096, 7):
        monkeypatch.setattr("sopdeploy.training.few_shot.classifier.ROWS", rows)
        problem = problem_of([features], softmax_targets(classes))
        found.append((problem.cosines(np.arange(40) % 5), problem.fit_all(UNSCALED).weight))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [40, 12])
def test_the_head_is_scikit_learns_discriminant_and_equals_its_linear_layer(count: int):
    features, classes = blobs(count)
    parts = [features[:, :10], features[:, 10:]]
    problem = problem_of(parts, softmax_targets(classes))
    head = problem.fit_all(UNSCALED)
    equal = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=[1 / 4] * 4)
    basis = np.linalg.qr(scaled_inputs(parts).T)[0]
    inputs = scaled_inputs(parts) @ basis
    expected = equal.fit(inputs, classes).decision_function(inputs)
    found = features @ head.weight.T + head.bias

    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()

    centered = [logits - logits.mean(axis=1, keepdims=True) for logits in (found, expected)]
    assert np.corrcoef(centered[0].ravel(), centered[1].ravel())[0, 1] > 0.99


def test_several_classes_per_image_have_a_discriminant_each():
    features, classes = blobs(40)
    shown = np.eye(4)[classes] + np.eye(4)[(classes + 1) % 4]
    targets = replace(softmax_targets(classes), classes=shown, activation="sigmoid")
    head = problem_of([features], targets).fit_all(UNSCALED)
    inputs = scaled_inputs([features])
    ridge = SHRINKAGE * np.trace(inputs.T @ inputs) / inputs.shape[1] / (1 - SHRINKAGE)

    for row, column in zip(head.weight, shown.T, strict=True):
        # The discriminant of two classes has the direction of a ridge regression of their
        # indicator.
        expected = Ridge(alpha=ridge).fit(inputs, column).coef_
        direction = row * np.sqrt(
            np.square(features - features.mean(axis=0)).sum(axis=1).mean()
        )
        assert direction / np.linalg.norm(direction) == pytest.approx(
            expected / np.linalg.norm(expected)
        )
    assert (((features @ head.weight.T + head.bias) > 0) == (shown > 0)).mean() > 0.9


@pytest.mark.parametrize("classes", [[0, 1, 0, 1], [2, 2, 2, 2], [0, 1, 2, 2]])
def test_a_class_without_images_is_never_the_answer(classes: list[int]):
    features = blobs(4)[0]
    head = problem_of([features], softmax_targets(np.asarray(classes))).fit_all(UNSCALED)
    assert (features @ head.weight.T + head.bias).argmax(axis=1).tolist() == classes


def test_labels_without_relation_to_the_images_are_estimated_at_chance():
    random, classes = np.random.default_rng(1), np.arange(60) % 4
    targets = softmax_targets(classes)
    assigned = targets.folds([str(number) for number in range(60)], 5, 0)
    problem = problem_of([random.normal(size=(60, 30))], targets)
    validation = problem.cross_validate(assigned)
    scaling = Scaling.fit([validation], targets)
    logits = problem.logits(validation, scaling)

    assert (logits.argmax(axis=1) == classes).mean() < 0.45
    assert targets.losses(logits).mean() < np.log(4) + 0.05


def validation_of(scores: np.ndarray) -> OutOfFold:
    """Build a cross-validation with *scores* (N, K), all by one head of equally large classes."""
    zeros = np.zeros(scores.shape[1])
    head = Discriminant(
        zeros, zeros, zeros, zeros + len(scores) / scores.shape[1], zeros + np.inf
    )
    return OutOfFold(
        scores, [head], np.zeros(len(scores), np.intp), zeros, np.ones(len(scores))
    )


def test_the_temperature_is_finite_where_all_are_right_and_follows_the_errors():
    random, classes = np.random.default_rng(0), np.arange(80) % 4
    targets, right = softmax_targets(classes), 30 * np.eye(4)[classes]
    sure = Scaling.fit([validation_of(right)], targets)

    assert 1 < sure.temperature < 30

    probabilities = softmax(right / sure.temperature)[np.arange(80), classes]
    assert probabilities == pytest.approx(1 - 1 / 82, abs=1e-3)

    unsure = Scaling.fit([validation_of(right + 30 * random.normal(size=(80, 4)))], targets)
    assert unsure.temperature > 2 * sure.temperature


def test_a_class_of_few_images_is_recognized_as_well_as_the_others():
    features, classes = blobs(4000)
    kept = np.concatenate(
        [
            np.flatnonzero(classes == label)[:count]
            for label, count in enumerate((5, 40, 40, 40))
        ]
    )
    targets = softmax_targets(classes[kept])
    problem = problem_of([features[kept]], targets)
    folds = targets.folds(list(map(str, kept)), 10, 0)
    scaling = Scaling.fit([problem.cross_validate(folds)], targets)
    recalls, losses = [], []
    for one in (scaling, scaling._replace(excess=0.0)):
        head = problem.fit_all(one)
        logits = features @ head.weight.T + head.bias
        recalls.append(
            [
                float((logits[classes == label].argmax(axis=1) == label).mean())
                for label in range(4)
            ]
        )
        losses.append(softmax_targets(classes).losses(logits).mean())

    assert losses[0] < losses[1]
    assert np.mean(recalls[0]) > np.mean(recalls[1])
    assert recalls[0][0] > recalls[1][0] + 0.05


@pytest.mark.parametrize("few", [1, 2, 5])
def test_a_new_class_borrows_photographs_until_it_has_enough(few: int):
    features, classes = blobs(4000)
    found = []
    for first in (0, 400):
        of_class = [np.flatnonzero(classes[first:] == label) + first for label in range(4)]
        kept = np.concatenate(
            [of_class[label][: few if label == 3 else 12] for label in range(4)]
        )
        known, problems = kept[classes[kept] < 3], []
        for chosen, count in ((known, 3), (kept, 4)):
            targets = softmax_targets(classes[chosen], count)
            problem = problem_of([features[chosen]], targets)
            folds = targets.folds(list(map(str, chosen)), 10, 0)
            scaling = Scaling.fit([problem.cross_validate(folds)], targets, has_margins=True)
            problems.append((problem, scaling))
        (before, fitted), (after, scaling) = problems
        heads = [
            before.fit_all(fitted),
            after.fit_all(scaling),
            after.fit_all(scaling._replace(margins=0.0)),
        ]
        answers = [head.logits(features).argmax(axis=1) for head in heads]
        found.append([(one == classes)[classes < 3].mean() for one in answers])
        found[-1].append((answers[1] == 3)[classes == 3].mean())
        assert (scaling.margins > 0).tolist() == [False] * 3 + [few < 5]

    of_known, with_margin, without, of_new = np.mean(found, axis=0)
    assert of_new > 0.15
    assert of_known - with_margin < 0.08
    if few < 5:
        assert of_known - with_margin < (of_known - without) / 4


def test_scores_of_a_class_of_few_images_are_corrected(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("sopdeploy.training.few_shot.discriminant.COMMON", 0.0)
    features, classes = blobs(4000)
    space = Space.of([features])

    def lead(chosen: np.ndarray, *, is_corrected: bool) -> float:
        """Return by how much the first class leads the others in the scores of all images on average."""
        targets = softmax_targets(classes[chosen])
        reduced = space.project(features[chosen])
        problem = LinearProblem(space, reduced, unit_length(features[chosen]), targets)
        head = problem.moments(np.ones(len(chosen), np.bool_)).discriminate("softmax")
        folds = targets.folds(list(map(str, chosen)), 5, 0)
        excess = estimate_excess([problem.cross_validate(folds)], targets.classes > 0)
        bias = head.bias(excess if is_corrected else 0.0)
        scores = (space.project(features) @ head.weight.T + bias).mean(axis=0)
        return float(scores[0] - scores[1:].mean())

    of_many = lead(np.arange(4000), is_corrected=False)
    others = np.flatnonzero((classes > 0) & (np.arange(4000) < 400))
    few = [np.flatnonzero(classes == 0)[first : first + 5] for first in range(0, 200, 10)]
    plain, corrected = (
        np.mean([lead(np.concatenate([own, others]), is_corrected=corrected) for own in few])
        for corrected in (False, True)
    )
    assert plain < of_many - 0.08
    assert abs(corrected - of_many) < abs(plain - of_many) / 2


@pytest.mark.parametrize(
    ("clip", "singles"), [(8, 4), (20, 6), (10, 9), (6, 6), (0, 2), (1, 11), (20, 1), (8, 2)]
)
def test_more_photographs_are_more_than_the_class_has(clip: int, singles: int):
    features, classes = blobs(400)
    features += np.random.default_rng(1).normal(size=features.shape)
    kept = [np.flatnonzero(classes == label)[:12] for label in range(3)]
    kept.append(np.flatnonzero(classes == 3)[: clip + singles])
    chosen = np.concatenate(kept)
    groups = np.asarray([*range(36), *[100] * clip, *range(200, 200 + singles)])

    targets = softmax_targets(classes[chosen])
    problem = replace(problem_of([features[chosen]], targets), groups=groups)
    validation = problem.cross_validate(targets.folds(groups.astype(str).tolist(), 10, 0))
    scaling = Scaling.fit([validation], targets, has_margins=True)
    right = problem.logits(validation, scaling).argmax(axis=1) == classes[chosen]
    gains = estimate_gains(
        problem, scaling, np.arange(len(chosen)), right, ("bar", "gym", "hall", "hotel")
    )
    assert all(gain.more > gain.count for gain in gains)

    # A clip counts as one photograph, so that a class of one clip and few others is named.
    numbers = {"hotel": (singles + (clip > 0), singles + clip)}
    assert {gain.label for gain in gains} >= {
        name for name, (few, _) in numbers.items() if few < 4
    }
    for gain in gains:
        assert (gain.count, gain.photographs) == numbers.get(gain.label, (12, 12))


def test_a_class_with_too_few_photographs_is_named_with_advice():
    features, classes = blobs(400)
    # So that more photographs help
    features += np.random.default_rng(1).normal(size=features.shape)
    kept = np.concatenate(
        [np.flatnonzero(classes == label)[: 2 if label == 3 else 12] for label in range(4)]
    )
    targets = softmax_targets(classes[kept])
    problem = problem_of([features[kept]], targets)
    validation = problem.cross_validate(targets.folds(list(map(str, kept)), 10, 0))
    scaling = Scaling.fit([validation], targets, has_margins=True)
    right = problem.logits(validation, scaling).argmax(axis=1) == classes[kept]
    labels = ("bar", "gym", "hall", "hotel")
    few, *others = estimate_gains(problem, scaling, np.arange(len(kept)), right, labels)

    assert (few.label, few.count, few.more) == ("hotel", 2, 5)
    assert few.describe().startswith("hotel: 2 photos, ")

    of_class, found = classes == 3, []
    five_of_class = np.flatnonzero(of_class)[:5]
    with_five = np.concatenate([kept[classes[kept] != 3], five_of_class])
    for chosen, fitted in ((kept, scaling), (with_five, scaling._replace(margins=0.0))):
        head = problem_of([features[chosen]], softmax_targets(classes[chosen])).fit_all(fitted)
        found.append(float((head.logits(features)[of_class].argmax(axis=1) == 3).mean()))

    assert few.found < few.then
    assert [few.found, few.then] == pytest.approx(found, abs=0.15)
    assert all(gain.more == 2 * gain.count == 24 for gain in others)

    several = replace(problem, targets=replace(targets, activation="sigmoid"))
    assert estimate_gains(several, UNSCALED, np.arange(len(kept)), right, labels) == ()


def test_logits_of_the_network_have_the_scale_of_the_temperature():
    features, classes = blobs(4000)
    ratios = []
    for first in range(0, 320, 32):  # eight images of each class
        kept = np.arange(first, first + 32)
        targets = softmax_targets(classes[kept])
        problem = problem_of([features[kept]], targets)
        validation = problem.cross_validate(targets.folds(list(map(str, kept)), 4, 0))
        scaling = Scaling.fit([validation], targets)
        logits = problem.fit_all(scaling).logits(features[320:])
        ratios.append(logits.std() / problem.logits(validation, scaling).std())

    assert np.mean(ratios) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("copies", [[0] * 19, [0, 4, 8] * 9, list(range(40))], ids=str)
def test_copies_of_images_change_no_head(copies: list[int], activation: Activation):
    features, classes = blobs(40)
    shown = np.eye(4)[classes] if activation == "softmax" else np.eye(4)[classes][:, :3]
    copied = np.concatenate([np.arange(40), copies])
    single = problem_of([features], Targets(shown, classes, activation))
    problem = replace(
        single,
        reduced=single.reduced[copied],
        own=single.own[copied],
        targets=Targets(shown[copied], classes[copied], activation),
        groups=copied,
    )

    folds = np.arange(40) % 5
    validation = problem.cross_validate(folds[copied])
    expected = single.cross_validate(folds)
    assert validation.products == pytest.approx(expected.products[copied])
    assert validation.numbers.tolist() == [10.0] * shown.shape[1]

    scaling = Scaling.fit([validation], problem.targets)
    assert scaling == pytest.approx(Scaling.fit([expected], single.targets), rel=1e-3)
    assert problem.class_means() == pytest.approx(single.class_means(), abs=1e-6)


def test_copies_with_different_labels_count_once_for_each():
    classes = np.asarray([0, 0, 0, 1, 1, 1])
    groups = np.asarray([0, 0, 1, 0, 0, 2])
    shares = share_groups(softmax_targets(classes, 2).classes, groups)
    assert shares.tolist() == [0.5, 0.5, 1.0, 0.5, 0.5, 1.0]


def test_folds_hold_equal_parts_of_every_class_and_keep_duplicates_together():
    classes = np.asarray([0] * 10 + [1] * 5)
    keys = (
        [f"a{number}" for number in range(9)] + ["a8"] + [f"b{number}" for number in range(5)]
    )
    folds = softmax_targets(classes, 2).folds(keys, 5, seed=3)

    assert folds[8] == folds[9]
    assert sorted(np.bincount(folds[10:], minlength=5)) == [1] * 5
    assert max(np.bincount(folds[:10])) <= 3


@pytest.mark.parametrize(
    ("classes", "keys", "at_most", "seed", "expected"),
    [  # few copies, many, groups of one class; small classes; three groups; 20 folds
        (
            "1001100101021202120020122011202111121100",
            "riynZVQiEhdgvXdeyXRmAqTZPspaezVIxhAzOwjd",
            10,
            0,
            "6400373412645160012773132547057312756526",
        ),
        (
            "3231031132002233331330222003311130011201",
            "gcmlhnilmlehhneqsankrhkambjstbcmhckajsgc",
            5,
            3,
            "2342000242300032110200214411343403211123",
        ),
        (
            "0000001111010011001001010011010111000001",
            "liljchffefifilbbihakdecaldfbcedagahckida",
            10,
            2**40 + 1,
            "0103322232121044120243300424334010232140",
        ),
        ("045210430124", "SpEBoZtARwhJ", 10, 5, "132760985401"),
        (
            "110010000110110011111110000000",
            "baaaacbbaccbcbcbcaaccabcacabaa",
            10,
            1,
            "200001220112121210011021010200",
        ),
        (
            "3234430004141224344032434230213201413312",
            "aAuhawcudgmhgtpqDgnexwcACzkvjjzynwDumskl",
            20,
            8,
            "5310502101201322413430234055440130412255",
        ),
    ],
)
def test_the_folds_of_a_run_do_not_change_with_versions(
    classes: str, keys: str, at_most: int, seed: int, expected: str
):
    strata = np.asarray([int(digit) for digit in classes])
    folds = softmax_targets(strata, int(strata.max()) + 1).folds(list(keys), at_most, seed)
    assert "".join(map(str, folds)) == expected


def test_a_class_of_two_images_does_not_halve_all_heads():
    classes = np.asarray([*np.repeat([0, 1, 2], 20), 3, 3])
    folds = softmax_targets(classes).folds(list(map(str, range(62))), 10, seed=3)
    assert len(set(folds)) == 10
    assert folds[60] != folds[61]


def test_every_fold_has_one_image_of_each_class_if_these_are_few():
    classes = np.arange(40) % 4
    keys = [str(number // 2) for number in range(40)]  # pairs of copies, of two classes
    for targets, expected in (
        (softmax_targets(classes % 2, 2), 10),
        (softmax_targets(np.arange(20) % 4), 5),
    ):
        folds = targets.folds(
            keys[: len(targets.classes)] if expected == 10 else list(map(str, range(20))), 10, 0
        )
        assert len(set(folds)) == expected
        counts = np.stack(
            [targets.classes[folds == fold].sum(axis=0) for fold in range(expected)]
        )
        assert (counts == counts[0]).all()


def test_heads_without_doubted_labels_separate_wrong_labels_better():
    features, classes = blobs(80)
    wrong = np.arange(80) % 10 == 0
    labels = np.where(wrong, (classes + 1) % 4, classes)
    targets = softmax_targets(labels)
    problem, folds = (
        problem_of([features], targets),
        targets.folds(list(map(str, range(80))), 10, 0),
    )
    validation = problem.cross_validate(folds)
    scaling = Scaling.fit([validation], targets)
    first = problem.logits(validation, scaling)
    second = problem.logits_without_doubted(first, folds, scaling)
    before, after = (
        -log_softmax(logits, axis=1)[np.arange(80), labels] for logits in (first, second)
    )

    assert roc_auc_score(wrong, after) > roc_auc_score(wrong, before) + 0.02

    sure = 9.0 * np.eye(4)[labels]
    assert problem.logits_without_doubted(sure, folds, scaling) is sure

    # All are doubted: no image is left to fit
    none_left = problem.logits_without_doubted(-sure, folds, scaling)
    assert np.ptp(none_left, axis=0) == pytest.approx(0)


def test_improbable_labels_are_listed_the_least_probable_first():
    wrong = [[0.01, 0.98, 0.01], [0.96, 0.01, 0.03], [0.01, 0.02, 0.97]]
    right = [
        [0.95, 0.03, 0.02],
        [0.4, 0.11, 0.49],
        [0.05, 0.9, 0.05],
        [0.05, 0.05, 0.9],
        [0.9, 0.05, 0.05],
    ]
    probabilities, classes = np.asarray(wrong + right), np.asarray([0, 2, 1, 0, 1, 1, 2, 0])
    images = ArrayImages(("a", "b", "c"), np.zeros((8, 2, 2, 3), np.uint8), classes)
    listed = list_wrong_labels(np.log(probabilities), images)

    assert [(index, one.label, one.suggested) for index, one in listed] == [
        (0, "a", "b"),
        (2, "b", "c"),
        (1, "c", "a"),
    ]
    assert [one.probability for _, one in listed] == pytest.approx([0.01, 0.02, 0.03])


def test_a_small_folder_is_cross_validated_trained_on_whole_and_reported(tmp_path: Path):
    recipe = read_recipe(
        "photos", [*SMALL, *FEW_SHOT, f"data.path={paint(tmp_path / 'photos', 17)}"]
    )
    stages: list[str] = []

    class Stages(Callback):
        def on_stage(self, *, name: str, done: int, total: int) -> None:
            stages.append(name)
            assert 0 <= done <= total

    result = train_with_page(recipe, tmp_path / "run", callback=Stages())
    found = result.procedure
    assert (result.train_count, result.held_out_count) == (51, 0)
    assert found.estimated_on == "cross-validation"
    assert found.class_counts == dict.fromkeys(COLORS, 17)
    assert found.top1.count == 51
    assert found.top1.low < found.top1.share <= 1
    assert found.top1.share > 0.8
    assert found.head.startswith("dsop-resnet8 gap+isqrt of ")
    assert "interval" in found.lines()[-1]
    assert any(line.startswith(f"classifier: {found.head}, ") for line in found.lines())
    assert list(dict.fromkeys(stages)) == [
        "features of dsop-resnet8",
        "cross-validation",
    ]

    checkpoint = read_checkpoint(result.best)
    assert checkpoint.training["procedure"]["top1"]["count"] == 51
    assert checkpoint.model == result.model == "head:resnet8"

    before = found.model_dump(mode="json", exclude={"temperature"}) | {"strength": 30.0}
    # Of a version with a logistic regression
    assert read_result({"procedure": before}).top1 == found.top1

    test = paint(tmp_path / "test", 5, seed=1)
    scores = score_checkpoint(result.best, test).predictions
    assert np.mean([score.correct for score in scores]) > 0.8

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "cross-validated" in page

    rows = dict(checkpoint.decision.rows())
    assert "(95 % interval " in rows["rejection"]
    assert rows["log loss"].endswith("images")

    command = [
        "train",
        "--data",
        str(tmp_path / "photos"),
        "--dry-run",
        "--wrong-labels",
        str(tmp_path / "run"),
    ]
    shown = CliRunner().invoke(app, [*command, "--json"])
    listed = json.loads(shown.stdout)

    assert ("Probably wrong labels" in page) == bool(listed)
    assert all(one["probability_suggested"] > one["probability"] for one in listed)
    assert CliRunner().invoke(app, command).exit_code == 0

    callback = RecordingCallback()
    again = train_recipe(recipe, tmp_path / "run", resume=True, callback=callback)
    assert not any("resumed" in values.get("message", "") for _, values in callback.events)
    assert again.procedure == found

    after = read_checkpoint(result.best)
    # Another order
    (tmp_path / "photos" / "red" / "0.png").rename(tmp_path / "photos" / "red" / "z.png")
    changed = CliRunner().invoke(app, command)

    assert (changed.exit_code, changed.stdout) == (2, "")
    assert "images have changed" in changed.stderr
    with pytest.raises(DataError, match="their order"):
        train_recipe(recipe, tmp_path / "run", resume=True)
    assert (after.training, after.decision) == (checkpoint.training, checkpoint.decision)
    assert all(
        torch.equal(after.weights[name], checkpoint.weights[name])
        for name in checkpoint.weights
    )


def test_copies_share_a_fold_and_count_as_one_image():
    random, classes = np.random.default_rng(0), np.arange(60) % 3
    logits = 2 * np.eye(3)[classes] + random.normal(size=(60, 3))
    one_hot = np.eye(3)[classes]

    # Each image three times, in one group
    groups = np.tile(np.arange(60), 3)
    copied_logits = np.tile(logits, (3, 1))
    copied = softmax_targets(np.tile(classes, 3), 3)

    # The interval of the accuracy
    single = estimate_score(one_hot, "softmax", logits, 0, np.arange(60))
    several = estimate_score(copied.classes, "softmax", copied_logits, 0, groups)

    assert (several.low, several.high) == pytest.approx((single.low, single.high))
    assert several.count == 180

    # The threshold
    expected = fit_decision(logits, classes, estimated_on="cross-validation")
    found = fit_decision(
        copied_logits,
        np.tile(classes, 3),
        estimated_on="cross-validation",
        groups=groups,
    )

    assert expected.rejection is not None
    assert found == expected

    # The interval of the mean precision
    copies = np.tile(random.normal(size=60), 3)
    mean = MeanPrecision.of(copied.classes > 0, np.stack([copies] * 3, axis=1), 0, groups)
    narrower = MeanPrecision.of(copied.classes > 0, np.stack([copies] * 3, axis=1), 0)

    assert mean.high - mean.low > narrower.high - narrower.low


def test_the_accuracy_is_that_of_the_largest_copy_of_each_photograph(
    tmp_path: Path, monkeypatch
):
    root, each = paint(tmp_path / "photos", 6), 7
    for color in COLORS:
        Image.open(root / color / "0.png").resize((48, 40)).save(root / color / "copy.png")
    one, other = sorted(COLORS)[:2]  # a wrong label, of both copies
    for name, size in (("0.png", (40, 44)), ("copy.png", (48, 40))):
        Image.open(root / one / "5.png").resize(size).save(root / other / name)
    first = each * np.arange(len(COLORS))
    found = NearDuplicates(
        np.stack([first, first + each - 1]), np.arange(each * len(COLORS)) < each
    )
    monkeypatch.setattr(
        "sopdeploy.training.few_shot.cross_validation.find_near_duplicates", lambda *_: found
    )
    result = train_with_page(
        read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={root}"]), tmp_path / "run"
    )
    recorded = read_checkpoint(result.last).resume["procedure"]
    judged = recorded["judged"].tolist()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

    assert result.procedure.describe_score()[1:] in html.unescape(page)
    assert set(range(each * len(COLORS))) - set(judged) == set(first.tolist())
    assert result.procedure.top1.count == len(judged)

    num_wrong = result.procedure.top1.count - result.procedure.top1.right
    assert sum(count for _, _, count in result.mistakes) == num_wrong == 2
    assert result.procedure.alike == (sorted(COLORS)[0],)

    alike = f"the images of {sorted(COLORS)[0]} look too much alike to find copies"
    assert alike in "\n".join(result.procedure.lines())


@pytest.mark.parametrize("pattern", ["", "^clip"])
def test_frames_of_a_clip_share_a_fold_unless_files_are_grouped(
    tmp_path: Path, monkeypatch, pattern: str
):
    root, frames = paint(tmp_path / "photos", 12), 4
    objects = np.arange(12 * len(COLORS)) // frames
    vectors = np.eye(objects.max() + 1, 64, dtype=np.float32)[objects]
    found = NearDuplicates(NO_PAIRS, np.zeros(len(objects), np.bool_), vectors)
    monkeypatch.setattr(
        "sopdeploy.training.few_shot.cross_validation.find_near_duplicates", lambda *_: found
    )
    for number in range(12):  # sorted as the frames are
        for color in COLORS:
            (root / color / f"{number}.png").rename(
                root / color / f"clip{number // frames}_{number % frames}.png"
            )
    settings = [*SMALL, *FEW_SHOT, f"data.path={root}", f"data.groups={pattern}"]
    result = train_recipe(read_recipe("photos", settings), tmp_path / "run").procedure

    if pattern:
        # All names of a class begin alike
        assert (result.num_groups, result.clip) == (len(COLORS), ())
    else:
        assert (result.num_groups, len(result.clip)) == (3 * len(COLORS), 2)
        assert "frames of one clip" in "\n".join(result.lines())


def kept_names(
    count: int, first: int = 0, ends: tuple[str, str] = (".jpg", "-2.jpg")
) -> list[bytes]:
    """Name *count* photographs as a server does that keeps them, and every second as a copy."""
    return [f"{first + number:032x}{ends[number % 2]}".encode() for number in range(count)]


# Own photographs of each of two classes, kept ones of each, those of a new class, and the
# judged ones.
SELECTED = {
    "no kept photographs": ((12, 12), (0, 0), 0, 24),
    "kept photographs are atypical": ((12, 12), (5, 3), 0, 24),
    "those of a new class are judged": ((12, 12), (5, 3), 9, 33),
    "too few others for a threshold": ((8, 8), (5, 3), 0, 24),
}


@pytest.mark.parametrize(
    ("own", "kept", "of_new_class", "judged"), SELECTED.values(), ids=SELECTED
)
def test_photographs_that_a_server_selected_are_not_judged(
    own, kept, of_new_class: int, judged: int
):
    paths, targets = [], []
    for target, (num_own, num_kept) in enumerate(
        zip((*own, 0), (*kept, of_new_class), strict=True)
    ):
        names = [f"{target}-{number}.jpg".encode() for number in range(num_own)]
        paths += [
            f"{target}/".encode() + name
            for name in (*names, *kept_names(num_kept, 100 * target))
        ]
        targets += [target] * (num_own + num_kept)
    images = ImageFiles(Path(), ("a", "b", "c"), np.asarray(paths), np.asarray(targets))

    assert select_typical(images).sum() == judged


def test_photographs_of_the_sample_of_a_server_are_judged() -> None:
    own = [f"a/{number}.jpg".encode() for number in range(20)]
    sample = [b"a/" + name for name in kept_names(6, 0, ("-sample.jpg", "-sample-2.png"))]
    unsure = [b"a/" + name for name in kept_names(4, 10)]
    paths = np.asarray([*own, *sample, *unsure])
    images = ImageFiles(Path(), ("a",), paths, np.zeros(len(paths), np.int64))

    assert select_typical(images).tolist() == [True] * 26 + [False] * 4


def test_a_photograph_of_weight_one_counts_as_eight_of_an_eighth():
    features, classes = blobs()
    problem, folds = problem_of([features], softmax_targets(classes)), np.arange(40) // 4 % 5
    # The others are selected
    often = np.repeat(np.arange(40), np.where(np.arange(40) < 28, 8, 1))
    repeated = problem_of([features[often]], softmax_targets(classes[often]))
    weighted = replace(problem, weights=np.where(np.arange(40) < 28, 1.0, 0.125))

    assert weighted.class_means() == pytest.approx(repeated.class_means(), abs=1e-6)

    first = np.unique(often, return_index=True)[1]
    assert weighted.cosines(folds) == pytest.approx(
        repeated.cosines(folds[often])[first], abs=1e-6
    )


def test_the_threshold_and_the_accuracy_are_of_unselected_photographs(
    tmp_path: Path,
):
    root = paint(tmp_path / "photos", 12)
    paint(tmp_path / "others", 2, seed=7)
    for number, color in enumerate(COLORS):
        for name, path in zip(
            kept_names(2, 2 * number),
            sorted((tmp_path / "others" / color).iterdir()),
            strict=True,
        ):
            Image.open(path).convert("RGB").save(root / color / name.decode())
    result = train_recipe(
        read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={root}"]), tmp_path / "run"
    )
    found = result.procedure

    assert (found.num_selected, found.top1.count) == (2 * len(COLORS), 12 * len(COLORS))
    assert result.decision.calibration.num_images == 12 * len(COLORS)
    assert f"{2 * len(COLORS)} photos" in "\n".join(found.lines())


def test_images_in_val_are_held_out_and_the_result_names_unequal_classes(tmp_path: Path):
    paint(tmp_path / "photos" / "train", 6)
    paint(tmp_path / "photos" / "val", 2, seed=1)
    for number in range(3, 6):
        (tmp_path / "photos" / "train" / "red" / f"{number}.png").unlink()
    settings = [
        *SMALL,
        *FEW_SHOT,
        f"data.path={tmp_path / 'photos'}",
        "procedure.group_copies=false",
    ]
    result = train_recipe(read_recipe("photos", settings), tmp_path / "run")
    found = result.procedure

    assert (result.train_count, result.held_out_count) == (15, 6)
    assert found.estimated_on == "held-out"
    assert found.top1.count == 6
    assert found.is_uneven
    assert found.class_counts["red"] == 3
    assert "2.0 times" in found.describe_images()
    assert "add 5" in found.unknown
    assert any("unknown images: " in line for line in found.lines())


def paint_with_a_copy_in_val(photos: Path) -> Path:
    """Paint `train/` and `val/` of *photos*; one of its six images in `val/` is a training image."""
    paint(photos / "train", 4)
    paint(photos / "val", 2, seed=1)
    shutil.copy(photos / "train" / "red" / "0.png", photos / "val" / "red" / "0.png")
    return photos


def warnings_of(callback: RecordingCallback) -> list[str]:
    return [values["warning"] for name, values in callback.events if name == "warning"]


def assert_warns_of_the_copy(callback: RecordingCallback) -> None:
    (warning,) = warnings_of(callback)
    assert warning.startswith("1 of 6 validation images")


def test_the_largest_class_is_that_of_the_judged_images(tmp_path: Path):
    photos = paint_with_a_copy_in_val(tmp_path / "photos")
    blue = photos / "train" / "blue"
    for number in range(8):  # the largest class of the training images only
        shutil.copy(blue / "0.png", blue / f"copy{number}.png")

    settings = [*PLAIN, f"data.path={photos}", "procedure.group_copies=false"]
    callback = RecordingCallback()
    run = train_recipe(read_recipe("photos", settings), tmp_path / "run", callback=callback)
    assert_warns_of_the_copy(callback)

    result = run.procedure
    assert result.class_counts["blue"] == 12
    assert result.judged_counts == {"blue": 2, "green": 2, "red": 1}
    unsure = result.model_copy(update={"top1": Rate.of(2, 5)})
    assert '"blue" gives 40 %' in unsure.describe_score()


def test_the_loop_warns_of_training_images_in_val_unless_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    photos = paint_with_a_copy_in_val(tmp_path / "photos")
    folder = RunFolder(tmp_path / "run", Strategy(torch.device("cpu")))
    recipe = read_recipe("photos", [*SMALL, f"data.path={photos}", "procedure.kind=loop"])

    callback = RecordingCallback()
    set_up_run(recipe, folder, None, callback)
    assert_warns_of_the_copy(callback)

    # Many images are not compared.
    monkeypatch.setattr("sopdeploy.training.division.MAX_HASHED", 5)
    silent = RecordingCallback()
    set_up_run(recipe, folder, None, silent)
    assert warnings_of(silent) == []


def test_training_warns_of_held_out_copies_of_training_images(tmp_path: Path):
    photos = tmp_path / "photos"
    paint(photos / "train", 4)
    paint(photos / "val", 2, seed=1)
    settings = [*PLAIN, f"data.path={photos}"]
    warnings = []
    for name in ("natural", "copied"):
        callback = RecordingCallback()
        train_recipe(read_recipe("photos", settings), tmp_path / name, callback=callback)
        warnings += [values["warning"] for kind, values in callback.events if kind == "warning"]

        # For the second run, a copy of a training image in another format.
        image = Image.open(photos / "train" / "red" / "0.png")
        image.save(photos / "val" / "red" / "copy.bmp")
    (warning,) = warnings

    assert warning.startswith("1 of 7 validation images ")


def test_the_judged_copy_is_found_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    photos = paint(tmp_path / "photos", 4)
    for number in range(12):
        shutil.copy(photos / "red" / "0.png", photos / "red" / f"copy{number}.png")

    shutil.copy(photos / "red" / "0.png", photos / "blue" / "copy.png")
    monkeypatch.setattr(Photo, "pixels", None)  # the features need no image of any size
    settings = [*PLAIN, f"data.path={photos}", "procedure.group_copies=false"]
    settings.append("data.classes_from=folders")  # no search for masks, which reads pixels
    result = train_recipe(read_recipe("photos", settings), tmp_path / "run").procedure

    assert result.contradictions == ("blue/copy.png = red/0.png",)


def test_a_run_records_how_its_folder_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Recipe, "starts_random", False)  # as with a file of weights
    paint(tmp_path / "photos", 4)
    settings = [
        *SMALL,
        "model.name=resnet8",
        "model.config={}",
        f"data.path={tmp_path / 'photos'}",
        "data.classes_from=folders",
        "data.leave_out=blue",
    ]
    folder = RunFolder(tmp_path / "run", Strategy(torch.device("cpu")))

    setup = set_up_run(read_recipe("photos", settings), folder, None, Callback())

    assert setup.origin is not None
    assert setup.origin.reading == FolderReading(classes_from="folders", leave_out="blue")


@pytest.mark.slow
def test_every_image_trains_the_network_up_to_a_hundred_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Recipe, "starts_random", False)  # as with a file of weights
    settings = [
        *SMALL,
        "model.name=resnet8",
        "model.config={}",
        f"data.path={paint(tmp_path / 'photos', 40)}",
    ]
    data, processes = (
        open_data(read_recipe("photos", settings).data),
        Strategy(torch.device("cpu")),
    )
    setup = set_up_run(
        read_recipe("photos", settings),
        RunFolder(tmp_path / "run", processes),
        None,
        Callback(),
    )
    joined = setup.data

    assert "100,000 images" in setup.reason
    assert setup.recipe.procedure == FewShotConfig()
    assert isinstance(joined.train, ImageFiles)
    assert (len(joined.train), len(joined.held_out)) == (120, 0)

    expected = [f"{name}/{number}.png" for name in COLORS for number in range(40)]
    assert sorted(
        "/".join(joined.train.path(index).parts[-2:]) for index in range(120)
    ) == sorted(expected)

    loop = read_recipe("photos", [*settings, "procedure.kind=loop"])
    other = read_recipe("photos", [*settings, "model.name=gmsop-16-8-resnet18"])
    assert (
        select_procedure(read_recipe("photos", settings), FEW_IMAGES + 1).recipe.procedure
        == LoopConfig()
    )

    monkeypatch.setattr("sopdeploy.training.procedure.FEW_IMAGES", 100)
    folder = RunFolder(tmp_path / "other", processes)
    reason = set_up_run(read_recipe("photos", settings), folder, None, Callback()).reason

    assert "100 images" in reason
    assert "procedure.kind=few_shot" in reason
    for recipe in (loop, other):
        selected = select_procedure(recipe, len(data.train)).recipe
        assert selected.procedure == LoopConfig()
        divided = divide_images(selected, data, None, processes).data
        assert len(divided.train) + len(divided.held_out) == 120


def test_a_head_that_reads_the_span_of_some_images_predicts_as_well():
    features, classes = blobs(400)
    targets = softmax_targets(classes)
    exact, problem = problem_of([features], targets), problem_of([features], targets, 20)

    assert problem.reduced.shape == (400, 20)
    heads = [one.fit_all(UNSCALED) for one in (exact, problem)]
    right = [np.mean(head.logits(features).argmax(axis=1) == classes) for head in heads]

    assert right[1] > right[0] - 0.05


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.5, []),  # the rest takes less than two minutes
        (2.0, ["about 6 minutes; x"]),
        (60.0, ["about 3.3 hours; x"]),
    ],
)
def test_the_expected_time_of_a_long_run_is_told_once(seconds: float, expected: list[str]):
    callback, now = RecordingCallback(), 0.0
    told = ExpectedTime(callback, "x", clock=lambda: now)
    for done in range(1, 201):
        now = done * seconds
        told.update(done, 200)
    messages = [values["message"] for _, values in callback.events]

    assert [message.partition(": ")[2] for message in messages] == expected


def test_no_array_of_all_images_has_a_column_per_feature(tmp_path: Path, monkeypatch):
    recipe = read_recipe(
        "photos", [*SMALL, *FEW_SHOT, f"data.path={paint(tmp_path / 'photos', 12)}"]
    )
    monkeypatch.setattr("sopdeploy.training.few_shot.features.MAX_RANK", 20)
    found = []

    def compute(outputs: CachedNetwork, *arguments: Any) -> Features:
        found.append((outputs.network, compute_features(outputs, *arguments)))
        return found[-1][1]

    monkeypatch.setattr(
        "sopdeploy.training.few_shot.cross_validation.compute_features", compute
    )
    train_recipe(recipe, tmp_path / "run")
    ((network, features),) = found

    assert features.reduced.shape == (36, 20)
    values = [getattr(features, field.name) for field in fields(features)]
    arrays = [value for value in values if isinstance(value, np.ndarray) and value.ndim == 2]

    assert (
        max(array.shape[1] for array in arrays) == features.own.shape[1] < network.num_features
    )


def test_several_classes_per_image_take_the_same_path(tmp_path: Path):
    random, lines = np.random.default_rng(0), ["file,classes"]
    (tmp_path / "photos").mkdir()
    for number in range(32):
        pixels = random.integers(0, 60, (20, 20, 3), dtype=np.uint8)
        shown = [name for place, name in enumerate(("green", "red")) if number >> place & 1]
        for name in shown:
            pixels[:, :10] += np.asarray(COLORS[name], np.uint8) // 3
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        lines.append(f"{number}.png,{'|'.join(shown)}")
    (tmp_path / "photos" / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={tmp_path / 'photos'}"])
    result = train_with_page(recipe, tmp_path / "run")
    found = result.procedure

    assert (result.train_count, result.held_out_count, found.top1) == (32, 0, None)
    assert found.map.value == result.best_map > 0.9
    assert found.map.low <= found.map.value <= found.map.high
    assert found.num_images == 32
    assert len(result.decision.thresholds) == 2
    assert read_checkpoint(result.best).decision == result.decision

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"<bdi>{result.decision.thresholds[0]:.3f}</bdi></td>" in page
    assert "counts as unknown" not in page  # this decision has no such rule

    last = read_checkpoint(result.last)
    state = last.resume["procedure"]
    lacking, resumed = (
        {"targets": None, "file_hashes": None},
        {"file_hashes": state["file_hashes"].unique()},
    )

    for older in ({}, lacking, resumed):  # the records of older versions
        arrays = {
            name: value for name, value in {**state, **older}.items() if value is not None
        }
        write_checkpoint(
            result.last, replace(last, resume={**last.resume, "procedure": arrays})
        )
        assert train_recipe(recipe, tmp_path / "run", resume=True).decision == result.decision

    write_checkpoint(result.last, last)
    (tmp_path / "photos" / "labels.csv").write_text(
        "\n".join([lines[0], *lines[:0:-1]]), encoding="utf-8"
    )

    with pytest.raises(DataError, match="their order"):
        train_recipe(recipe, tmp_path / "run", resume=True)


def test_errors_name_the_table_and_what_to_do(tmp_path: Path):
    data = paint(tmp_path / "photos", 2)
    for path in data.glob("*/*.png"):
        path.write_bytes((data / "red" / "0.png").read_bytes())

    with pytest.raises(DataError, match="one photo"):
        train_recipe(
            read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={data}"]), tmp_path / "run"
        )


def write_views(root: Path, photographs: dict[str, int], views: int = 4) -> Path:
    """Write folders of objects: numbers of photographed objects by class, and *views* files of each."""
    random = np.random.default_rng(0)
    for label, count in photographs.items():
        for number in range(count):
            image = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            (root / label / str(number)).mkdir(parents=True)
            for view in range(views):
                Image.fromarray(image).save(root / label / str(number) / f"{view}.png")
    return root


NO_ESTIMATE = (
    "no estimate of the accuracy, which needs two different photos of two classes or more"
)
OBJECTS = {
    "one class of two objects": ({"a": 2, "b": 1}, True, ["are two groups", NO_ESTIMATE]),
    "two objects per class": ({"a": 2, "b": 2}, False, ["all images of a, b are two groups"]),
    "three objects per class": ({"a": 3, "b": 3}, False, []),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_too_few_different_photographs_are_named(case: str, tmp_path: Path):
    objects, has_none, expected = OBJECTS[case]
    photos = write_views(tmp_path / "photos", objects)
    settings = [*PLAIN, "procedure.group_copies=false", "data.classes_from=folders"]
    result = train(photos, out=tmp_path / "run", set=settings)
    lines = "\n".join(result.procedure.lines())

    assert (result.procedure.score is None) == (NO_ESTIMATE in lines) == has_none
    assert [text for text in expected if text not in lines] == []
    assert expected or "two groups" not in lines
    assert not (has_none and result.mistakes)
    assert ("no estimate" in result.report.read_text()) == has_none


def test_photographs_of_an_object_folder_are_a_group_and_no_copies(tmp_path: Path):
    photos, random = (
        write_views(tmp_path / "photos", {"a": 4, "b": 4}, views=1),
        np.random.default_rng(1),
    )
    for file in list(
        photos.rglob("0.png")
    ):  # one more photograph of the object, and of one a copy
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            file.with_name("1.png")
        )

    shutil.copy(photos / "a" / "0" / "0.png", photos / "a" / "0" / "copy.png")
    settings = [*PLAIN, "procedure.group_copies=false", "data.classes_from=folders"]
    result = train(photos, out=tmp_path / "run", set=settings)
    lines = result.procedure.lines()
    groups = (
        "17 photos, 8 independent groups: copies and photos of one folder or object share a fold; "
        "of copies, the largest is judged"
    )

    assert groups in lines
    page = result.report.read_text()
    assert ("group 1: a" in page, "group 2: " in page) == (True, False)


def test_a_group_of_several_classes_is_not_called_a_wrong_label(tmp_path: Path):
    photos = paint(tmp_path / "photos", 6)
    rows = [
        f"{file.relative_to(photos)},{file.parent.name},{file.stem}"
        for file in photos.rglob("*.png")
    ]
    # A session of all classes
    (photos / "labels.csv").write_text("\n".join(["file,classes,group", *rows]))
    result = train(photos, out=tmp_path / "run", set=[*PLAIN, "procedure.group_copies=false"])

    assert result.procedure.contradictions == ()
    assert (result.procedure.num_groups, result.procedure.num_photographs) == (6, 18)


def test_only_a_run_that_starts_from_another_protects_its_classes(tmp_path: Path):
    photos, plain = paint(tmp_path / "photos", 6), [*PLAIN, "procedure.group_copies=false"]
    shutil.copytree(photos / "red", photos / "pink")
    for file in sorted((photos / "pink").iterdir())[2:]:
        file.unlink()
    first, second = tmp_path / "first", tmp_path / "second"
    recipes = []
    for out, changes in (
        (first, {"set": plain}),
        (second, {"from_": str(first)}),
        (tmp_path / "third", {"from_": str(second), "set": ["procedure.margins=false"]}),
    ):
        best = read_checkpoint(train(photos, out=out, **changes).best)
        recipes.append(best.training["recipe"]["procedure"].get("margins"))
        biases = best.weights[next(name for name in best.weights if name.endswith("fc.bias"))]
        recipes.append(biases[best.labels.index("pink")] - biases[best.labels.index("red")])
    (without, bias), (margins, lower), (again, same) = zip(
        recipes[::2], recipes[1::2], strict=True
    )

    assert (without, margins, again) == (False, True, False)
    assert lower < bias == same


def test_photographs_that_are_all_in_two_classes_are_right_in_one(tmp_path: Path):
    photos = paint(tmp_path / "photos", 6)
    shutil.rmtree(photos / "red")
    shutil.rmtree(photos / "green")
    shutil.copytree(photos / "blue", photos / "navy")
    # Without it, train asks about equal file names
    settings = [*PLAIN, "data.classes_from=folders"]
    result = train(photos, out=tmp_path / "run", set=settings)
    score = result.procedure.top1

    assert (score.count, len(result.procedure.contradictions)) == (12, 6)
    assert score.right <= 6


def test_the_suggested_command_can_be_pasted(tmp_path: Path):
    photos, out = paint(tmp_path / "photos", 6), tmp_path / "my run"
    settings = [part for value in PLAIN for part in ("--set", value)]
    shown = CliRunner().invoke(
        app, ["train", "--data", str(photos), "--out", str(out), *settings]
    )
    (line,) = [line for line in shown.output.splitlines() if line.startswith("next: ")]

    assert shlex.split(line)[-2] == str(out / "best.pt")


@pytest.mark.parametrize("wrong", [0, 2])
def test_the_result_says_how_many_labels_it_doubts(tmp_path: Path, monkeypatch, wrong):
    # Of so few photographs
    monkeypatch.setattr("sopdeploy.evaluation.label_doubts.LISTED_RATIO", 1.5)
    root = paint(tmp_path / "photos", 12)
    first, second = sorted(COLORS)[:2]
    for number in range(wrong):
        (root / first / f"{number}.png").rename(root / second / f"wrong {number}.png")
    result = train_recipe(
        read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={root}"]), tmp_path / "run"
    )
    lines = "\n".join(result.procedure.lines())

    assert result.procedure.num_doubted == wrong
    assert ("2 labels of 36" in lines) == bool(wrong)
    assert ("the 2 doubtful labels" in lines) == bool(wrong)


def test_large_classes_are_judged_by_heads_with_all_photographs_of_small_ones():
    features, classes = blobs(120)
    kept = [
        image
        for label, count in enumerate((12, 12, 12, 2))
        for image in np.flatnonzero(classes == label)[:count]
    ]
    targets = softmax_targets(classes[kept])
    folds = np.arange(38) % 10

    def numbers_of_small(groups: np.ndarray) -> list[float]:
        moved = judge_few_apart(targets, folds, groups)
        problem = replace(problem_of([features[kept]], targets), groups=groups)
        heads = problem.cross_validate(moved).heads
        return [float(heads[fold].numbers[3]) for fold in moved.tolist()]

    different = np.arange(38)
    assert numbers_of_small(different) == [2.0] * 36 + [1.0, 1.0]
    # A copy of another class's photograph is in no head that judges this one.
    with_copy = np.where(different == 37, 7, different)
    expected = [1.0 if image in (7, 36, 37) else 2.0 for image in range(38)]
    assert numbers_of_small(with_copy) == expected


def test_a_run_is_scored_by_heads_with_all_photographs_of_small_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cross_validate, folds_of_calls = LinearProblem.cross_validate, []

    def record(problem: LinearProblem, folds: np.ndarray) -> OutOfFold:
        folds_of_calls.append(folds)
        return cross_validate(problem, folds)

    monkeypatch.setattr(LinearProblem, "cross_validate", record)
    root = paint(tmp_path / "photos", 12)

    for number in range(2, 12):
        (root / "red" / f"{number}.png").unlink()

    train(root, out=tmp_path / "run", set=[*PLAIN, "procedure.group_copies=false"])

    # "red" is the last class.
    assert set(folds_of_calls[-1][-2:]).isdisjoint(folds_of_calls[-1][:-2])


@pytest.mark.parametrize("counts", [(3, 3, 3), (12, 12, 5)], ids=["all small", "none small"])
def test_only_small_classes_beside_larger_ones_are_judged_apart(counts: tuple[int, ...]):
    classes = np.repeat(np.arange(3), counts)
    folds = np.arange(len(classes)) % 3
    assert judge_few_apart(softmax_targets(classes), folds, np.arange(len(classes))) is folds


@pytest.mark.parametrize(("spread", "named"), [(1.0, []), (1.4, []), (6.0, [2])])
def test_a_class_of_anything_else_is_recognized_by_its_spread(spread: float, named: list[int]):
    random, classes = np.random.default_rng(0), np.repeat(np.arange(5), 10)
    means = random.normal(size=(5, 200))
    noise = random.normal(size=(50, 200)) * np.where(classes == 2, spread, 1.0)[:, None]
    own = unit_length(means[classes] + noise)
    problem = problem_of([own], softmax_targets(classes, 5))

    assert problem.diffuse_classes().tolist() == named


def test_classes_of_few_images_are_not_judged_by_their_spread():
    random, classes = np.random.default_rng(0), np.repeat(np.arange(3), (10, 10, 4))
    own = unit_length(
        np.where(classes[:, None] == 2, 0.0, 1.0) + 0.1 * random.normal(size=(24, 50))
    )

    assert not problem_of([own], softmax_targets(classes, 3)).diffuse_classes().size


@pytest.mark.slow
def test_two_folders_that_show_one_thing_are_named(tmp_path: Path):
    # Of fewer, chance may take one for the other less often
    root = paint(tmp_path / "photos", 48)
    one, other = sorted(COLORS)[0], root / "zebra"
    other.mkdir()
    for number in range(0, 48, 2):
        (root / one / f"{number}.png").rename(other / f"{number}.png")
    recipe = read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={root}"])
    result = train_recipe(recipe, tmp_path / "run").procedure

    assert result.confused == ((one, "zebra"),)
    assert f"{one} and zebra" in "\n".join(result.lines())


def test_a_damaged_photograph_is_left_out_of_the_head(tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", 4)
    (photos / "red" / "0.png").write_bytes((photos / "red" / "0.png").read_bytes()[:60])
    recipe = read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={photos}"])
    result = train_recipe(recipe, tmp_path / "run").procedure

    assert (result.class_counts["red"], result.left_out[0].split(": ")[0]) == (3, "red/0.png")
    assert any("red/0.png: " in line for line in result.lines())
    assert len(find_wrong_labels(tmp_path / "run")) == result.num_doubted
    assert train_recipe(recipe, tmp_path / "run", resume=True).procedure == result


def test_probabilities_of_several_classes_per_image_are_corrected_for_few_images():
    features, classes = blobs(4000)
    shown = np.eye(4)[classes] + np.eye(4)[(classes + 1) % 4]
    kept = np.arange(24)
    targets = Targets(shown[kept], classes[kept], "sigmoid")
    problem = problem_of([features[kept]], targets)
    scaling = Scaling.fit(
        [problem.cross_validate(targets.folds(list(map(str, kept)), 8, 0))], targets
    )

    assert scaling.excess > 0

    heads = [problem.fit_all(one) for one in (scaling, scaling._replace(excess=0.0))]
    losses = [
        Targets(shown, classes, "sigmoid").losses(head.logits(features)).mean()
        for head in heads
    ]

    assert losses[0] <= losses[1]


def test_the_energies_of_few_images_are_mean_cosines_of_three_cross_validations(
    tmp_path: Path, monkeypatch
):
    photos, first, calls = paint(tmp_path / "photos", 17), LinearProblem.cosines, []

    def with_larger_cosines(problem: LinearProblem, folds: np.ndarray) -> np.ndarray:
        calls.append(folds)
        return first(problem, folds if len(calls) < 3 else calls[1]) + 3 * (len(calls) > 2)

    monkeypatch.setattr(LinearProblem, "cosines", with_larger_cosines)
    recipe = read_recipe("photos", [f"data.path={photos}", *SMALL, *FEW_SHOT])
    found = []
    for limit in (0, 200):
        monkeypatch.setattr("sopdeploy.training.few_shot.cross_validation.FEW_GROUPS", limit)
        last = train_recipe(recipe, tmp_path / str(limit)).last
        found.append(read_checkpoint(last).resume["procedure"]["out_of_fold"].numpy())
    once, mean = (np.logaddexp.reduce(logits, axis=1) for logits in found)
    assert len(calls) == 1 + 3
    assert not np.array_equal(calls[1], calls[2])
    assert (once <= 1).all()
    assert mean == pytest.approx(once + (0 + 3 + 3) / 3)


def test_the_interval_of_the_map_is_that_of_resampled_images():
    random = np.random.default_rng(0)
    true = random.random(30) < 0.4
    scores = random.random(30)
    draws = random.multinomial(30, [1 / 30] * 30, 5)

    # Resamples have the precision of the repeated images, whether scores are distinct or equal.
    for shown in (scores, scores.round(1), np.full(30, 0.5)):
        expected = [
            average_precision(np.repeat(true, row), np.repeat(shown, row)) for row in draws
        ]
        assert np.allclose(resampled_precision(true, shown, draws), expected)

    # The interval is around the value.
    both = np.stack([true, ~true], axis=1)
    scores_of_both = np.stack([scores, 1 - scores], axis=1)
    found = MeanPrecision.of(both, scores_of_both, 0)
    assert found.low < found.value < found.high

    with pytest.raises(DataError, match=r"^no image shows"):
        MeanPrecision.of(np.zeros_like(both), scores_of_both, 0)


def draw_overlapping(root: Path, *, several: bool) -> Path:
    """Write classes that overlap, with copies, a wrong label, a small class and, with *several*, a table."""
    random = np.random.default_rng(7)
    colors = {
        "ant": (60, 70, 80),
        "bee": (95, 80, 70),
        "cat": (80, 110, 80),
        "dog": (70, 80, 120),
    }
    for label, color in colors.items():
        (root / label).mkdir(parents=True)
        for number in range(5 if label == "dog" else 14):
            pixels = random.normal(random.normal(color, 12.0, 3), 40.0, (20, 24, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / label / f"{label}{number:02}.png")
            if label == "bee" and number in (3, 4):
                image.resize((48, 40)).save(root / label / f"copy{number}.png")
    (root / "ant" / "ant00.png").rename(root / "cat" / "wrong.png")

    if several:  # every third image shows the next class, too
        rows = ["file,classes"]
        for number, file in enumerate(sorted(root.glob("*/*.png"))):
            label = file.parent.name
            following = ("bee", "cat", "dog", "ant")[sorted(colors).index(label)]
            classes = f"{label}|{following}" if number % 3 == 0 else label
            rows.append(f"{label}/{file.name},{classes}")
        (root / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
def test_all_numbers_of_a_run_are_those_of_its_golden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, several: bool
) -> None:
    monkeypatch.setattr("sopdeploy.evaluation.label_doubts.LISTED_RATIO", 1.5)  # of so few
    random = np.random.default_rng(3)
    others = tmp_path / "others"
    others.mkdir()
    for number in range(25):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(others / f"{number}.png")
    photos = draw_overlapping(tmp_path / "photos", several=several)
    unknown = {} if several else {"unknown": others}
    # Resized by Pillow, as on every machine
    settings = [*PLAIN, "preprocess.decoding=scaled"]
    result = train(photos, out=tmp_path / "run", set=settings, **unknown)

    # Without paths, and what depends on the machine
    paths = {"out", "data", "best", "last", "history", "report"}
    found = result.model_dump(mode="json", exclude={*paths, "seconds"})
    del found["procedure"]["seconds"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = re.sub(
        r"<(style|script).*?</\1>|<[^>]+>|[\d.]+ (?:s|min|h)\b", " ", page, flags=re.DOTALL
    )
    shown = shown.replace(str(tmp_path), "").partition("All values of the run")[0]
    found["page"] = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", shown)]
    check_golden(f"runs/{'several' if several else 'one'}", found, pytestconfig)
