"""Imports of fast-MPN-COV and GSoP files, whose released networks computed the expected logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sopdeploy.base.files import sha256
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.models.backbones import alexnet_vgg
from sopdeploy.weights import import_weights
from tests.sopdeploy.weights.released import (
    VGG_HIDDEN,
    VGG_WIDTHS,
    assert_released_logits,
    imported,
    prefixed,
    state_of,
)
from tests.support.slow import mostly_slow

NUMBERED = "mpncov-resnet18 numbered"
DEPTH = {"depth": 18}


@pytest.mark.usefixtures("short")
def test_a_published_resnet50_gives_the_same_logits(tmp_path: Path) -> None:
    state = state_of("mpncov-resnet50")
    torch.save(state, tmp_path / "mpncovresnet50.pth")
    ours, report = imported(tmp_path / "mpncovresnet50.pth", "isqrt-resnet50")

    assert_released_logits(ours, "mpncov-resnet50")
    assert (report.config["conv5_stride"], report.config["base_width"]) == (1, 16)
    assert {"width": 16, "iterations": 5}.items() <= report.config["pooling"].items()
    assert (report.preprocess.resize, report.preprocess.crop) == (256, 224)
    assert report.num_tensors == len(state)


def training_file(path: Path, released: str, arch: str | None) -> Path:
    state = state_of(released)
    content = {
        "epoch": 65,
        "state_dict": state,
        "best_prec1": torch.tensor(78.0),
        "optimizer": {"state": {}},
    }
    torch.save(content | ({"arch": arch} if arch else {}), path)
    return path


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("model", "arch", "stride", "released"),
    [
        ("isqrt-resnet50", "mpncovresnet18", 1, NUMBERED),
        pytest.param(
            "isqrt-resnet50", "resnet18", 2, f"{NUMBERED}, stride 2", marks=pytest.mark.slow
        ),
        # The reduction is among the features
        pytest.param(
            "isqrt-resnet50", None, 1, "mpncov-resnet18 fine-tuned", marks=pytest.mark.slow
        ),
        pytest.param("resnet18", "resnet18", 2, "resnet18 numbered", marks=pytest.mark.slow),
    ],
)
def test_training_checkpoints_give_the_same_logits(
    tmp_path: Path, model: str, arch: str | None, stride: int, released: str
) -> None:
    ours, report = imported(
        training_file(tmp_path / "a.pth.tar", released, arch), model, settings=DEPTH
    )

    assert_released_logits(ours, released)
    assert report.config["conv5_stride"] == stride


@pytest.mark.usefixtures("short")
def test_what_the_file_does_not_tell_must_be_set(tmp_path: Path) -> None:
    file = tmp_path / "a.pth.tar"
    released = f"{NUMBERED}, stride 2, 3 steps"
    for arch in (None, "se_resnet18"):
        training_file(file, released, arch)
        with pytest.raises(ConfigError, match=r"--option conv5_stride"):
            imported(file, "isqrt-resnet50", settings=DEPTH)

    given = {**DEPTH, "conv5_stride": 2}
    with pytest.raises(ConfigError, match=r"pooling.width=64: .* holds 12"):
        imported(file, "isqrt-resnet50", settings={**given, "pooling.width": 64})
    ours, _ = imported(file, "isqrt-resnet50", settings={**given, "pooling.iterations": 3})
    assert_released_logits(ours, released)


@pytest.mark.usefixtures("short")
def test_batch_norm_counters_can_be_absent(tmp_path: Path) -> None:
    old = {
        name: value
        for name, value in state_of("mpncov-resnet18").items()
        if "tracked" not in name
    }
    torch.save(old, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    ours, report = imported(tmp_path / "a.pth", "isqrt-resnet50", settings=DEPTH)

    assert_released_logits(ours, "mpncov-resnet18")
    assert report.num_tensors == len(old) + 15


@pytest.mark.parametrize(
    ("pooling", "classifier"),
    [("isqrt", "mlp"), pytest.param("bcnn", "linear", marks=pytest.mark.slow)],
)
def test_vgg_weights_give_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str, classifier: str
) -> None:
    widths = VGG_WIDTHS if pooling == "isqrt" else (*VGG_WIDTHS[:4], 512)
    stages = [
        (width,) * len(stage)
        for width, stage in zip(widths, alexnet_vgg.VGG_STAGES, strict=True)
    ]
    monkeypatch.setattr(alexnet_vgg, "VGG_STAGES", stages)
    monkeypatch.setattr(alexnet_vgg, "HIDDEN", VGG_HIDDEN)
    torch.save({"state_dict": prefixed(state_of(f"vgg {pooling}"))}, tmp_path / "a.pth.tar")
    ours, report = imported(tmp_path / "a.pth.tar", "vgg16-bn", settings={"pooling": pooling})
    assert_released_logits(ours, f"vgg {pooling}")

    assert report.config["classifier"] == classifier
    deeper = state_of(f"vgg {pooling}") | {"features.99.weight": torch.zeros(2, 2, 3, 3)}
    torch.save(deeper, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="a VGG with 14 convolutions"):
        imported(tmp_path / "b.pth", "vgg16-bn", settings={"pooling": pooling})


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("mpncov-resnet50", {}, "--as isqrt-resnet50 --option depth=18"),
        ("isqrt-resnet50", {"fc.weight": torch.zeros(5, 8192)}, "to the 8192 inputs"),
    ],
    ids=["another pooling", "no pooling of this size"],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, model: str, change: Any, message: str
) -> None:
    torch.save(state_of("mpncov-resnet18") | change, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        imported(tmp_path / "a.pth", model, settings=DEPTH)


def by_columns(length: int) -> torch.Tensor:
    """Number the elements of a triangle row by row, in the order column by column."""
    size = int((2 * length) ** 0.5)
    numbered = torch.zeros(size, size, dtype=torch.int64)
    rows, columns = torch.triu_indices(size, size)
    numbered[rows, columns] = torch.arange(length)
    return torch.cat([numbered[: column + 1, column] for column in range(size)])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "released", mostly_slow(["mpncov-resnet50", NUMBERED, "vgg isqrt"], "mpncov-resnet50")
)
def test_the_order_of_the_triangle_can_be_given(
    tmp_path: Path, monkeypatch: Any, released: str
) -> None:
    """A file whose classifier reads the triangle column by column gives the logits of the one by rows."""
    name = "fc.weight"
    settings = DEPTH if released == NUMBERED else {}
    network = "isqrt-resnet50"

    if released == "vgg isqrt":
        stages = [
            (width,) * len(stage)
            for width, stage in zip(VGG_WIDTHS, alexnet_vgg.VGG_STAGES, strict=True)
        ]
        monkeypatch.setattr(alexnet_vgg, "VGG_STAGES", stages)
        monkeypatch.setattr(alexnet_vgg, "HIDDEN", VGG_HIDDEN)
        settings = {"pooling": "isqrt"}
        network = "vgg16-bn"

    state = state_of(released)
    name = next(
        key for key in ("fc.weight", "classifier.weight", "classifier.0.weight") if key in state
    )
    state[name] = state[name][:, by_columns(state[name].shape[1])]
    torch.save({"state_dict": state, "arch": "mpncovresnet18"}, tmp_path / "a.pth.tar")
    ours, _ = imported(tmp_path / "a.pth.tar", network, settings=settings, triangle="columns")
    assert_released_logits(ours, released)


@pytest.mark.usefixtures("short", "short26")
def test_gsop_can_be_read_by_rows_and_an_average_has_no_triangle(tmp_path: Path) -> None:
    file = gsop(tmp_path / "a.pth.tar", "gsop-net2 channel")
    as_stored, _ = imported(file, "gsop-net2-resnet26", triangle="rows")
    assert torch.equal(as_stored.fc.weight, state_of("gsop-net2 channel")["fc.weight"])

    torch.save(state_of("resnet18 numbered"), tmp_path / "b.pth")
    with pytest.raises(ConfigError, match=r"triangle='rows': ResNet-18"):
        imported(tmp_path / "b.pth", "resnet18", settings={"conv5_stride": 2}, triangle="rows")


@pytest.mark.usefixtures("short")
def test_a_published_file_that_is_known_to_be_broken_is_refused(
    tmp_path: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "renamed.pth"
    torch.save(state_of("mpncov-resnet50"), file)
    assert import_weights.BROKEN.keys() == {"15991845", "ade9737a"}
    problem = import_weights.BROKEN["15991845"]
    monkeypatch.setattr(import_weights, "BROKEN", {sha256(file)[:8]: problem})

    with pytest.raises(WeightsError, match="triangle=columns"):
        imported(file, "isqrt-resnet50")

    assert [path.name for path in tmp_path.iterdir()] == ["renamed.pth"]
    imported(file, "isqrt-resnet50", triangle="columns")


def gsop(path: Path, released: str) -> Path:
    torch.save({"arch": "resnet26", "state_dict": prefixed(state_of(released))}, path)
    return path


@pytest.mark.usefixtures("short26")
@pytest.mark.parametrize(
    "attention",
    mostly_slow(["channel", "position", "sum", "maximum", "concatenation"], "channel", "sum"),
)
def test_gsop_net1_gives_the_same_logits_with_each_block(
    tmp_path: Path, attention: str
) -> None:
    file = gsop(tmp_path / "a.pth.tar", f"gsop-net1 {attention}")
    settings = {"attention": attention} if attention in {"sum", "maximum"} else {}
    if settings:
        with pytest.raises(ConfigError, match=r"--option attention="):
            imported(file, "gsop-net1-resnet26")
    ours, report = imported(file, "gsop-net1-resnet26", settings=settings)

    assert_released_logits(ours, f"gsop-net1 {attention}")

    expected = {"attention": attention, "cov_width": 32, "block_place": "inside"}
    assert expected.items() <= report.config.items()


@pytest.mark.usefixtures("short26")
def test_the_classifier_of_gsop_net2_is_made_row_wise(tmp_path: Path) -> None:
    ours, report = imported(
        gsop(tmp_path / "a.pth.tar", "gsop-net2 channel"), "gsop-net2-resnet26"
    )

    assert_released_logits(ours, "gsop-net2 channel")
    assert report.config["iterations"] == 3
    assert not torch.equal(ours.fc.weight.float(), state_of("gsop-net2 channel")["fc.weight"])
