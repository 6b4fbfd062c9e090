"""The procedure `fine_tune`: what learns, which network is kept, resumed runs, and exports."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import sopdeploy
from sopdeploy.data.folders.libraries import open_digits
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import held_out_metrics, predict_logits
from sopdeploy.models.base import TrainingOutput, is_in
from sopdeploy.models.registry import create_model
from sopdeploy.report.wrong_labels import find_wrong_labels
from sopdeploy.training.diagnostics import Diagnostics, EpochRow
from sopdeploy.training.distributed import TrainingStoppedError
from sopdeploy.training.few_shot import run as few_shot
from sopdeploy.training.few_shot.classifier import (
    LinearProblem,
    Space,
    mean_vectors,
    unit_length,
)
from sopdeploy.training.few_shot.targets import Targets
from sopdeploy.training.fine_tune import OwnVectors
from sopdeploy.training.loop import run as loop
from sopdeploy.training.loop.run import idle_branches
from sopdeploy.training.loop.state import first_stages, freeze, read_frozen, set_train_mode
from sopdeploy.training.records.checkpoints import read_resumed
from sopdeploy.training.records.results import Tuning
from sopdeploy.training.settings.head import FineTuneConfig
from sopdeploy.training.settings.loop import StartConfig
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from sopdeploy.training.settings.recipe_files import recipe_text
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint
from sopdeploy_commands.train import train
from tests.export.once import proving_once
from tests.sopdeploy.training.runs import (
    COLORS,
    RecordingCallback,
    deliver,
    few_digits,
    interrupt,
    paint,
    same_bits,
    train_with_page,
)

pytestmark = pytest.mark.usefixtures("allow_random_features")
FINE_TUNE = [
    "procedure.kind=fine_tune",
    "procedure.head=gap",
    "procedure.group_copies=false",
    "data.kind=digits",
    "start.weights=none",
    "preprocess.resize=8",
    "preprocess.crop=8",
    "augment={kind='center'}",
    "batch_size=16",
]
PLAIN = ["model.name=resnet8", "model.config={base_width=4}"]
BRANCHES = [
    "model.name=dsop-resnet8",
    "model.config={base_width=4, aux_widths=[8,8,8], iterations=2}",
]
DETACHABLE = ["model.name=dsop-head:resnet8", "model.config={base_width=4}"]
GATED = [
    "model.name=gmsop-head:resnet8",
    "model.config={base_width=4, head={gate_width=4}}",
    "procedure.head=gap+isqrt",
]
GENTLE = ["epochs=1", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
# Random features are weak, so learning helps
KEPT = [*FINE_TUNE, *PLAIN, "optimizer.lr=0.02", "epochs=5"]
UNDECIDED = [*FINE_TUNE, *PLAIN, "optimizer.lr=1e-6", "epochs=1"]  # hardly a weight changes
HARMED = [*FINE_TUNE, *PLAIN, "optimizer.lr=3.0", "epochs=1"]


def recipe(*settings: str) -> Recipe:
    """Read the recipe for photographs with *settings*."""
    return read_recipe("photos", settings)


@pytest.mark.parametrize(
    ("settings", "every", "verdict", "model"),
    [
        pytest.param(KEPT, 2, "better", "head:resnet8", marks=pytest.mark.slow),
        (UNDECIDED, 14, None, "head:resnet8"),
        (HARMED, 14, "worse", ""),
    ],
    ids=["better", "the same", "worse"],
)
def test_the_fine_tuned_network_is_kept_only_if_it_is_better(
    tmp_path: Path, settings: list[str], every: int, verdict: str | None, model: str
) -> None:
    with few_digits(every):
        result = train_with_page(recipe(*settings), tmp_path / "run")
    found: Any = result.procedure

    assert result.model == model or not model
    assert (found.kind, result.num_epochs) == (
        ("loop", 5) if verdict == "better" else ("few_shot", 1)
    )
    assert found.tuning.is_better == (verdict == "better")
    if verdict is not None:
        assert found.tuning.verdict == verdict

    end = f"the {'fine-tuned' if verdict == 'better' else 'frozen'} network is kept"
    assert found.lines()[-1].startswith("fine-tuning: ")
    assert found.lines()[-1].endswith(end)
    assert found.lines()[-1] in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

    last = read_checkpoint(result.last)
    frozen = read_resumed(read_frozen(last, result.last), result.last).position
    assert frozen.seconds > 0
    assert result.seconds == frozen.seconds + read_resumed(last, result.last).position.seconds

    kept = read_checkpoint(result.best)
    right = _right(kept, result.best, every)
    assert right == (found.tuning.second if verdict == "better" else found.tuning.first)
    assert kept.decision is not None
    assert kept.decision.calibration.temperature == 1  # the network contains it


def _right(checkpoint: Any, path: Path, every: int) -> int:
    """Count the held-out digits that the network of *checkpoint* classifies correctly."""
    with few_digits(every):
        held_out = open_digits().held_out
    network, rules = build_classifier(checkpoint, path), checkpoint.preprocess
    logits, targets = predict_logits(network, PreprocessedDataset(held_out, rules), rules)
    return int((logits.argmax(axis=1) == targets).sum())


@pytest.mark.parametrize(
    ("counts", "verdict", "figures"),
    [
        (
            {"count": 400, "first": 347, "second": 372, "wins": 40, "losses": 15},
            "better",
            ("93.0 %", "86.8 %", "better on 40", "worse on 15", "p 0.001"),
        ),
        (
            {"count": 100, "first": 87, "second": 92, "wins": 8, "losses": 3},
            "not worse",
            ("92.0 %", "87.0 %", "p 0.23", "9.6 points"),
        ),
        (
            {"count": 50, "first": 40, "second": 41, "wins": 1, "losses": 0},
            "undecided",
            ("82.0 %", "80.0 %", "p 1", "12 points"),
        ),
        (
            {"count": 400, "first": 372, "second": 347, "wins": 15, "losses": 40},
            "worse",
            ("86.8 %", "93.0 %", "p 0.001"),
        ),
        (
            {"count": 5000, "first": 4500, "second": 4500, "wins": 20, "losses": 20},
            "not worse",
            ("90.0 %", "p 1", "0.36 points"),
        ),
        ({"count": 5}, "undecided", ("5 validation images", "6")),
    ],
)
def test_a_line_says_what_the_held_out_photographs_decide(
    counts: dict[str, int], verdict: str, figures: tuple[str, ...]
) -> None:
    tuning = Tuning(**counts)
    line = tuning.describe()

    assert tuning.verdict == verdict
    assert all(figure in line for figure in figures)
    kept = "fine-tuned" if verdict == "better" else "frozen"
    assert line.endswith(f"the {kept} network is kept")


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 3], ids=["images", "clips"])
def test_with_too_few_held_out_photographs_nothing_is_trained(
    tmp_path: Path, frames: int
) -> None:
    callback, root = RecordingCallback(), paint(tmp_path / "photos", each=4 * frames)
    rows = [
        f"{color}/{number}.png,{color},{color} {number // frames}"
        for color in COLORS
        for number in range(4 * frames)
    ]
    (root / "labels.csv").write_text("\n".join(["file,classes,group", *rows]), encoding="utf-8")
    settings = [*FINE_TUNE[:3], *FINE_TUNE[4:], *PLAIN]
    result = train(root, out=tmp_path / "run", set=settings, callback=callback)

    assert result.held_out_count == 3 * frames
    assert result.procedure.lines()[-1] == Tuning(count=3).describe()
    assert not [name for name, _ in callback.events if name == "step"]
    assert len(find_wrong_labels(tmp_path / "run")) == result.procedure.num_doubted
    assert (tmp_path / "run" / "history.csv").exists()


@pytest.mark.parametrize("kind", ["few_shot", "fine_tune"])
def test_equal_files_with_different_labels_are_one_warning(tmp_path: Path, kind: str) -> None:
    root = paint(tmp_path / "photos" / "train", each=4)
    paint(tmp_path / "photos" / "val", each=1)
    file, copy = (
        root / color / f"{name}.png" for color, name in zip(COLORS, ("0", "copy"), strict=False)
    )
    copy.write_bytes(file.read_bytes())
    settings = [*FINE_TUNE[1:3], *FINE_TUNE[4:7], *PLAIN, f"procedure.kind={kind}"]
    callback = RecordingCallback()
    train(root.parent, out=tmp_path / "run", set=settings, callback=callback)
    warnings = [values["warning"] for name, values in callback.events if name == "warning"]

    assert len([warning for warning in warnings if "different labels" in warning]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [PLAIN, BRANCHES, DETACHABLE, GATED],
    ids=["plain", "branches", "a head as branch", "a gate"],
)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, network: list[str]) -> None:
    settings = recipe(*FINE_TUNE, *network, "optimizer.lr=0.01", "epochs=2")
    with few_digits(14):
        whole = train_recipe(settings, tmp_path / "whole")
        for event in (("step", 0, 3), ("epoch", 0, 0)):
            folder = tmp_path / event[0]
            interrupt(settings, folder, *event)
            best = read_checkpoint(folder / "best.pt")
            assert (best.model, best.training["procedure"]["kind"]) == (
                "head:resnet8",
                "few_shot",
            )
            parts = train_with_page(settings, folder, resume=True)
            again = train_recipe(settings, folder, resume=True)  # of the finished run
            for path in ("last.pt", "best.pt"):
                first, second = (
                    read_checkpoint(run / path) for run in (tmp_path / "whole", folder)
                )
                assert same_bits(first.weights, second.weights)
                assert first.decision == second.decision
                arrays = [
                    (checkpoint.resume or {}).get("procedure") for checkpoint in (first, second)
                ]
                assert same_bits(*arrays)
            assert parts.procedure.tuning == whole.procedure.tuning == again.procedure.tuning
            assert parts.num_epochs == whole.num_epochs == again.num_epochs


@pytest.mark.parametrize(
    "settings",
    [["procedure.kind=few_shot", *FINE_TUNE[1:7], *PLAIN], UNDECIDED],
    ids=["few_shot", "fine_tune"],
)
def test_a_signal_after_the_cross_validation_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    def evaluate(*given: Any) -> Any:
        deliver(signal.SIGINT)
        return original(*given)

    original = few_shot._evaluate
    monkeypatch.setattr(few_shot, "_evaluate", evaluate)
    with (
        few_digits(14),
        pytest.raises(TrainingStoppedError, match="first checkpoint"),
    ):
        train_recipe(recipe(*settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "name", "column", "part"),
    [
        (BRANCHES, "head:dsop-resnet8", "train_layer1_0", "branches"),
        (DETACHABLE, "dsop-head:resnet8", "train_branch", "branch"),
        (GATED, "gmsop-head:resnet8", "train_balance", "pooled_head.gate.noise"),
    ],
    ids=["branches", "a head as branch", "the noise of a gate"],
)
def test_branches_of_the_network_train_it_and_are_detached_with_proof(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: list[str],
    name: str,
    column: str,
    part: str,
) -> None:
    monkeypatch.setattr(Tuning, "is_better", True)  # whatever the figures are
    with few_digits(14):
        result = train_with_page(recipe(*FINE_TUNE, *network, "epochs=1"), tmp_path / "run")

    assert result.model == name
    assert column in (tmp_path / "run" / "history.csv").read_text()

    with proving_once():
        exported = sopdeploy.export(result.best, tmp_path / "bundles", detach=True, max_batch=1)
    assert (exported.certificate.proof, exported.certificate.detached) == (
        "three-way",
        (part,),
    )


def test_a_head_that_is_detached_starts_from_its_own_closed_form(tmp_path: Path) -> None:
    with few_digits(14):
        detachable = train_recipe(recipe(*FINE_TUNE, *DETACHABLE, *GENTLE), tmp_path / "branch")
        second_order = [*FINE_TUNE, *PLAIN, *GENTLE, "procedure.head=gap+isqrt"]
        alone = train_recipe(recipe(*second_order), tmp_path / "alone")
    branch = read_checkpoint(detachable.last).weights
    head = read_checkpoint(alone.last).weights

    for name in ("fc.weight", "fc.bias"):
        assert torch.allclose(branch[f"branch.{name}"], head[f"pooled_head.{name}"], atol=1e-5)


def test_a_gated_head_starts_near_the_closed_form_with_components_that_differ(
    tmp_path: Path,
) -> None:
    with few_digits(14):
        held_out = open_digits().held_out
        result = train_recipe(recipe(*FINE_TUNE, *GATED, *GENTLE), tmp_path / "run")
    last = read_checkpoint(result.last)
    classes = [
        predict_logits(
            build_classifier(checkpoint, result.last),
            PreprocessedDataset(held_out, last.preprocess),
            last.preprocess,
        )[0].argmax(axis=1)
        for checkpoint in (last, read_frozen(last, result.last))
    ]
    assert last.model == "gmsop-head:resnet8"
    assert (classes[0] == classes[1]).mean() > 0.7

    weights = [value for name, value in last.weights.items() if name.endswith(".weights.0")]
    for weight_NdC in weights:
        assert len(weight_NdC) == 16
        difference = (weight_NdC[0] - weight_NdC[1]).norm() / weight_NdC[0].norm()
        assert 0.2 < difference < 1


def test_classifiers_of_branches_start_from_closed_forms(tmp_path: Path) -> None:
    """A random one begins at the loss of equal probabilities, log 10 = 2.3."""
    with few_digits(6):
        result = train_recipe(recipe(*FINE_TUNE, *BRANCHES, *GENTLE), tmp_path / "run")
    history = read_resumed(read_checkpoint(result.last), result.last).position.history
    losses = history[0].losses
    assert all(losses[name] < 1.5 for name in ("layer1_0", "layer2_0", "layer3_0"))


@pytest.mark.parametrize(
    ("weights", "num_weak"), [([1, 1, 1], 0), ([1, 1e-4, 1], 1)], ids=["teach", "one is weak"]
)
def test_a_branch_that_will_hardly_teach_is_named(
    tmp_path: Path, weights: list[float], num_weak: int
) -> None:
    network = [
        BRANCHES[0],
        f"model.config={{base_width=4, iterations=2, aux_weights={weights}}}",
    ]
    callback = RecordingCallback()
    with few_digits(14):
        train_recipe(recipe(*FINE_TUNE, *network, *GENTLE), tmp_path / "run", callback=callback)
    warnings = [values["warning"] for name, values in callback.events if name == "warning"]
    about = [warning for warning in warnings if "_0" in warning]
    assert [("layer1_0" in warning, "layer2_0" in warning) for warning in about] == [
        (True, False),  # `layer1` is frozen, so its branch reaches nothing that learns
        *[(False, True)] * num_weak,
    ]


def test_measuring_branches_changes_no_bit_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(*FINE_TUNE, *BRANCHES, "optimizer.lr=0.01", "epochs=1")
    with few_digits(14):
        measured = train_recipe(settings, tmp_path / "measured")
        monkeypatch.setattr(loop, "branch_shares", lambda *_: {})
        unmeasured = train_recipe(settings, tmp_path / "unmeasured")
    assert same_bits(
        read_checkpoint(measured.last).weights, read_checkpoint(unmeasured.last).weights
    )


@pytest.mark.parametrize(
    ("num_features", "distance", "is_shrunk"),
    [(200, 4.0, True), (200, 1.0, False), (2, 4.0, False)],
    ids=["interpolates", "classes that overlap", "few features"],
)
def test_a_head_that_interpolates_is_shrunk_until_it_learns(
    num_features: int, distance: float, is_shrunk: bool
) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(80) % 2
    vectors = random.normal(size=(80, num_features)).astype(np.float32)
    vectors[:, 0] += labels * distance
    targets = Targets(np.eye(2)[labels], labels, activation="softmax")
    space = Space.of([vectors])
    problem = LinearProblem(space, space.project(vectors), vectors, targets)
    shrunk, scaling = problem.shrink_to_learn([np.arange(80) // 2 % 5])

    assert (shrunk.shrinkage > problem.shrinkage) == is_shrunk
    logits = shrunk.fit_all(scaling).logits(vectors)
    assert np.allclose(logits, shrunk.training_logits(scaling), atol=1e-3)


@pytest.mark.parametrize(
    ("num_right", "is_idle"), [(50, True), (58, True), (80, False)], ids=["none", "few", "many"]
)
def test_a_branch_that_is_no_better_than_chance_is_named(num_right: int, is_idle: bool) -> None:
    images = open_digits().held_out.select(np.arange(len(open_digits().held_out)) < 100)
    targets = np.arange(100) % 2
    predicted = np.where(np.arange(100) < num_right, targets, 1 - targets)
    metrics = held_out_metrics(images.labels, np.eye(10)[predicted], targets)
    diagnostics = Diagnostics(num_images=100, heads={"main": metrics, "branch": metrics})
    row = EpochRow(
        epoch=1, lr=0.1, losses={}, metrics=metrics, seconds=1.0, diagnostics=diagnostics
    )
    told = [*idle_branches([row], images.replaced(targets=targets))]

    assert len(told) == is_idle
    assert not [*idle_branches([], images)]  # of a run that has trained no epoch


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight", [1.0, 0.125]
)  # of every other image, as if a server had selected it
def test_class_means_are_those_of_the_network_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    def weights_of(images: LabeledImages) -> NDArray[np.float64]:
        return np.where(np.arange(len(images)) % 2, weight, 1.0)

    monkeypatch.setattr("sopdeploy.training.fine_tune.weights_in_means", weights_of)
    monkeypatch.setattr(Tuning, "is_better", True)
    with few_digits(14):
        result = train_with_page(recipe(*FINE_TUNE, *PLAIN, "epochs=1"), tmp_path / "run")
        images = open_digits().train
    best = read_checkpoint(result.best)
    network: Any = build_classifier(best, result.best)
    vectors, targets = predict_logits(
        OwnVectors(network), PreprocessedDataset(images, best.preprocess), best.preprocess
    )
    expected = mean_vectors(
        unit_length(vectors), np.eye(10)[targets] * weights_of(images)[:, None]
    )

    assert np.allclose(network.pooled_head.means.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "last_frozen"),
    [
        ("efficientnet-lite0", {}, "blocks.2."),
        ("timm:tf_efficientnet_lite0", {}, "blocks.2."),
        ("dsop-resnet8", {"aux_widths": [8, 8, 8]}, "layer1."),
        ("head:resnet18", {}, "layer2."),
    ],
)
def test_the_first_half_of_the_stages_is_frozen(
    name: str, config: dict[str, Any], last_frozen: str
) -> None:
    network = create_model(name, num_classes=3, **config)
    start = StartConfig(learn="last_stages")
    freeze(network, start)
    set_train_mode(network, start)
    frozen = [
        key for key, parameter in network.named_parameters() if not parameter.requires_grad
    ]
    learning = [key for key, parameter in network.named_parameters() if parameter.requires_grad]
    names = [key for key, _ in network.named_parameters()]

    assert names == [*frozen, *learning]  # the first ones are frozen
    assert frozen[-1].startswith(last_frozen)
    assert not any(key.startswith(last_frozen) for key in learning)
    for key, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == is_in(key, "branches")
    assert network.training
    assert len(first_stages(network)) > 0


def test_batch_norms_of_new_parts_update_their_statistics_on_demand() -> None:
    pooling = {"kind": "isqrt", "width": 8}
    network = create_model("resnet8", num_classes=3, base_width=4, pooling=pooling)
    new = ("fc", "pooling")

    for kept, expected in (("all", set()), ("loaded", {"pooling.layer_reduce_bn"})):
        start = StartConfig(learn="last_stages", keep_statistics=kept)
        set_train_mode(network, start, new)
        assert expected == {
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.training
        }


def test_only_the_classifier_learns_if_the_recipe_says_so() -> None:
    network = create_model("resnet8", num_classes=3)
    start = StartConfig(learn="classifier")
    freeze(network, start)
    set_train_mode(network, start)
    learning = {key for key, parameter in network.named_parameters() if parameter.requires_grad}

    assert learning == {"fc.weight", "fc.bias"}
    assert [key for key, module in network.named_modules() if module.training] == ["", "fc"]


def test_branches_read_the_maps_that_the_head_reads() -> None:
    network = create_model(
        "head:dsop-resnet8", num_classes=3, aux_widths=[8, 8, 8], head={"kind": "gap"}
    )
    output = network(torch.randn(2, 3, 32, 32))

    assert isinstance(output, TrainingOutput)
    assert {name: logits.shape for name, logits in output.branches.items()} == dict.fromkeys(
        ("layer1_0", "layer2_0", "layer3_0"), (2, 3)
    )


def test_selecting_the_procedure_replaces_the_settings_that_are_not_given(
    tmp_path: Path,
) -> None:
    selected = recipe(
        "data.path=.", "procedure.kind=fine_tune", "epochs=3", "optimizer.lr=1e-4"
    )
    assert selected == recipe(
        "data.path=.", "procedure={kind='fine_tune'}", "epochs=3", "optimizer.lr=1e-4"
    )

    given = "epochs=3\ndata.path='.'\noptimizer.lr=1e-4"
    (tmp_path / "mine.toml").write_text(f"base='photos'\nprocedure.kind='fine_tune'\n{given}")
    assert selected == read_recipe(tmp_path / "mine.toml")

    # without a base, it says all itself
    whole = f"procedure.kind='fine_tune'\n{recipe_text('digits-dsop')}"
    (tmp_path / "whole.toml").write_text(whole, encoding="utf-8")
    unchanged = read_recipe("digits-dsop").model_copy(update={"procedure": FineTuneConfig()})

    assert read_recipe(tmp_path / "whole.toml") == unchanged
    assert isinstance(selected.procedure, FineTuneConfig)
    assert (selected.epochs, selected.optimizer.lr, selected.optimizer.kind) == (
        3,
        1e-4,
        "adamw",
    )
    assert (selected.start.learn, selected.start.head_factor) == ("last_stages", 1.0)
    assert selected.start.weights == "imagenet"
    assert recipe("data.path=.").procedure.kind == "auto"  # it is never the default


def test_several_classes_per_image_are_one_line(tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", each=4)
    rows = [
        f"{path.relative_to(photos)},{path.parent.name}"
        for path in sorted(photos.glob("*/*.png"))
    ]
    rows[0] += "|red"
    (photos / "labels.csv").write_text("\n".join(["file,classes", *rows]))

    with pytest.raises(ConfigError, match=r"fine_tune: .*few_shot"):
        train(photos, out=tmp_path / "run", set=[*FINE_TUNE[:3], *FINE_TUNE[4:], *PLAIN])
    assert not (tmp_path / "run").exists()
