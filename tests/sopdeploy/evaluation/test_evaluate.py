"""Evaluation of networks and checkpoints; metrics by hand and by definition; sources."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import sopdeploy
from sopdeploy import create_model
from sopdeploy.api.evaluation import detect_source
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.cli.app import app
from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.errors import ConfigError, DataError, TrainingError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.evaluation.metrics import BINS, ClassificationReport, ImageScore, classification_report
from sopdeploy.evaluation.prediction import evaluate_network
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from tests.sopdeploy.data.test_data_folder import make

TINY, RULES = Preprocess(resize=4, crop=4), Preprocess(resize=18, crop=16)


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
    figures = evaluate_network(FromPixels(classes), dataset, TINY, batch_size=size, on_batch=progress.append)
    assert figures.count == progress[-1] == len(pairs)
    assert figures.top1 == pytest.approx(np.mean([a == t for a, t in pairs]))
    near = [sum(abs(c - a) < abs(t - a) for c in range(classes)) for a, t in pairs]
    tied = [sum(abs(c - a) == abs(t - a) for c in range(classes)) - 1 for a, t in pairs]
    low = np.mean([n + e < min(5, classes) for n, e in zip(near, tied, strict=True)])
    high = np.mean([n < min(5, classes) for n in near])
    assert low <= figures.top5 <= high


def test_evaluation_preprocesses_like_the_service_and_keeps_the_mode() -> None:
    torch.manual_seed(0)
    model = create_model("dsop-resnet8", num_classes=3, base_width=4)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 30, 20, 3), dtype=np.uint8)
    stored = ArrayImages(("a", "b", "c"), pixels, np.arange(10) % 3)
    figures = evaluate_network(model, PreprocessedDataset(stored, RULES), RULES, batch_size=4)
    assert model.training
    model.eval()
    served = torch.from_numpy(np.stack([preprocess_image(stored[i][0], RULES) for i in range(10)]))
    logits = model(Normalize(RULES)(served)).detach()
    targets = torch.from_numpy(stored.targets)
    assert figures.top1 == int((logits.argmax(1) == targets).sum()) / 10
    assert figures.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    assert figures.top5 == 1.0
    evaluate_network(model, PreprocessedDataset(stored, RULES), RULES, workers=2)
    assert not model.training


def test_a_diverged_network_and_an_empty_dataset_are_errors() -> None:
    model = FromPixels(3)
    with pytest.raises(DataError, match="no images to evaluate on"):
        evaluate_network(model, images([], [], 3), TINY)
    model.scale.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="held-out images is not finite"):
        evaluate_network(model, images([0], [0], 3), TINY)


@pytest.fixture
def stored(tmp_path) -> Path:
    """Write a checkpoint of a new network for the classes b and a, in this order."""
    torch.manual_seed(0)
    model, config = "dsop-resnet8", {"base_width": 4}
    weights = create_model(model, num_classes=2, **config).state_dict()
    write_checkpoint(
        tmp_path / "ckpt.pt",
        Checkpoint(
            model=model, config=config, weights=weights, labels=("b", "a"), preprocess=RULES, training={}
        ),
    )
    return tmp_path / "ckpt.pt"


def measured(stored: Path, data: Path, **options: Any) -> ClassificationReport:
    progress: list[tuple[int, int]] = []
    found = score_checkpoint(stored, data, on_image=lambda *done: progress.append(done), **options)
    assert progress[-1] == (len(found.predictions), len(found.predictions))
    return classification_report(found.labels, found.predictions)


def test_classes_are_matched_by_name(stored, tmp_path) -> None:
    make(tmp_path / "val", a=3, b=4)
    model, normalize = build_classifier(read_checkpoint(stored), stored), Normalize(RULES)
    right, losses = 0, []
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
    assert figures.nll == pytest.approx(np.mean(losses), abs=1e-6)


def test_heads_are_evaluated_on_every_image(stored, tmp_path) -> None:
    make(tmp_path / "val", a=30, b=37)
    model, normalize = build_classifier(read_checkpoint(stored), stored), Normalize(RULES)
    files = [
        (target, path) for target, name in enumerate("ba") for path in (tmp_path / "val" / name).iterdir()
    ]
    targets = torch.tensor([target for target, _ in files])
    pixels = torch.from_numpy(np.stack([preprocess_image(Image.open(path), RULES) for _, path in files]))
    with torch.no_grad():
        heads = model.heads(normalize(pixels))
    found = sopdeploy.evaluate(stored, tmp_path / "val", heads=True)
    assert [one.name for one in found.heads] == ["layer1_0", "layer2_0", "layer3_0", "main"]
    assert found.metrics == sopdeploy.evaluate(stored, tmp_path / "val").metrics
    assert found.heads[-1].top1 == found.metrics.top1
    losses = {name: float(nn.functional.cross_entropy(logits, targets)) for name, logits in heads.items()}
    total = sum(model.loss_weights()[name] * loss for name, loss in losses.items())
    for one in found.heads:
        right = int((heads[one.name].argmax(dim=1) == targets).sum())
        assert (one.top1.right, one.top5.right, one.top1.count) == (right, 67, 67)
        assert one.loss == pytest.approx(losses[one.name], rel=1e-5)
        assert one.weight == {"layer1_0": 0.1, "layer2_0": 0.2, "layer3_0": 0.3, "main": 1.0}[one.name]
        assert one.share == pytest.approx(one.weight * losses[one.name] / total, rel=1e-5)
    command = ["eval", str(stored), "--data", str(tmp_path / "val"), "--heads"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(shown.stdout)["heads"] == [one.model_dump(mode="json") for one in found.heads]
    (tmp_path / "manifest.json").touch()
    with pytest.raises(ConfigError, match="heads: only for a checkpoint, this is a bundle"):
        sopdeploy.evaluate(tmp_path, tmp_path, heads=True)


LABELS = ("a", "b", "c")


def score(target: int, *probabilities: float) -> ImageScore:
    ranked = sorted(enumerate(probabilities), key=lambda pair: -pair[1])
    return ImageScore.from_ranking(target, ranked)


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
    # Calibration bins include their upper edge.
    scores = [ImageScore(0, (0, 1), confidence, 0.5) for confidence in (1 / 15, 1 / 15 + 1e-9, 0.6, 1.0)]
    counts = [one.count for one in classification_report(("a", "b"), scores).calibration.curve]
    assert (len(counts), sum(counts)) == (BINS, 4)
    assert [place for place, count in enumerate(counts) if count] == [0, 1, 8, 14]


def test_a_probability_of_0_has_a_finite_loss_and_no_images_are_an_error() -> None:
    report = classification_report(("a", "b"), [ImageScore(1, (0, 1), 1.0, 0.0)])
    assert report.nll == pytest.approx(708.4, abs=0.1)
    with pytest.raises(DataError, match="no images to evaluate on"):
        classification_report(LABELS, [])


def test_sources_are_detected_or_refused(tmp_path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    assert detect_source(str(tmp_path / "bundle")) == "bundle"
    assert detect_source("runs/a/best.pt") == "checkpoint"
    with pytest.raises(ConfigError, match=r"it has no manifest\.json"):
        detect_source(str(tmp_path))
    (tmp_path / "best.pt").touch()
    with pytest.raises(ConfigError, match=r"is a run folder; give .*best\.pt"):
        detect_source(str(tmp_path))
    with pytest.raises(ConfigError, match="is a URL; give a checkpoint or a bundle"):
        detect_source("http://127.0.0.1:8000")
