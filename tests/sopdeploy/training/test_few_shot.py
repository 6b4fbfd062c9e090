"""The few-shot procedure: head, folds, cut networks, decision, and whole runs on painted images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from sopdeploy.backbones import resnet
from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.comparison.runs import compare
from sopdeploy.data.base import ArrayImages
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.sources import open_data
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.multi_label import average_precision
from sopdeploy.evaluation.prediction import score_checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.pooling.covariance import ISqrtPoolingConfig
from sopdeploy.models.registry import create_model
from sopdeploy.report.page import write_report
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.few_shot.config import FewShotResult, FineTuningConfig
from sopdeploy.training.few_shot.estimates import Targets, resampled_precision
from sopdeploy.training.few_shot.features import compute_features, last_stage, record_input
from sopdeploy.training.few_shot.head import HeadProblem, LinearHead, assign_folds, cross_validate
from sopdeploy.training.few_shot.last_stage import LastStageTrainer, StageData
from sopdeploy.training.few_shot.networks import fit_reduction
from sopdeploy.training.few_shot.procedure import select_split
from sopdeploy.training.few_shot.tails import Tail, copy_tail, cut_before_last_stage, make_tails
from sopdeploy.training.few_shot.tuning import TunedTail, choose_epochs, cross_validate_epochs, decide
from sopdeploy.training.few_shot.unknown import leave_classes_out, left_out_areas
from sopdeploy.training.fine_tuning import classifier_name
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe

COLORS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}
SMALL = [
    "model.name=dsop-resnet8",
    "model.config={aux_widths=[8,8,8], iterations=2}",
    "start.weights=none",
    "preprocess.resize=16",
    "preprocess.crop=16",
    "few_shot.fine_tuning.epochs=2",
]


def paint(root: Path, each: int, seed: int = 0) -> Path:
    """Write *each* noisy images of three colors below *root*, one folder per color."""
    random = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(random.normal(color, 40.0, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def blobs(count: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Draw features (count, 2, 24) of *classes* overlapping clusters, and their targets."""
    random, targets = np.random.default_rng(0), np.arange(count) % classes
    means = 0.7 * random.normal(size=(classes, 24))
    return means[targets][:, None] + random.normal(size=(count, 2, 24)), targets


def test_the_head_is_the_optimum_that_scikit_learn_finds_and_equals_its_linear_layer():
    features, targets = blobs()
    everything, l2 = np.arange(len(targets)), 0.01
    problem = HeadProblem.create(features, np.eye(4)[targets], np.ones(len(targets)), "softmax")
    parameters = problem.fit(everything, l2)
    rows = problem.reduced.reshape(2 * len(targets), -1)
    reference = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=10_000)
    reference.fit(rows, np.repeat(targets, 2))
    assert np.allclose(parameters[:, :-1], reference.coef_, atol=2e-4)
    head = problem.linear(parameters)
    expected = problem.logits(parameters, everything)
    assert np.allclose(features[:, 0] @ head.weight.T + head.bias, expected, atol=1e-10)


def test_a_sigmoid_head_fits_each_class_on_its_own():
    features, targets = blobs()
    both = np.eye(4)[targets] + np.eye(4)[(targets + 1) % 4]
    problem = HeadProblem.create(features, both, np.ones(len(targets)), "sigmoid")
    parameters = problem.fit(np.arange(len(targets)), 0.01)
    rows = problem.reduced.reshape(2 * len(targets), -1)
    for one in range(4):
        reference = LogisticRegression(C=1 / (0.01 * len(rows)), tol=1e-10, max_iter=10_000)
        reference.fit(rows, np.repeat(both[:, one], 2))
        assert np.allclose(parameters[one, :-1], reference.coef_[0], atol=2e-4)


def test_fine_tuning_that_diverges_ends_before_its_first_useless_epoch():
    features, classes = blobs()
    one_hot, weights = np.eye(4)[classes], np.ones(40)
    problem = HeadProblem.create(features, one_hot, weights, "softmax")
    targets = Targets(one_hot, weights, classes.tolist(), "softmax", balanced=False)
    folds = assign_folds(classes.tolist(), [str(number) for number in range(40)], 2, 0)

    class Diverging:
        epoch = 0

        def train_epoch(self) -> None:
            self.epoch += 1

        def logits(self, images: np.ndarray) -> np.ndarray:
            return np.full((len(images), 4), 0.0 if self.epoch < 2 else np.nan)

    config, alone = FineTuningConfig(), cross_validate(problem, folds)
    given = (problem, targets, alone, folds, lambda *_: Diverging(), config, lambda *_: None)
    assert len(cross_validate_epochs(*given)) == 2


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_labels_without_relation_to_the_images_are_estimated_at_chance(folds: int):
    random = np.random.default_rng(1)
    targets = np.arange(60) % 4
    problem = HeadProblem.create(random.normal(size=(60, 2, 30)), np.eye(4)[targets], np.ones(60), "softmax")
    assigned = assign_folds(targets.tolist(), [str(number) for number in range(60)], folds, 0)
    estimate = cross_validate(problem, assigned)
    assert len(estimate.l2_of_fold) == folds
    assert (estimate.logits.argmax(axis=1) == targets).mean() < 0.45
    assert problem.losses(estimate.logits, np.arange(60)).mean() > 0.9 * np.log(4)


def test_folds_hold_equal_parts_of_every_class_and_keep_duplicates_together():
    strata = [0] * 10 + [1] * 5
    keys = [f"a{number}" for number in range(9)] + ["a8"] + [f"b{number}" for number in range(5)]
    folds = assign_folds(strata, keys, 5, seed=3)
    assert folds[8] == folds[9]
    assert sorted(np.bincount(folds[10:], minlength=5)) == [1] * 5
    assert max(np.bincount(folds[:10])) <= 3
    assert (folds == assign_folds(strata, keys, 5, seed=3)).all()


@pytest.mark.parametrize(
    ("name", "config", "separable"),
    [
        ("resnet8", {}, True),
        ("dsop-resnet8", {"aux_widths": [8, 8, 8]}, True),
        ("preact-resnet110", {"blocks": 2}, True),
        ("isqrt-resnet8", {"pooling": {"kind": "isqrt", "width": 8}}, True),
        ("timm:resnet10t", {}, True),
        ("efficientnet-b0", {}, False),  # computes activations outside its modules
    ],
)
def test_a_network_cut_before_its_last_stage_computes_the_same_features(name, config, separable):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **config).eval()
    images = torch.randn(2, 3, 32, 32)
    stage = model.get_submodule(last_stage(model))
    with (
        torch.no_grad(),
        record_input(stage) as of_stage,
        record_input(next(stage.children())) as of_block,
        record_input(model.get_submodule(classifier_name(model))) as vector,
    ):
        expected = model(images)
    stage_input = (of_stage or of_block)[0]
    tail = cut_before_last_stage(model, stage_input, vector[0])
    assert (tail is not None) == separable
    if tail is not None:
        with torch.no_grad():
            assert torch.allclose(tail.eval()(stage_input), expected, atol=1e-4)


def test_a_fine_tuned_last_stage_is_copied_to_the_network_and_nothing_else_changes():
    torch.manual_seed(0)
    model = create_model("resnet8", num_classes=3).eval()
    images, targets = torch.randn(6, 3, 16, 16), torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), record_input(model.layer3[0]) as stage, record_input(model.fc) as vector:
        model(images)
    tail = cut_before_last_stage(model, stage[0], vector[0])
    inputs = torch.stack([stage[0], stage[0]], dim=1)
    problem = HeadProblem.create(vector[0][:, None].numpy(), targets.double().numpy(), np.ones(6), "softmax")
    head = problem.linear(problem.fit(np.arange(6), 0.1))
    data = StageData(inputs, targets, torch.ones(6), "softmax")
    plain = Tail("fine-tuning", model, tail)
    trainer = LastStageTrainer(plain, head, np.arange(6), data, FineTuningConfig(lr=1e-3), seed=0)
    losses = [trainer.train_epoch() for _ in range(10)]
    assert losses[-1] < losses[0]
    copy_tail(trainer.model, model)
    with torch.no_grad():
        assert np.allclose(trainer.logits(np.arange(6)), model(images), atol=1e-4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(("layer3", "fc")) for name in changed)
    assert not any("running" in name for name in changed)


def test_a_candidate_is_kept_only_if_more_images_are_right_and_the_loss_is_smaller():
    classes, folds = np.eye(2)[[0, 1] * 6], np.arange(12) % 3
    targets = Targets(classes, np.ones(12), [0, 1] * 6, "softmax", balanced=False)
    tail = Tail("fine-tuning", *[create_model("resnet8", num_classes=2)] * 2)
    right = 2.0 * (2 * classes - 1)
    one_wrong = np.concatenate([-right[:1], right[1:]])
    cases = {
        "smallest loss": (one_wrong, 1.2 * right, True),
        "it does not classify more images correctly": (right, 1.2 * right, False),
        "the loss is not smaller": (one_wrong, 0.01 * right, False),
    }
    for reason, (before, after, kept) in cases.items():
        tuning = decide(targets, folds, before, [TunedTail(tail, after, 1)], 0)
        result = tuning.results[0]
        assert (result.kept, result.reason, tuning.kept is not None) == (kept, reason, kept)
    logits, epochs = choose_epochs(targets, folds, np.stack([one_wrong, 1.2 * right]))
    assert epochs == 1
    assert (logits == 1.2 * right).all()
    assert choose_epochs(targets, folds, np.stack([right, one_wrong]))[1] == 0


def test_a_small_folder_is_cross_validated_trained_on_whole_and_reported(tmp_path: Path):
    recipe = read_recipe("photos", [*SMALL, f"data.path={paint(tmp_path / 'photos', 17)}"])
    stages: list[str] = []

    class Stages(Callback):
        def on_stage(self, *, name: str, done: int, total: int) -> None:
            stages.append(name)
            assert 0 <= done <= total

    result = train(recipe, tmp_path / "run", callback=Stages())
    found = result.few_shot
    assert (result.train_count, result.held_out_count) == (51, 0)
    assert found.estimated_on == "cross-validation"
    assert found.class_counts == dict.fromkeys(COLORS, 17)
    assert found.top1.count == 51
    assert found.top1.low < found.top1.share <= 1
    assert found.top1.share > 0.8
    assert "interval" in found.lines()[-1]
    assert list(dict.fromkeys(stages))[:4] == [
        "features of the frozen backbone",
        "cross-validation of the head",
        "cross-validation of fine-tuning",
        "cross-validation of fine-tuning with branches",
    ]
    assert {"best.pt", "last.pt", "history.csv", "features.pt"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert read_checkpoint(result.best).training["few_shot"]["top1"]["count"] == 51
    test = paint(tmp_path / "test", 5, seed=1)
    _, scores = score_checkpoint(result.best, test, on_image=lambda _done, _total: None)
    assert np.mean([score.correct for score in scores]) > 0.8
    page = write_report(tmp_path / "run").read_text()
    assert "by fitting the classifier without it" in page
    assert "cross-validated" in page
    before = read_checkpoint(result.best)
    assert before.decision is not None
    again = train(recipe, tmp_path / "run", resume=True)
    assert again.few_shot == found
    after = read_checkpoint(result.best)
    assert (after.training, after.decision) == (before.training, before.decision)
    assert all(torch.equal(after.weights[name], before.weights[name]) for name in before.weights)


def test_images_in_val_are_held_out_and_unequal_classes_are_balanced(tmp_path: Path):
    paint(tmp_path / "photos" / "train", 6)
    paint(tmp_path / "photos" / "val", 2, seed=1)
    for number in range(3, 6):
        (tmp_path / "photos" / "train" / "red" / f"{number}.png").unlink()
    result = train(read_recipe("photos", [*SMALL, f"data.path={tmp_path / 'photos'}"]), tmp_path / "run")
    found = result.few_shot
    assert (result.train_count, result.held_out_count) == (15, 6)
    assert found.estimated_on == "held-out"
    assert found.top1.count == 6
    assert found.balanced
    assert found.class_counts["red"] == 3


def test_the_pooling_that_beats_the_first_one_becomes_the_head(tmp_path: Path):
    settings = [*SMALL, "model.name=resnet8", "model.config={}", "few_shot.fine_tuning.epochs=0"]
    settings += [f"data.path={paint(tmp_path / 'photos', 6)}"]
    heads = 'few_shot.heads=["gap", {kind="isqrt", width=8, iterations=2}]'
    result = train(read_recipe("photos", [*settings, heads]), tmp_path / "run")
    first, second, tuning = result.few_shot.candidates
    assert (first.name, second.name, tuning.kept) == ("gap head", "isqrt of 8 channels head", False)
    better = second.score.right > first.score.right and second.loss < first.loss
    assert (first.kept, second.kept) == (not better, better)
    checkpoint = read_checkpoint(result.best)
    assert checkpoint.config["pooling"]["kind"] == ("isqrt" if better else "gap")
    build_classifier(checkpoint, result.best)


def test_a_reduction_to_principal_components_keeps_the_covariance():
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 4, 5, 5, generator=random) - 3
    mixed = torch.einsum("cd,bdhw->bchw", torch.randn(16, 4, generator=random), maps)
    pooling = ISqrtPoolingConfig(width=4).build(16).eval()
    fit_reduction(pooling, [mixed[:2], mixed[2:]])
    with torch.no_grad():
        reduced = pooling.reduce(mixed).flatten(start_dim=2)
    assert reduced.min() > 0
    grams = [
        (part - part.mean(dim=2, keepdim=True)).transpose(1, 2) @ (part - part.mean(dim=2, keepdim=True))
        for part in (mixed.flatten(start_dim=2), reduced)
    ]
    assert torch.allclose(*grams, atol=1e-3)


def test_tails_train_the_branches_of_the_last_stage_and_a_gsop_block_that_starts_neutral(monkeypatch):
    monkeypatch.setitem(resnet.BLOCKS, 18, (2, 1, 1, 2))
    torch.manual_seed(0)
    config = {"aux_widths": [8] * 4, "aux_blocks": [1] * 4, "iterations": 2, "conv5_stride": 1}
    model = create_model("dsop-resnet18", num_classes=2, **config).eval()
    with torch.no_grad(), record_input(model.layer4[0]) as stage, record_input(model.fc) as vector:
        model(torch.randn(4, 3, 32, 32))
    inputs = torch.stack([stage[0], stage[0]], dim=1)
    tails = make_tails("dsop-resnet18", model, stage[0], vector[0], FineTuningConfig(), seed=0)
    names = ["fine-tuning", "fine-tuning with branches", "fine-tuning with a GSoP block"]
    assert [tail.name for tail in tails] == names
    assert [sorted(tail.model.heads(stage[0])) for tail in tails] == [
        ["main"],
        ["layer4_1", "main"],
        ["main"],
    ]
    data = StageData(inputs, torch.eye(2)[[0, 1, 0, 1]], torch.ones(4), "softmax")
    head = LinearHead(np.random.default_rng(0).normal(size=(2, 512)), np.zeros(2))
    trainers = [
        LastStageTrainer(tail, head, np.arange(4), data, FineTuningConfig(lr=1e-4), seed=0) for tail in tails
    ]
    start = trainers[0].logits(np.arange(4))
    for tail, trainer in zip(tails, trainers, strict=True):
        assert np.allclose(trainer.logits(np.arange(4)), start, atol=1e-3)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train_epoch()
        copy_tail(trainer.model, tail.network)
        after = tail.network.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert "layer4.0.conv1.weight" in changed
        assert all(any(name.startswith(part) for name in changed) for part in tail.new)
    assert tails[2].catalog == "gsop-net1-resnet18"
    assert model.state_dict().keys() >= {"branches.layer1_1.fc.weight"}
    assert (
        make_tails("resnet8", create_model("resnet8").eval(), stage[0], vector[0], FineTuningConfig(), 0)
        == []
    )


def test_heads_without_a_class_never_see_its_images():
    features, targets = blobs()
    folds = np.arange(40) // 4 % 5
    problem = HeadProblem.create(features, np.eye(4)[targets], np.ones(40), "softmax")
    found = leave_classes_out(problem, folds, 0.01)
    moved = problem.reduced.copy()
    moved[targets == 2] += 100.0
    others = leave_classes_out(replace(problem, reduced=moved), folds, 0.01)
    assert [(len(one.known), one.unknown.shape) for one in found] == [(30, (10, 3))] * 4
    assert [np.allclose(a.known, b.known) for a, b in zip(found, others, strict=True)] == [
        False, False, True, False,
    ]  # fmt: skip
    areas = left_out_areas(found, 1.0)
    known, unknown = found[0].known.max(axis=1), found[0].unknown.max(axis=1)
    assert areas.keys() == {"max_probability", "energy"}
    assert known.mean() > unknown.mean()
    assert all(0.5 < area <= 1 for area in areas.values())


def test_the_interval_of_the_map_is_that_of_resampled_images():
    random = np.random.default_rng(0)
    true, scores = random.random(30) < 0.4, random.random(30)
    draws = random.multinomial(30, [1 / 30] * 30, 5)
    expected = [average_precision(np.repeat(true, row), np.repeat(scores, row)) for row in draws]
    assert np.allclose(resampled_precision(true, scores, draws), expected)
    targets = Targets(np.stack([true, ~true], 1).astype(float), np.ones(30), [0] * 30, "sigmoid", False)
    found = targets.estimate(np.stack([scores, 1 - scores], axis=1), 0)
    assert found.low < found.share < found.high


def test_a_fold_whose_only_other_images_belong_to_the_left_out_class_has_constant_logits():
    features, _ = blobs(count=3, classes=3)
    problem = HeadProblem.create(features, np.eye(3), np.ones(3), "softmax")
    found = leave_classes_out(problem, np.array([0, 0, 1]), 0.01)
    assert [(one.known.shape, one.unknown.shape) for one in found] == [((2, 2), (1, 2))] * 3
    assert np.ptp(found[2].known, axis=0).max() < 1e-6


def test_resamples_that_show_no_class_do_not_count():
    classes = np.zeros((20, 2))
    classes[[0, 1], [0, 1]] = 1
    scores = np.random.default_rng(0).random((20, 2))
    found = Targets(classes, np.ones(20), [0] * 20, "sigmoid", False).estimate(scores, 0)
    assert 0 < found.low < found.share < found.high < 0.5


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
    result = train(recipe, tmp_path / "run")
    found = result.few_shot
    assert (result.train_count, result.held_out_count, found.top1) == (32, 0, None)
    assert found.map.share == result.best_map > 0.9
    assert found.map.low <= found.map.share <= found.map.high
    assert {candidate.score.count for candidate in found.candidates} == {32}
    assert len(result.decision.thresholds) == 2
    assert read_checkpoint(result.best).decision == result.decision
    page = write_report(tmp_path / "run").read_text()
    assert "fitted without it" in page
    assert f"<td>{result.decision.thresholds[0]:.3f}</td>" in page
    assert train(recipe, tmp_path / "run", resume=True).decision == result.decision


def test_records_from_before_there_were_several_candidates_are_read():
    rate = {"share": 0.5, "right": 5, "count": 10, "low": 0.2, "high": 0.8}
    tuning = {"kept": True, "reason": "better", "epochs": 3, "top1_before": 0.4, "top1_after": 0.5}
    tuning |= {"loss_before": 1.5, "loss_after": 1.25}
    record = {"top1": rate, "estimated_on": "cross-validation", "class_counts": {"a": 2, "b": 8}}
    record |= {"balanced": True, "duplicates": 1, "fine_tuning": tuning, "seconds": {"head": 1.0}}
    record["heads"] = [{"pooling": "gap", "features": 8, "top1": 0.5, "loss": 1.0, "l2": 0.1}]
    assert FewShotResult.model_validate(record).lines() == (
        "images: a 2, b 8; classes have equal weights, the largest has 4.0 times the images of the smallest; "
        "fewer than 5 images of a: add more; 1 duplicate",
        "gap head: kept, smallest loss (top-1 50.0 %, 24 to 76 %; loss 1.000; 8 features, l2 0.1)",
        "fine-tuning: kept, better (top-1 50.0 %, 24 to 76 %; loss 1.250; before 40.0 %, loss 1.500; "
        "3 epochs)",
        "top-1 50.0 % (cross-validated, 95 % interval 20 to 80 %; "
        'always answering "b" gives 80 %) of 10 images, 1 s',
    )


def test_a_full_disk_at_the_stored_features_is_one_error(tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:  # as the writer of PyTorch reports it
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", full)
    recipe = read_recipe("photos", [*SMALL, f"data.path={paint(tmp_path / 'photos', 6)}"])
    with pytest.raises(CheckpointError, match=r"features\.pt: cannot be written .*is the disk of .* full"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_starts_again_from_its_stored_features(tmp_path: Path, monkeypatch):
    recipe = read_recipe("photos", [*SMALL, f"data.path={paint(tmp_path / 'photos', 6)}"])
    reference = train(recipe, tmp_path / "reference")

    class Stop(Callback):
        def on_stage(self, *, name: str, done: int, total: int) -> None:
            if name == "cross-validation of the head":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", callback=Stop())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["features.pt"]
    monkeypatch.setattr("sopdeploy.training.few_shot.features._run", None)  # would fail if called
    result = train(recipe, tmp_path / "run", resume="auto")
    assert result.few_shot.top1 == reference.few_shot.top1
    one, other = (read_checkpoint(path).weights for path in (result.best, reference.best))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_stored_features_of_other_options_are_not_used(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images, rules = ArrayImages(("a", "b"), pixels, np.arange(4) % 2), Preprocess(resize=8, crop=8)
    widths = []
    for pooling in ("gap", "bcnn", "bcnn"):  # without weights of their own
        network = create_model("resnet8", num_classes=2, base_width=2, pooling=pooling)
        for tensor in network.state_dict().values():
            tensor.fill_(1)
        arguments = {"workers": 0, "max_gib": 1.0, "on_image": lambda _done, _total: None}
        found = compute_features([network], images, rules, cache=tmp_path / "features.pt", **arguments)
        widths.append(found.vectors[0].shape[2])
    assert widths == [8, 64, 64]


def test_which_images_the_procedure_uses(tmp_path: Path):
    recipe = read_recipe("photos", [*SMALL, f"data.path={paint(tmp_path / 'photos', 6)}"])
    data = open_data(recipe.data)
    joined, applies = select_split(recipe, data)
    assert applies
    assert isinstance(joined.train, ImageFiles)
    assert len(joined.train) == 18
    assert [path.name for path in map(joined.train.path, range(18))] == [f"{n}.png" for n in range(6)] * 3
    for settings, held_out, expected in (
        (["few_shot.min_held_out=3"], 3, True),
        (["few_shot.max_images=10"], 3, False),
    ):
        other = read_recipe("photos", [*SMALL, *settings, f"data.path={tmp_path / 'photos'}"])
        chosen, applies = select_split(other, data)
        assert (len(chosen.held_out), applies) == (held_out, expected)
    assert select_split(recipe.model_copy(update={"few_shot": None}), data) == (data, False)
    assert select_split(recipe, replace(data, divided=False))[0].held_out is data.held_out


def test_errors_name_the_table_and_what_to_do(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"few_shot: .* remove the tables ema and teacher"):
        read_recipe("photos", ["ema={decay=0.9}"])
    data = paint(tmp_path / "photos", 2)
    recipe = read_recipe(
        "photos",
        [
            *SMALL,
            f"data.path={data}",
            'few_shot.heads=["gap"]',
            "model.name=timm:resnet10t",
            "model.config={}",
        ],
    )
    with pytest.raises(ConfigError, match=r"few_shot\.heads: .* leave heads empty"):
        train(recipe, tmp_path / "run")
    settings = [*SMALL, f"data.path={data}"]
    with pytest.raises(ConfigError, match=r"few_shot\.heads: mpncov cannot be exported"):
        train(read_recipe("photos", [*settings, 'few_shot.heads=["gap", "mpncov"]']), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"few_shot\.max_images=1"):
        compare(["photos", "photos-dsop"], tmp_path / "comparison", seeds=2, overrides=settings)
    for path in data.glob("*/*.png"):
        path.write_bytes((data / "red" / "0.png").read_bytes())
    with pytest.raises(DataError, match="same pixels"):
        train(read_recipe("photos", [*SMALL, f"data.path={data}"]), tmp_path / "run")
