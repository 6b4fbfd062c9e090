"""Complete runs: files, metrics, callbacks and loggers; start weights, frozen networks and teachers."""

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import sopdeploy
from sopdeploy import create_model
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.evaluation.decision_fit import fit_decision
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MultiLabelMetrics
from sopdeploy.evaluation.prediction import EvalMetrics, HeldOutMetrics, evaluate_network
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.diagnostics import Diagnostics, EpochRow, diagnose
from sopdeploy.training.loop.run import estimate_best
from sopdeploy.training.settings.recipe import LoopRecipe, Recipe, read_recipe
from sopdeploy.training.train import TrainingResult, train_recipe
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint
from tests.sopdeploy.training.runs import (
    SMALL,
    RecordingCallback,
    interrupt,
    paint,
    same_bits,
    same_run,
    short_recipe,
)
from tests.support.slow import mostly_slow

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder, the result and the callback of a short run."""
    out, callback = tmp_path_factory.mktemp("runs") / "deep" / "run", RecordingCallback()
    return out, train_recipe(short_recipe(), out, callback=callback), callback


def test_a_run_writes_last_best_and_history(finished) -> None:
    out, result, _ = finished
    assert {path.name for path in out.iterdir()} == {
        "best.pt",
        "history.csv",
        "last.pt",
        "run.json",
        "recipe.toml",
    }

    files = (result.best, result.last, result.history)
    assert files == (out / "best.pt", out / "last.pt", out / "history.csv")
    assert (result.train_count, result.held_out_count, result.num_classes) == (205, 52, 10)
    assert TrainingResult.model_validate_json(result.model_dump_json()) == result


def test_checkpoints_record_how_they_were_trained_and_reproduce_their_metrics(finished) -> None:
    out, result, _ = finished
    best, last = read_checkpoint(out / "best.pt"), read_checkpoint(out / "last.pt")
    assert best.resume is None
    assert last.resume is not None
    assert last.training["epoch"] == 3
    assert best.training["epoch"] == result.best_epoch
    assert best.training["metrics"]["top1"] == result.best_top1
    for checkpoint in (best, last):
        assert LoopRecipe.model_validate(checkpoint.training["recipe"]) == short_recipe()
        assert checkpoint.training["seed"] == 0
        versions = {"sopdeploy": sopdeploy.__version__, "torch": torch.__version__}
        versions["python"] = ".".join(map(str, sys.version_info[:3]))
        assert checkpoint.training["versions"] == versions
        assert checkpoint.labels == tuple("0123456789")
        assert checkpoint.preprocess == short_recipe().preprocess

    held_out = PreprocessedDataset(open_data(short_recipe().data).held_out, best.preprocess)
    metrics = evaluate_network(build_classifier(best, out), held_out, best.preprocess)
    assert metrics.top1 == result.best_top1


def test_the_history_has_every_loss_and_the_callback_receives_every_event(finished) -> None:
    out, result, _ = finished
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]

    heads = ["train_main", "train_layer1_0", "train_layer2_0", "train_layer3_0"]
    assert list(rows[0])[:7] == ["epoch", "lr", "train_loss", *heads]
    assert max(float(row["top1"]) for row in rows) == result.best_top1
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])

    events = finished[2].events
    epoch = ["step"] * 6 + ["evaluation"] * 2 + ["epoch"]
    # After three epochs, a branch can be at chance, which is a warning.
    assert [name for name, _ in events if name != "warning"] == [
        *["message"] * 3,
        *epoch * 3,
        *["evaluation"] * 2,
    ]

    network = events[0][1]["message"]
    assert re.match(r"network: dsop-resnet8 \(.*\), [\d,]+ parameters, ", network)

    start = events[1][1]["message"]
    assert start.startswith("205 training images, 52 validation images;")
    assert [values["step"] for name, values in events if name == "step"] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ] * 3


def test_the_seed_determines_the_weights(tmp_path, finished) -> None:
    weights = read_checkpoint(finished[0] / "last.pt").weights
    for seed in (0, 1):
        last = train_recipe(short_recipe(f"seed={seed}"), tmp_path / str(seed)).last
        assert same_bits(weights, read_checkpoint(last).weights) is (seed == 0)


PLAIN = ["model.name=resnet8", "model.config={base_width=4}", "epochs=1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Return the checkpoint of a plain network."""
    return train_recipe(short_recipe(*PLAIN), tmp_path_factory.mktemp("plain") / "run").best


def test_the_second_phase_trains_only_the_branches(plain, tmp_path) -> None:
    recipe = short_recipe(f"start.weights={plain}", "start.learn=branches", "epochs=2")
    interrupt(recipe, tmp_path / "stopped", "step", 1, 2)
    train_recipe(recipe, tmp_path / "stopped", resume=True)
    result = train_recipe(recipe, tmp_path / "whole")

    assert same_run(tmp_path / "whole", tmp_path / "stopped")

    before, after = read_checkpoint(plain).weights, read_checkpoint(result.last).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(name.startswith("branches.") for name in after)

    first, second = read_checkpoint(result.last).resume["position"]["history"]
    assert second["losses"]["layer1_0"] < first["losses"]["layer1_0"]
    assert first["metrics"] == second["metrics"]

    top1 = [
        sum(head["top1"] for head in row["diagnostics"]["heads"].values())
        for row in (first, second)
    ]
    assert (
        result.best_epoch
        == read_checkpoint(result.best).training["epoch"]
        == 1 + (top1[1] >= top1[0])
    )


def phases(plain: Path, *more: str) -> Recipe:
    """Read a recipe whose first two of four epochs train the classifier alone."""
    settings = [
        *PLAIN[:2],
        f"start.weights={plain}",
        "start.classifier_epochs=2",
        "epochs=4",
        *more,
    ]
    return short_recipe(*settings, "start.classifier_lr=0.02", "start.head_factor=3")


IN_TWO_PHASES: dict[str, tuple[list[str], tuple[str, int, int]]] = {
    "in the first phase": ([], ("step", 1, 2)),
    "at the end of the first phase": ([], ("epoch", 1, 0)),
    "in the second phase": ([], ("step", 2, 3)),
    "in an evaluation, after all steps of an epoch": ([], ("evaluation", 2, 36)),
    "an average, in the first phase": (["ema={decay=0.5}"], ("step", 0, 3)),
    "an average, at the end of the first phase": (["ema={decay=0.5}"], ("step", 1, 5)),
}


@pytest.mark.parametrize("case", mostly_slow(IN_TWO_PHASES, "at the end of the first phase"))
def test_a_run_of_two_phases_resumes_to_the_same_bits(plain, tmp_path, case) -> None:
    settings, event = IN_TWO_PHASES[case]
    recipe = phases(plain, *settings)
    train_recipe(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "stopped", *event)

    assert not same_run(tmp_path / "whole", tmp_path / "stopped")

    train_recipe(recipe, tmp_path / "stopped", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_classifier_learns_first_and_then_everything(plain, tmp_path) -> None:
    # The first phase changes the classifier alone.
    recipe = phases(plain)
    interrupt(recipe, tmp_path, "epoch", 1, 0)
    start = read_checkpoint(plain).weights
    first = read_checkpoint(tmp_path / "last.pt").weights
    changed = {name for name in first if not torch.equal(first[name], start[name])}
    assert changed == {"fc.weight", "fc.bias"}

    # The second one changes everything.
    callback = RecordingCallback()
    train_recipe(recipe, tmp_path, resume=True, callback=callback)
    last = read_checkpoint(tmp_path / "last.pt")
    assert not [name for name in first if torch.equal(last.weights[name], first[name])]

    # Each has its rates, and a message.
    history = last.resume["position"]["history"]
    schedule = [recipe.schedule.factor(time + 5 / 6, 2) for time in (0, 1)]
    rates = [0.02, 0.02, *(recipe.optimizer.lr * factor for factor in schedule)]
    assert [row["lr"] for row in history] == pytest.approx(rates)
    lines = [values["message"] for name, values in callback.events if name == "message"]
    assert lines[1].startswith("epochs 1 to 2 ")


NO_TWO_PHASES = [
    (
        "start.classifier_epochs=0",
        "omit classifier_lr",
    ),
    ("start.classifier_epochs=4", "only 4 epochs"),
    ("start.learn=classifier", "start.learn = classifier"),
    ("start.learn=branches", "start.learn = branches"),
    (
        'teacher={model={name="resnet8"}}',
        "trained jointly",
    ),
    ("procedure={kind='few_shot'}", "epochs: .*procedure.kind=loop"),
]


@pytest.mark.parametrize(("change", "message"), NO_TWO_PHASES)
def test_a_first_phase_that_cannot_be_is_refused(plain, change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        phases(plain, change)


def test_epochs_are_evaluated_with_mirror_images_and_decisions_without(plain, tmp_path) -> None:
    recipe = phases(
        plain,
        "validation.mirror=true",
        "model.name=dsop-resnet8",
        "model.config.aux_widths=[4,4,4]",
    )
    result = train_recipe(recipe, tmp_path)
    best = read_checkpoint(result.best)
    images = PreprocessedDataset(open_data(recipe.data).held_out, best.preprocess)
    pixels = torch.from_numpy(images.pixels(range(len(images))))
    network, normalize = (
        build_classifier(best, tmp_path),
        Normalize(best.preprocess, torch.contiguous_format),
    )
    with torch.no_grad():
        alone, mirrored = network(normalize(pixels)), network(normalize(pixels.flip(2)))
    targets = torch.from_numpy(images.images.targets)
    right = ((alone + mirrored) / 2).argmax(dim=1) == targets

    assert result.best_top1 == pytest.approx(float(right.double().mean()))
    assert best.training["metrics"]["top1"] == result.best_top1

    row = read_checkpoint(result.last).resume["position"]["history"][result.best_epoch - 1]
    assert row["diagnostics"]["heads"]["main"]["top1"] == result.best_top1
    assert row["diagnostics"]["right"] == "".join("01"[value] for value in right.tolist())
    assert "52 validation images" in result.procedure.describe()

    expected = fit_decision(
        alone.double().numpy(),
        targets.numpy(),
        estimated_on="held-out",
        scalable=network.has_scalable_logits(),
    )
    assert result.decision.rejection.threshold == pytest.approx(
        expected.rejection.threshold, rel=1e-5
    )


def test_a_fine_tuned_run_starts_better_and_its_classifier_learns_faster(
    plain, tmp_path
) -> None:
    run = train_recipe(
        short_recipe(*PLAIN, f"start.weights={plain}", "start.head_factor=5"), tmp_path / "run"
    )
    groups = read_checkpoint(run.last).resume["optimizer"]["param_groups"]

    assert groups[1]["lr"] == pytest.approx(5 * groups[0]["lr"])

    before, after = (
        read_checkpoint(last).resume["position"]["history"][0]["losses"]["main"]
        for last in (plain.parent / "last.pt", run.last)
    )
    assert after < before


def test_new_layers_learn_faster_on_demand_also_in_a_resumed_run(plain, tmp_path) -> None:
    recipe = short_recipe(
        "model={name='resnet8', config={base_width=4, pooling={kind='isqrt', width=8}}}",
        f"start.weights={plain}",
        "start.head_factor=5",
        "start.new_factor=3",
    )
    train_recipe(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "parts", "step", 0, 2)
    train_recipe(recipe, tmp_path / "parts", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "parts")

    # The loaded layers, the classifier, and the convolution and the norm of the pooling.
    groups = read_checkpoint(tmp_path / "whole" / "last.pt").resume["optimizer"]["param_groups"]
    assert [group["times"] for group in groups] == [1, 5, 3]
    assert len(groups[1]["params"]) == 2
    assert len(groups[2]["params"]) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["start.head_factor=2"],
            r"start\.weights: ",
        ),
        (
            ["start.weights={plain}", "start.learn=branches", *PLAIN[:2]],
            "no branches",
        ),
        (
            ["start={weights='none', learn='branches'}", "model.config.aux_blocks=[0, 0, 0]"],
            "no branches",
        ),
    ],
)
def test_unsuitable_weights_are_refused_with_one_line(
    plain, tmp_path, settings, message
) -> None:
    settings = [setting.replace("{plain}", str(plain)) for setting in settings]
    with pytest.raises((ConfigError, WeightsError), match=message) as error:
        train_recipe(short_recipe(*settings), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_the_divergence_from_the_teacher_is_part_of_the_loss(plain, tmp_path) -> None:
    settings = [*PLAIN, f"teacher.weights={plain}", "teacher.temperature=2", "epochs=2"]
    result = train_recipe(short_recipe(*settings), tmp_path / "run")
    first, second = (
        row["losses"] for row in read_checkpoint(result.last).resume["position"]["history"]
    )

    assert second["teacher"] < first["teacher"]
    assert first["loss"] == pytest.approx(0.5 * (first["main"] + first["teacher"]), rel=1e-5)


PREPROCESS = Preprocess(resize=16, crop=16)
NORMALIZE = Normalize(PREPROCESS, torch.contiguous_format)


def dataset(count: int = 7) -> PreprocessedDataset:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return PreprocessedDataset(
        ArrayImages(("a", "b", "c"), images, np.arange(count) % 3), PREPROCESS
    )


def inputs() -> torch.Tensor:
    return NORMALIZE(torch.from_numpy(dataset().pixels(range(7))))


@pytest.fixture
def branched():
    torch.manual_seed(0)
    return create_model("dsop-resnet8", num_classes=3, base_width=4)


def test_every_head_is_evaluated_and_the_model_is_unchanged(branched) -> None:
    before = {name: tensor.clone() for name, tensor in branched.state_dict().items()}
    found = diagnose(branched, dataset(), PREPROCESS, 3)
    assert branched.training
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in branched.state_dict().items()
    )
    assert set(found.heads) == {"main", "layer1_0", "layer2_0", "layer3_0"}

    labels = torch.arange(7) % 3
    logits = branched.eval()(inputs()).detach()
    assert found.heads["main"].top1 == pytest.approx(
        float((logits.argmax(1) == labels).float().mean())
    )

    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert found.heads["main"].loss == pytest.approx(loss, rel=1e-5)
    assert found.num_images == 7


def test_a_subset_of_the_validation_images_may_show_no_class(branched, monkeypatch) -> None:
    """The metrics of all validation images, which show some, do not stop at it."""
    monkeypatch.setattr("sopdeploy.training.diagnostics.MAX_IMAGES", 2)
    data = dataset()
    targets = np.eye(3, dtype=np.float32)[data.images.targets]
    targets[[0, 3]] = 0  # the two images of the subset
    data = replace(data, images=data.images.replaced(targets=targets))
    found = diagnose(branched, data, PREPROCESS, 2)

    assert (found.num_images, found.heads, found.right) == (2, {}, "")


def history(right_EN: NDArray[np.bool_], *, recorded: bool = True) -> list[EpochRow]:
    """Build the history of a run from the right predictions (epochs, images)."""
    rows = []
    for number, right_N in enumerate(right_EN, 1):
        top1 = float(right_N.mean())
        text = "".join("01"[int(one)] for one in right_N) if recorded else ""
        rows.append(
            EpochRow(
                epoch=number,
                lr=0.1,
                losses={},
                metrics=EvalMetrics(top1=top1, top5=1.0, count=len(right_N), loss=1.0),
                diagnostics=Diagnostics(num_images=len(right_N), right=text, heads={}),
                seconds=0.0,
            )
        )
    return rows


def test_frames_of_a_clip_count_once_in_the_decision_of_a_run(tmp_path) -> None:
    paint(tmp_path / "train", 4)
    paint(tmp_path / "val", 36, seed=1)
    for file in [*tmp_path.rglob("*.png")]:
        number = int(file.stem)
        file.rename(file.with_name(f"clip{number // 2}_{number % 2}.png"))

    settings = [*SMALL, "procedure.kind=loop", "epochs=1"]
    recipe = read_recipe(
        "photos", [*settings, f"data.path={tmp_path}", "data.groups=^clip[0-9]+"]
    )
    decision = train_recipe(recipe, tmp_path / "run").decision

    assert decision.calibration.num_images == 3 * 36 / 2


@pytest.mark.parametrize("alike", [0.0, 0.6], ids=["independent epochs", "epochs that agree"])
def test_the_estimate_of_the_best_of_40_epochs_is_unbiased(
    alike: float,
) -> None:
    """With *alike*, this share of the predictions is the same in all epochs."""
    random, estimates, best, covered = np.random.default_rng(0), [], [], []
    for _ in range(100):
        same = (random.random((1, 12)) < alike) & np.ones((40, 1), np.bool_)
        right = np.where(same, random.random((1, 12)) < 0.3, random.random((40, 12)) < 0.3)
        rows = history(right)
        found = estimate_best(rows).top1
        assert found is not None
        estimates.append(found.share)
        covered.append(found.low <= 0.3 <= found.high)
        best.append(max(row.metrics.score for row in rows))
    assert np.mean(estimates) == pytest.approx(0.3, abs=0.03)
    assert np.mean(covered) >= 0.95
    assert np.mean(best) > 0.4


def test_an_epoch_that_is_better_on_all_images_has_its_own_score() -> None:
    right = np.zeros((3, 20), np.bool_)
    right[1, :15] = True
    found = estimate_best(history(right))

    assert found.top1 is not None
    assert (found.top1.right, found.count, found.selected_by) == (15, 20, "other images")
    for value in ("75.0 %", "53 to 89 %", "20 validation images"):
        assert value in found.describe()


def test_frames_of_a_clip_are_not_independent_images() -> None:
    clips = np.repeat(["one", "two"], 20)
    right = np.ones((1, 40), np.bool_)
    found = estimate_best(history(right), clips).top1

    assert found is not None
    assert (found.right, found.count, round(found.low, 2), found.high) == (40, 40, 0.34, 1)

    # Each epoch is right on the other clip only
    of_one_clip = np.stack([clips == "one", clips == "two"])
    found = estimate_best(history(of_one_clip), clips)
    assert found.top1 == Rate.of(0, 40, 2)  # on the clip that did not select the epoch
    assert found.selected_by == "other images"
    assert (
        estimate_best(history(of_one_clip), np.zeros(40, np.int64)).selected_by == "same images"
    )


FAIR = "top-1 50.0 % (95 % interval 22 to 78 %) of 8 validation images"
BIASED = "8 validation images, too high: they also select the epoch"
MULTI_LABEL = MultiLabelMetrics(
    map=0.5, macro_f1=0.5, micro_f1=0.5, count=8, loss=1.0, thresholds=(0.5, 0.5)
)


@pytest.mark.parametrize(
    ("epochs", "recorded", "options", "metrics", "text"),
    [
        (1, True, {}, None, FAIR),
        (2, True, {"frozen_backbone": True}, None, FAIR),
        (2, False, {}, None, f"of {BIASED}"),
        (2, True, {}, MULTI_LABEL, f"mAP 50.0 % of {BIASED}"),
    ],
    ids=["one epoch", "a frozen backbone", "too many images to record", "several classes"],
)
def test_a_score_that_selected_the_epoch_says_so(
    epochs: int,
    recorded: bool,
    options: dict[str, bool],
    metrics: HeldOutMetrics | None,
    text: str,
) -> None:
    rows = history(np.tile([True, False], (epochs, 4)), recorded=recorded)
    if metrics is not None:
        rows = [row.model_copy(update={"metrics": metrics}) for row in rows]
    assert estimate_best(rows, **options).describe().endswith(text)


LOOP = [
    "epochs=1",
    "batch_size=8",
    "model.config.base_width=2",
    "data.kind=folder",
    "preprocess.resize=8",
    "preprocess.crop=8",
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), [("digits-plain", LOOP), ("photos", SMALL)])
def test_measuring_on_training_images_is_a_warning(
    tmp_path: Path, recipe: str, settings: list[str]
) -> None:
    seen = paint(tmp_path / "seen", 20)
    result = train_recipe(
        read_recipe(recipe, [*settings, f"data.path={seen}"]), tmp_path / "run"
    )
    stored = read_checkpoint(result.best)
    count = stored.training["procedure"].get("class_counts", {"all": result.train_count})

    assert len(stored.image_hashes) == sum(count.values())

    found = sopdeploy.evaluate(result.best, seen)
    [note] = found.notes
    assert note.startswith(f"{seen}: {len(stored.image_hashes)} of 60 images ")
    assert sopdeploy.evaluate(result.best, paint(tmp_path / "new", 2, seed=1)).notes == ()

    fitted = sopdeploy.evaluate(result.best, seen, fit_decision=tmp_path / "fitted.pt")
    assert fitted.notes == found.notes
    assert read_checkpoint(tmp_path / "fitted.pt").image_hashes.equal(stored.image_hashes)
