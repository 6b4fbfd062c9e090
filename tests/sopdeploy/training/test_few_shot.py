"""The few-shot procedure: classifier, folds, choice, decision, and whole runs on painted images."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from sopdeploy import checkpoint
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.commands.train import train
from sopdeploy.data.sources import open_data
from sopdeploy.decision import softmax
from sopdeploy.errors import DataError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.evaluation.decision_fit import fit_decision
from sopdeploy.evaluation.multi_label import MeanPrecision, average_precision, resampled_precision
from sopdeploy.models import registry, second_order_head
from sopdeploy.photos.photo import ArrayImages, ImageFiles
from sopdeploy.report.wrong_labels import list_wrong_labels
from sopdeploy.training import start_weights
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.few_shot.classifier import OutOfFold, Problem, Targets, compose, estimate
from sopdeploy.training.few_shot.features import Features
from sopdeploy.training.recipe import FewShotConfig, LoopConfig, read_recipe
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.start import FEW_IMAGES, divide_images, select_procedure, start_run
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.runs import COLORS, SMALL, RecordingCallback, paint, train_with_page

FEW_SHOT = ["procedure.kind=few_shot"]


def blobs(count: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Draw features (count, 24) of *classes* overlapping clusters, and their classes."""
    random, targets = np.random.default_rng(0), np.arange(count) % classes
    means = 0.7 * random.normal(size=(classes, 24))
    return means[targets] + random.normal(size=(count, 24)), targets


def softmax_targets(classes: np.ndarray, count: int = 4) -> Targets:
    """Build targets of one class per image."""
    return Targets(np.eye(count)[classes], np.ones(len(classes)), classes, "softmax", False)


@pytest.mark.parametrize(("count", "multi_label"), [(40, False), (40, True), (10, False)])
def test_the_head_is_scikit_learns_and_equals_its_linear_layer(count: int, multi_label: bool):
    features, classes = blobs(count)
    targets = softmax_targets(classes)
    if multi_label:
        both = targets.classes + np.eye(4)[(classes + 1) % 4]
        targets = replace(targets, classes=both, activation="sigmoid")
    head = Problem.create([features[:, :10], features[:, 10:]], targets).fit_all(3.0)
    parts = [part - part.mean(axis=0) for part in (features[:, :10], features[:, 10:])]
    scaled = np.concatenate([part / np.sqrt(np.square(part).sum(axis=1).mean()) for part in parts], axis=1)
    columns = targets.classes.T if multi_label else [classes]
    expected = [
        LogisticRegression(C=3.0, max_iter=2000, tol=1e-8).fit(scaled, column).decision_function(scaled)
        for column in columns
    ]
    expected = np.stack(expected, axis=1) if multi_label else expected[0]
    assert np.allclose(features @ head.weight.T + head.bias, expected, atol=0.05)


@pytest.mark.parametrize("classes", [[0, 1, 0, 1], [2, 2, 2, 2], [0, 1, 2, 2]])
def test_a_class_without_images_is_never_the_answer(classes: list[int]):
    features = blobs(4)[0]
    head = Problem.create([features], softmax_targets(np.asarray(classes))).fit_all(10.0)
    assert (features @ head.weight.T + head.bias).argmax(axis=1).tolist() == classes


def test_labels_without_relation_to_the_images_are_estimated_at_chance():
    random, classes = np.random.default_rng(1), np.arange(60) % 4
    targets = softmax_targets(classes)
    assigned = targets.folds([str(number) for number in range(60)], 5, 0)
    logits = Problem.create([random.normal(size=(60, 30))], targets).cross_validate(assigned)
    composed = compose(targets.losses(logits), logits, assigned)
    assert (composed.argmax(axis=1) == classes).mean() < 0.45


def test_folds_hold_equal_parts_of_every_class_and_keep_duplicates_together():
    classes = np.asarray([0] * 10 + [1] * 5)
    keys = [f"a{number}" for number in range(9)] + ["a8"] + [f"b{number}" for number in range(5)]
    folds = softmax_targets(classes, 2).folds(keys, 5, seed=3)
    assert folds[8] == folds[9]
    assert sorted(np.bincount(folds[10:], minlength=5)) == [1] * 5
    assert max(np.bincount(folds[:10])) <= 3


def test_a_class_of_two_images_does_not_halve_the_images_of_all_heads():
    classes = np.asarray([*np.repeat([0, 1, 2], 20), 3, 3])
    folds = softmax_targets(classes).folds(list(map(str, range(62))), 10, seed=3)
    assert len(set(folds)) == 10
    assert folds[60] != folds[61]


def test_heads_without_doubted_labels_separate_wrong_labels_better():
    features, classes = blobs(80)
    wrong = np.arange(80) % 10 == 0
    labels = np.where(wrong, (classes + 1) % 4, classes)
    targets = softmax_targets(labels)
    problem, folds = Problem.create([features], targets), targets.folds(list(map(str, range(80))), 10, 0)
    first = problem.cross_validate(folds, [30.0])[0]
    second = problem.doubt_labels(first, folds, 30.0)
    before, after = (-log_softmax(logits, axis=1)[np.arange(80), labels] for logits in (first, second))
    assert roc_auc_score(wrong, after) > roc_auc_score(wrong, before) + 0.05
    sure = 9.0 * np.eye(4)[labels]
    assert problem.doubt_labels(sure, folds, 30.0) is sure
    assert not problem.doubt_labels(-sure, folds, 30.0).any()  # all are doubted: no image is left to fit


def test_improbable_labels_are_listed_the_least_probable_first():
    wrong = [[0.02, 0.97, 0.01], [0.93, 0.01, 0.06]]
    right = [[0.95, 0.03, 0.02], [0.4, 0.11, 0.49], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9], [0.9, 0.05, 0.05]]
    probabilities, classes = np.asarray(wrong + right), np.asarray([0, 2, 0, 1, 1, 2, 0])
    images = ArrayImages(("a", "b", "c"), np.zeros((7, 2, 2, 3), np.uint8), classes)
    listed = list_wrong_labels(np.log(probabilities), images)
    assert [(index, one.label, one.suggested) for index, one in listed] == [(0, "a", "b"), (1, "c", "a")]
    assert [one.probability for _, one in listed] == pytest.approx([0.02, 0.06])


def test_the_energies_of_few_images_are_means_of_three_cross_validations(tmp_path: Path, monkeypatch):
    photos, first, calls = paint(tmp_path / "photos", 17), Problem.out_of_fold, []

    def with_larger_logits(problem: Problem, folds: np.ndarray) -> OutOfFold:
        calls.append(folds)
        found = first(problem, folds if len(calls) < 3 else calls[1])
        return found._replace(logits=found.logits + 3 * (len(calls) > 2))

    monkeypatch.setattr(Problem, "out_of_fold", with_larger_logits)
    recipe = read_recipe("photos", [f"data.path={photos}", *SMALL, *FEW_SHOT])
    found = []
    for limit in (0, 200):
        monkeypatch.setattr("sopdeploy.training.few_shot.run.FEW_GROUPS", limit)
        last = train_recipe(recipe, tmp_path / str(limit)).last
        found.append(read_checkpoint(last).resume["procedure"]["out_of_fold"].numpy())
    once, mean = (np.logaddexp.reduce(logits, axis=1) for logits in found)
    assert len(calls) == 1 + 3
    assert not np.array_equal(calls[1], calls[2])
    assert mean == pytest.approx(once + (0 + 3 + 3) / 3)
    assert softmax(found[1]) == pytest.approx(softmax(found[0]))


def test_a_small_folder_is_cross_validated_trained_on_whole_and_reported(tmp_path: Path):
    recipe = read_recipe("photos", [*SMALL, f"data.path={paint(tmp_path / 'photos', 17)}"])
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
    test = paint(tmp_path / "test", 5, seed=1)
    scores = score_checkpoint(result.best, test).predictions
    assert np.mean([score.correct for score in scores]) > 0.8
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "cross-validated" in page
    rows = dict(checkpoint.decision.rows())
    assert "(95 % interval " in rows["unknown images"]
    assert "no temperature" in rows["log loss"]
    command = ["data", "check", str(tmp_path / "photos"), "--wrong-labels", str(tmp_path / "run")]
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
    (tmp_path / "photos" / "red" / "0.png").rename(tmp_path / "photos" / "red" / "z.png")  # another order
    changed = CliRunner().invoke(app, command)
    assert (changed.exit_code, changed.stdout) == (2, "")
    assert "the images have changed since the run" in changed.stderr
    assert (after.training, after.decision) == (checkpoint.training, checkpoint.decision)
    assert all(torch.equal(after.weights[name], checkpoint.weights[name]) for name in checkpoint.weights)


def test_copies_share_a_fold_and_count_as_one_image_in_intervals_and_thresholds():
    random, classes = np.random.default_rng(0), np.arange(60) % 3
    logits = 2 * np.eye(3)[classes] + random.normal(size=(60, 3))
    copied = softmax_targets(np.tile(classes, 3), 3)
    groups, one_hot = np.tile(np.arange(60), 3), np.eye(3)[classes]
    single, several = (
        estimate(one_hot, "softmax", logits, 0, np.arange(60)),
        estimate(np.tile(one_hot, (3, 1)), "softmax", np.tile(logits, (3, 1)), 0, groups),
    )
    assert (several.low, several.high) == pytest.approx((single.low, single.high))
    assert several.count == 180
    expected = fit_decision(logits, classes, estimated_on="cross-validation")
    assert expected.rejection is not None
    found = fit_decision(
        np.tile(logits, (3, 1)), np.tile(classes, 3), estimated_on="cross-validation", groups=groups
    )
    assert found == expected
    copies = np.tile(random.normal(size=60), 3)
    mean = MeanPrecision.of(copied.classes > 0, np.stack([copies] * 3, axis=1), 0, groups)
    narrower = MeanPrecision.of(copied.classes > 0, np.stack([copies] * 3, axis=1), 0)
    assert mean.high - mean.low > narrower.high - narrower.low


def test_the_accuracy_is_that_of_the_largest_copy_of_each_photograph(tmp_path: Path, monkeypatch):
    root, each = paint(tmp_path / "photos", 6), 7
    for color in COLORS:
        Image.open(root / color / "0.png").resize((48, 40)).save(root / color / "copy.png")
    first = each * np.arange(len(COLORS))
    monkeypatch.setattr(Features, "find_copies", lambda *_: np.stack([first, first + each - 1]))
    result = train_recipe(read_recipe("photos", [*SMALL, *FEW_SHOT, f"data.path={root}"]), tmp_path / "run")
    judged = read_checkpoint(result.last).resume["procedure"]["judged"].tolist()
    assert set(range(each * len(COLORS))) - set(judged) == set(first.tolist())
    assert result.procedure.top1.count == len(judged)


def test_images_in_val_are_held_out_and_unequal_classes_are_balanced(tmp_path: Path):
    paint(tmp_path / "photos" / "train", 6)
    paint(tmp_path / "photos" / "val", 2, seed=1)
    for number in range(3, 6):
        (tmp_path / "photos" / "train" / "red" / f"{number}.png").unlink()
    settings = [*SMALL, *FEW_SHOT, f"data.path={tmp_path / 'photos'}", "procedure.group_copies=false"]
    result = train_recipe(read_recipe("photos", settings), tmp_path / "run")
    found = result.procedure
    assert (result.train_count, result.held_out_count) == (15, 6)
    assert found.estimated_on == "held-out"
    assert found.top1.count == 6
    assert found.balanced
    assert found.class_counts["red"] == 3
    assert "needs at least 50 images and there are 15" in found.unknown
    assert any("unknown images: not recognized" in line for line in found.lines())


def test_every_image_trains_the_network_unless_there_are_more_than_ten_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = [
        *SMALL,
        "model.name=resnet8",
        "model.config={}",
        f"data.path={paint(tmp_path / 'photos', 40)}",
    ]
    data, processes = open_data(read_recipe("photos", settings).data), Strategy(torch.device("cpu"))
    start = start_run(
        read_recipe("photos", settings), RunFolder(tmp_path / "run", processes), None, Callback()
    )
    joined = start.data
    assert start.reason.startswith("few-shot procedure: there are at most 10,000 images")
    assert start.recipe.procedure == FewShotConfig()
    assert isinstance(joined.train, ImageFiles)
    assert (len(joined.train), len(joined.held_out)) == (120, 0)
    expected = [f"{name}/{number}.png" for name in COLORS for number in range(40)]
    assert sorted("/".join(joined.train.path(index).parts[-2:]) for index in range(120)) == sorted(expected)
    loop = read_recipe("photos", [*settings, "procedure.kind=loop"])
    other = read_recipe("photos", [*settings, "model.name=psdr-resnet50"])
    assert select_procedure(read_recipe("photos", settings), FEW_IMAGES + 1).procedure == LoopConfig()
    for recipe in (loop, other):
        selected = select_procedure(recipe, len(data.train))
        assert selected.procedure == LoopConfig()
        divided = divide_images(selected, data, None, processes).data
        assert len(divided.train) + len(divided.held_out) == 120


def test_a_head_that_reads_the_span_of_some_images_predicts_as_well(monkeypatch):
    features, classes = blobs(400)
    targets = softmax_targets(classes)
    exact = Problem.create([features], targets).fit_all(10.0)
    monkeypatch.setattr("sopdeploy.training.few_shot.classifier.MAX_RANK", 20)
    monkeypatch.setattr("sopdeploy.training.few_shot.classifier.ROWS", 64)
    problem = Problem.create([features], targets)
    assert problem.reduced.shape == (400, 20)
    head = problem.fit_all(10.0)
    right = [np.mean((features @ one.weight.T + one.bias).argmax(axis=1) == classes) for one in (exact, head)]
    assert right[1] > right[0] - 0.05


def test_the_interval_of_the_map_is_that_of_resampled_images():
    random = np.random.default_rng(0)
    true, scores = random.random(30) < 0.4, random.random(30)
    draws = random.multinomial(30, [1 / 30] * 30, 5)
    for shown in (scores, scores.round(1), np.full(30, 0.5)):  # distinct scores, some equal, all equal
        expected = [average_precision(np.repeat(true, row), np.repeat(shown, row)) for row in draws]
        assert np.allclose(resampled_precision(true, shown, draws), expected)
    both = np.stack([true, ~true], axis=1)
    with pytest.raises(DataError, match=r"^no image shows a class of the network"):
        MeanPrecision.of(np.zeros_like(both), np.stack([scores, 1 - scores], axis=1), 0)
    found = MeanPrecision.of(both, np.stack([scores, 1 - scores], axis=1), 0)
    assert found.low < found.value < found.high


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
    recipe = read_recipe("photos", [*SMALL, f"data.path={tmp_path / 'photos'}"])
    result = train_with_page(recipe, tmp_path / "run")
    found = result.procedure
    assert (result.train_count, result.held_out_count, found.top1) == (32, 0, None)
    assert found.map.value == result.best_map > 0.9
    assert found.map.low <= found.map.value <= found.map.high
    assert found.num_images == 32
    assert len(result.decision.thresholds) == 2
    assert read_checkpoint(result.best).decision == result.decision
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"<td><bdi>{result.decision.thresholds[0]:.3f}</bdi></td>" in page
    assert train_recipe(recipe, tmp_path / "run", resume=True).decision == result.decision


def test_errors_name_the_table_and_what_to_do(tmp_path: Path):
    data = paint(tmp_path / "photos", 2)
    for path in data.glob("*/*.png"):
        path.write_bytes((data / "red" / "0.png").read_bytes())
    with pytest.raises(DataError, match="copies of one photograph"):
        train_recipe(read_recipe("photos", [*SMALL, f"data.path={data}"]), tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photograph_is_read_once_and_three_networks_are_built(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads, built = tmp_path / "reads", list[str]()
    read = ImageFiles.read

    def record(images: ImageFiles, index: int) -> bytes:
        with reads.open("a") as file:  # loader processes read, too
            file.write(f"{images.identity(index)}\n")
        return read(images, index)

    create = registry.create_model

    def count(name: str, **options: Any) -> Any:
        built.append(name)
        return create(name, **options)

    monkeypatch.setattr(ImageFiles, "read", record)
    for module in (start_weights, second_order_head, checkpoint):
        monkeypatch.setattr(module, "create_model", count)
    photos = paint(tmp_path / "photos", 27)
    settings = [*SMALL, f"workers={workers}"]
    train(photos, out=tmp_path / "run", set=settings)
    first = len(reads.read_text().splitlines())
    assert first <= 1.5 * 81
    assert len(built) <= 3
    train(photos, out=tmp_path / "again", set=settings)  # with features in the cache
    assert len(reads.read_text().splitlines()) - first <= 1.5 * 81


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


NO_ESTIMATE = "no estimate of the accuracy, which needs two different photographs of two classes or more"
OBJECTS = {
    "one class of two objects": ({"a": 2, "b": 1}, True, ["are two groups", NO_ESTIMATE]),
    "two objects per class": ({"a": 2, "b": 2}, False, ["all images of a, b are two groups"]),
    "three objects per class": ({"a": 3, "b": 3}, False, []),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_too_few_different_photographs_are_named(case: str, tmp_path: Path):
    objects, has_none, expected = OBJECTS[case]
    photos = write_views(tmp_path / "photos", objects)
    result = train(photos, out=tmp_path / "run", set=[*SMALL, *FEW_SHOT, "procedure.group_copies=false"])
    lines = "\n".join(result.procedure.lines())
    assert (result.procedure.score is None) == (NO_ESTIMATE in lines) == has_none
    assert [text for text in expected if text not in lines] == []
    assert expected or "two groups" not in lines
    assert not (has_none and result.mistakes)
    assert ("no estimate" in result.report.read_text()) == has_none


def test_photographs_of_an_object_folder_are_a_group_and_no_copies(tmp_path: Path):
    photos, random = write_views(tmp_path / "photos", {"a": 4, "b": 4}, views=1), np.random.default_rng(1)
    for file in list(photos.rglob("0.png")):  # one more photograph of the object, and of one a copy
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file.with_name("1.png"))
    shutil.copy(photos / "a" / "0" / "0.png", photos / "a" / "0" / "copy.png")
    result = train(photos, out=tmp_path / "run", set=[*SMALL, *FEW_SHOT, "procedure.group_copies=false"])
    lines = result.procedure.lines()
    assert "17 photographs, 16 different ones: copies share a fold, and the largest one is judged" in lines
    groups = "16 different photographs are 8 groups, such as those of one object; a group shares a fold"
    assert groups in lines
    page = result.report.read_text()
    assert ("group 1: a" in page, "group 2: " in page) == (True, False)


def test_a_group_of_several_classes_is_not_called_a_wrong_label(tmp_path: Path):
    photos = paint(tmp_path / "photos", 6)
    rows = [f"{file.relative_to(photos)},{file.parent.name},{file.stem}" for file in photos.rglob("*.png")]
    (photos / "labels.csv").write_text("\n".join(["file,classes,group", *rows]))  # a session of all classes
    result = train(photos, out=tmp_path / "run", set=[*SMALL, *FEW_SHOT, "procedure.group_copies=false"])
    assert result.procedure.contradictions == ()
    assert (result.procedure.num_groups, result.procedure.num_photographs) == (6, 18)


def test_photographs_that_are_all_in_two_classes_give_no_estimate(tmp_path: Path):
    photos = paint(tmp_path / "photos", 6)
    shutil.rmtree(photos / "red")
    shutil.rmtree(photos / "green")
    shutil.copytree(photos / "blue", photos / "navy")
    result = train(photos, out=tmp_path / "run", set=SMALL)
    assert (result.procedure.score, result.mistakes) == (None, ())


def test_the_suggested_command_can_be_pasted(tmp_path: Path):
    photos, out = paint(tmp_path / "photos", 6), tmp_path / "my run"
    settings = [part for value in SMALL for part in ("--set", value)]
    shown = CliRunner().invoke(app, ["train", "--data", str(photos), "--out", str(out), *settings])
    (line,) = [line for line in shown.output.splitlines() if line.startswith("next: ")]
    assert shlex.split(line)[-2] == str(out / "best.pt")
