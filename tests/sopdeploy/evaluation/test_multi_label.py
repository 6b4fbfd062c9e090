"""Average precision, F1 and thresholds of several classes per image, and a network trained on such images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from sopdeploy.api.training import PageWriter
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.decision import sigmoid
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.evaluation.multi_label import MultiLabelPredictions, average_precision, fit_thresholds
from sopdeploy.evaluation.prediction import classification_loss
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.train import train_recipe
from tests.two_objects import CLASSES, draw_scenes

SHORT = ["epochs=2", "batch_size=16", "threads=1", "model.config.base_width=4", "preprocess.resize=16"]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30))
def test_average_precision_and_f1_equal_those_of_scikit_learn(pairs) -> None:
    true, ranks = (np.asarray(column) for column in zip(*pairs, strict=True))
    scores = ranks / 7
    if not true.any():
        assert average_precision(true, scores) is None
        return
    assert average_precision(true, scores) == pytest.approx(average_precision_score(true, scores))
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
        assert value == pytest.approx(f1_score(both.targets > 0, predicted, average=name, zero_division=0.0))


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
    logits, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[0.0, 1, 0, 1]]).repeat(3, 1)
    target = labels.double() * 0.8 + 0.1
    expected = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), target, reduction="none").mean(
        dim=1
    )
    loss = classification_loss(logits, labels, "sigmoid", label_smoothing=0.2)
    assert float(loss) == pytest.approx(float(expected.mean()))


def recipe(scenes: Path, *changes: str) -> Recipe:
    short = [*SHORT, "preprocess.crop=16", "loss.label_smoothing=0.1", f"data.path={scenes}"]
    return read_recipe("photos-dsop", [*short, *changes])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", count=60)


def test_a_run_selects_by_map_and_stores_the_thresholds_of_its_held_out_images(
    scenes: Path, tmp_path: Path
) -> None:
    settings, writer = (
        ("mix.mixup=0.2", "mix.cutmix=0.2", "ema={decay=0.5}"),
        PageWriter(tmp_path / "run", Callback()),
    )
    result = train_recipe(recipe(scenes, *settings), tmp_path / "run", callback=writer)
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
    assert "mAP, too high" in page


@pytest.mark.parametrize(
    ("change", "message"),
    {"sampler=balanced": "sampler: .* needs one class", "teacher={}": "teacher: .* needs one class"}.items(),
)
def test_settings_that_need_one_class_per_image_are_rejected(scenes, tmp_path, change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        train_recipe(recipe(scenes, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
