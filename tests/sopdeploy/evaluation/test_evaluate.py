from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from sopdeploy import create_model
from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.errors import DataError, TrainingError
from sopdeploy.evaluation.metrics import ClassificationReport, classification_report
from sopdeploy.evaluation.prediction import evaluate, score_checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from tests.sopdeploy.data.test_data_folder import make

RULES = Preprocess(resize=4, crop=4)


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
    images = np.broadcast_to(
        np.asarray(predictions, dtype=np.uint8)[:, None, None, None], (len(predictions), 4, 4, 3)
    )
    labels = tuple(str(number) for number in range(classes))
    return PreprocessedDataset(ArrayImages(labels, images.copy(), np.asarray(targets)), RULES)


@settings(deadline=None)
@given(data=st.data(), classes=st.integers(2, 9), size=st.integers(1, 9))
def test_evaluate_counts_top1_and_top5_of_every_image(data, classes, size) -> None:
    one = st.integers(0, classes - 1)
    pairs = data.draw(st.lists(st.tuples(one, one), min_size=1, max_size=20))
    predictions, targets = (list(column) for column in zip(*pairs, strict=True))
    progress: list[int] = []
    dataset = images(predictions, targets, classes)
    figures = evaluate(FromPixels(classes), dataset, RULES, batch_size=size, on_batch=progress.append)
    assert figures.count == progress[-1] == len(pairs)
    assert figures.top1 == pytest.approx(np.mean([a == t for a, t in pairs]))
    near = [sum(abs(c - a) < abs(t - a) for c in range(classes)) for a, t in pairs]
    tied = [sum(abs(c - a) == abs(t - a) for c in range(classes)) - 1 for a, t in pairs]
    low = np.mean([n + e < min(5, classes) for n, e in zip(near, tied, strict=True)])
    high = np.mean([n < min(5, classes) for n in near])
    assert low <= figures.top5 <= high


def test_evaluation_preprocesses_like_the_service_and_keeps_the_mode() -> None:
    rules = Preprocess(resize=18, crop=16)
    torch.manual_seed(0)
    model = create_model("dsop-resnet8", num_classes=3, base_width=4)
    images = np.random.default_rng(0).integers(0, 256, (10, 30, 20, 3), dtype=np.uint8)
    stored = ArrayImages(("a", "b", "c"), images, np.arange(10) % 3)
    figures = evaluate(model, PreprocessedDataset(stored, rules), rules, batch_size=4)
    assert model.training
    model.eval()
    served = torch.from_numpy(np.stack([rules(stored[i][0]) for i in range(10)]))
    logits = model(Normalize(rules)(served)).detach()
    targets = torch.from_numpy(stored.targets)
    assert figures.top1 == int((logits.argmax(1) == targets).sum()) / 10
    assert figures.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    assert figures.top5 == 1.0
    evaluate(model, PreprocessedDataset(stored, rules), rules, workers=2)
    assert not model.training


def test_a_diverged_network_is_an_error() -> None:
    model = FromPixels(3)
    model.scale.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="held-out images is not finite"):
        evaluate(model, images([0], [0], 3), RULES)


def test_an_empty_dataset_is_an_error() -> None:
    nothing = PreprocessedDataset(
        ArrayImages(("a",), np.zeros((0, 4, 4), np.uint8), np.zeros(0, np.int64)), RULES
    )
    with pytest.raises(DataError, match="no images to evaluate on"):
        evaluate(FromPixels(1), nothing, RULES)


@pytest.fixture
def stored(tmp_path) -> Path:
    """Write a checkpoint of a new network for the classes b and a, in this order."""
    torch.manual_seed(0)
    config = {"base_width": 4}
    weights = create_model("dsop-resnet8", num_classes=2, **config).state_dict()
    checkpoint = Checkpoint(
        model="dsop-resnet8",
        config=config,
        weights=weights,
        labels=("b", "a"),
        preprocess=Preprocess(resize=18, crop=16),
        training={},
    )
    write_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    return tmp_path / "ckpt.pt"


def measured(stored: Path, data: Path, **options: Any) -> ClassificationReport:
    progress: list[tuple[int, int]] = []
    labels, scores = score_checkpoint(stored, data, on_image=lambda *done: progress.append(done), **options)
    assert progress[-1] == (len(scores), len(scores))
    return classification_report(labels, scores)


def test_classes_of_checkpoint_and_folder_are_matched_by_name(stored, tmp_path) -> None:
    make(tmp_path / "val", a=3, b=4)
    figures = measured(stored, tmp_path / "val")
    model, rules = build_classifier(read_checkpoint(stored), stored), Preprocess(resize=18, crop=16)
    right = 0
    for target, name in enumerate(("b", "a")):
        for path in (tmp_path / "val" / name).iterdir():
            logits = model(Normalize(rules)(torch.from_numpy(rules(Image.open(path)).copy())[None]))
            right += int(logits.argmax()) == target
    assert (figures.count, figures.top1.right) == (7, right)
    assert [(one.label, one.count) for one in figures.classes] == [("a", 3), ("b", 4)]
    assert figures == measured(stored, tmp_path / "val", workers=2)


def test_views_of_a_checkpoint_are_averaged(stored, tmp_path) -> None:
    make(tmp_path / "val", a=2, b=1)
    model, rules = build_classifier(read_checkpoint(stored), stored), Preprocess(resize=18, crop=16)
    paths = [tmp_path / "val" / name for name in ("a/000.jpg", "a/001.jpg", "b/000.jpg")]
    losses = []
    for target, path in zip((1, 1, 0), paths, strict=True):
        pixels = rules(Image.open(path))
        both = torch.from_numpy(np.stack([pixels, pixels[:, ::-1]]))
        losses.append(
            -float(model(Normalize(rules)(both)).detach().double().softmax(1).mean(0).log()[target])
        )
    assert measured(stored, tmp_path / "val", tta="flip").nll == pytest.approx(np.mean(losses), abs=1e-6)
    assert measured(stored, tmp_path / "val", tta="ten-crop").count == 3


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 1, "b": 1, "c": 1}, "classes c are not training classes"),
        ({"a": 1}, "training classes b are missing"),
        ({"a": 1, "b": 0}, "no images in this class folder"),
    ],
)
def test_a_folder_with_other_classes_is_refused(stored, tmp_path, counts, message) -> None:
    make(tmp_path / "val", **counts)
    with pytest.raises(DataError, match=message):
        measured(stored, tmp_path / "val")


def test_a_missing_evaluation_folder_is_named(stored, tmp_path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        measured(stored, tmp_path / "nowhere")
