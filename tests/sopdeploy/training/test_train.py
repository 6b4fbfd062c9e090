"""Complete runs: the files they write and their metrics."""

import csv
import sys

import pytest
import torch

import sopdeploy
from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.prediction import evaluate
from sopdeploy.training.loop import TrainingResult, train
from sopdeploy.training.recipe import Recipe
from tests.sopdeploy.training.runs import RecordingCallback, same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder, the result and the callback of a short run."""
    out, callback = tmp_path_factory.mktemp("runs") / "deep" / "run", RecordingCallback()
    return out, train(short_recipe(), out, callback=callback), callback


def test_a_run_writes_last_best_previous_and_history(finished) -> None:
    out, result, _ = finished
    assert {path.name for path in out.iterdir()} == {"best.pt", "history.csv", "last.pt", "previous.pt"}
    files = (result.best, result.last, result.history)
    assert files == (out / "best.pt", out / "last.pt", out / "history.csv")
    assert (result.train_count, result.held_out_count, result.classes) == (359, 91, 10)
    assert TrainingResult.model_validate_json(result.model_dump_json()) == result


def test_checkpoints_record_how_they_were_trained(finished) -> None:
    out, result, _ = finished
    best, last = read_checkpoint(out / "best.pt"), read_checkpoint(out / "last.pt")
    assert best.resume is None
    assert last.resume is not None
    assert (last.training["epoch"], last.training["figures"]["top1"]) == (3, result.last_top1)
    assert best.training["epoch"] == result.best_epoch
    assert best.training["figures"]["top1"] == result.best_top1
    for checkpoint in (best, last):
        assert Recipe.model_validate(checkpoint.training["recipe"]) == short_recipe()
        assert checkpoint.training["seed"] == 0
        assert checkpoint.training["versions"] == {
            "sopdeploy": sopdeploy.__version__,
            "torch": torch.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        }
        assert checkpoint.labels == tuple("0123456789")
        assert checkpoint.preprocess == short_recipe().preprocess


def test_the_best_checkpoint_reproduces_its_metrics(finished) -> None:
    out, result, _ = finished
    best = read_checkpoint(out / "best.pt")
    held_out = PreprocessedDataset(open_data(short_recipe().data).held_out, best.preprocess)
    metrics = evaluate(build_classifier(best, out), held_out, best.preprocess)
    assert (metrics.top1, metrics.top5) == (result.best_top1, result.best_top5)


def test_the_history_has_a_line_per_epoch_with_the_loss_of_every_head(finished) -> None:
    out, result, _ = finished
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    heads = ["train_main", "train_layer1_0", "train_layer2_0", "train_layer3_0"]
    assert list(rows[0])[:7] == ["epoch", "lr", "train_loss", *heads]
    assert float(rows[-1]["top1"]) == result.last_top1
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_the_callback_receives_every_event(finished) -> None:
    events = finished[2].events
    epoch = ["step"] * 6 + ["evaluation"] * 2 + ["epoch"]
    assert [name for name, _ in events] == ["train_start", *epoch * 3]
    assert events[0][1] == {"epochs": 3, "first_epoch": 0, "train_count": 359, "held_out_count": 91}
    assert [values["step"] for name, values in events if name == "step"] == [0, 1, 2, 3, 4, 5] * 3


def test_the_seed_determines_the_weights(tmp_path, finished) -> None:
    weights = read_checkpoint(finished[0] / "last.pt").weights
    for seed in (0, 1):
        last = train(short_recipe(f"seed={seed}"), tmp_path / str(seed)).last
        assert same_bits(weights, read_checkpoint(last).weights) is (seed == 0)


@pytest.mark.parametrize(
    "override",
    [
        "model={name='resnet8', config={base_width=4}}",
        "loss.label_smoothing=0.1",
        "optimizer.clip_norm=0.0",
        "schedule={kind='milestones', warmup_epochs=1}",
        "augment={kind='random-resized-crop', flip=0.5}",
        "threads=1",
        "batch_size=5000",
    ],
)
def test_a_run_with_other_settings_finishes(tmp_path, override) -> None:
    assert train(short_recipe("epochs=1", override), tmp_path / "run").epochs == 1
