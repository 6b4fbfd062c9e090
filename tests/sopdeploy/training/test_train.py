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
from sopdeploy.training.resume import recorded_recipe
from tests.sopdeploy.training.runs import Onlooker, same_bits, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder, the result and the onlooker of a short run."""
    out, onlooker = tmp_path_factory.mktemp("runs") / "deep" / "run", Onlooker()
    return out, train(short_recipe(), out, progress=onlooker), onlooker


def test_a_run_leaves_last_best_and_history_and_nothing_else(finished) -> None:
    out, result, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt",
        "history.csv",
        "last.pt",
        "previous.pt",
    ]
    assert (result.best, result.last, result.history) == (
        out / "best.pt",
        out / "last.pt",
        out / "history.csv",
    )
    assert (result.train_count, result.held_out_count, result.classes) == (359, 91, 10)
    assert TrainingResult.model_validate_json(result.model_dump_json()) == result


def test_both_checkpoints_are_plain_tables_and_say_how_they_came_about(finished) -> None:
    out, result, _ = finished
    best, last = read_checkpoint(out / "best.pt"), read_checkpoint(out / "last.pt")
    assert best.resume is None
    assert last.resume is not None
    assert last.training["epoch"] == 3
    assert last.training["figures"]["top1"] == result.last_top1
    assert best.training["epoch"] == result.best_epoch
    assert best.training["figures"]["top1"] == result.best_top1
    for checkpoint in (best, last):
        assert recorded_recipe(checkpoint, out) == short_recipe()
        assert checkpoint.training["seed"] == 0
        assert checkpoint.training["versions"] == {
            "sopdeploy": sopdeploy.__version__,
            "torch": torch.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        }
        assert checkpoint.labels == tuple("0123456789")
        assert checkpoint.preprocess == short_recipe().preprocess


def test_the_best_checkpoint_gives_the_figures_it_was_written_with(finished) -> None:
    out, result, _ = finished
    best = read_checkpoint(out / "best.pt")
    held_out = open_data(short_recipe().data).held_out
    figures = evaluate(
        build_classifier(best, out), PreprocessedDataset(held_out, best.preprocess), best.preprocess
    )
    assert figures.top1 == result.best_top1
    assert figures.top5 == result.best_top5


def test_the_history_has_a_line_per_epoch_with_every_head_of_the_loss(finished) -> None:
    out, result, _ = finished
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0])[:7] == [
        "epoch",
        "lr",
        "train_loss",
        "train_main",
        "train_layer1_0",
        "train_layer2_0",
        "train_layer3_0",
    ]
    assert float(rows[-1]["top1"]) == result.last_top1
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_the_onlooker_is_told_of_every_step(finished) -> None:
    _, _, onlooker = finished
    kinds = [what for what, _ in onlooker.told]
    assert kinds == ["started", *(["stepped"] * 6 + ["measured"] * 2 + ["finished"]) * 3]
    assert onlooker.told[0][1] == {
        "epochs": 3,
        "first_epoch": 0,
        "train_count": 359,
        "held_out_count": 91,
    }
    assert [facts["step"] for what, facts in onlooker.told if what == "stepped"] == [0, 1, 2, 3, 4, 5] * 3


def test_another_seed_gives_another_network_and_the_same_seed_the_same(tmp_path, finished) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        train(short_recipe(f"seed={seed}"), tmp_path / name)
    weights, same, other = (
        read_checkpoint(folder / "last.pt").weights
        for folder in (finished[0], tmp_path / "same", tmp_path / "other")
    )
    assert same_bits(weights, same)
    assert not same_bits(weights, other)


PLAIN = ("model={name='resnet8', config={base_width=4}}", "epochs=1")
SWITCHES = [
    PLAIN,
    ("epochs=1", "loss.label_smoothing=0.1"),
    ("epochs=1", "optimizer.clip_norm=0.0"),
    ("epochs=1", "schedule={kind='milestones', warmup_epochs=1}"),
    ("epochs=1", "augment={kind='random-resized-crop', flip=0.5}"),
    ("epochs=1", "threads=1"),
    ("epochs=1", "batch_size=5000"),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=["-".join(s) for s in SWITCHES])
def test_a_run_with_other_switches_ends_well(tmp_path, switches) -> None:
    assert train(short_recipe(*switches), tmp_path / "run").epochs == 1
