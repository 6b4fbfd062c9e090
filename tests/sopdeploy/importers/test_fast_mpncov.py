"""Imports of fast-MPN-COV files against reference networks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.importers.weight_files import read_torch
from tests.sopdeploy.importers.comparing import (
    assert_same_logits,
    imported,
    random_images,
)
from tests.sopdeploy.importers.released_torch import (
    Basic,
    Bottleneck,
    ResNet,
    Vgg,
    numbered,
    prefixed,
    settled,
)

R18, R50 = (2, 2, 2, 2), (3, 4, 6, 3)


def resnet(stride: int = 1, d: int = 12) -> ResNet:
    torch.manual_seed(0)
    return settled(ResNet(R18, kind=Basic, stride=stride, d=d))


def test_a_published_resnet50_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = settled(ResNet(R50, kind=Bottleneck, d=16))
    file = tmp_path / "mpncovresnet50.pth"
    torch.save(network.state_dict(), file)
    ours, report = imported(file, "isqrt-resnet50")
    assert_same_logits(ours, network, random_images(96))
    assert report.config["conv5_stride"] == 1
    assert report.config["pooling"]["width"] == 16
    assert report.config["pooling"]["iterations"] == 5
    assert (report.preprocess.resize, report.preprocess.crop) == (256, 224)
    assert len(report.rows) == len(network.state_dict())


@pytest.mark.parametrize(("blocks", "entries"), [(R50, 326), ((3, 4, 23, 3), 632)])
def test_the_reference_networks_have_as_many_tensors_as_the_published_files(
    blocks: Any, entries: int
) -> None:
    with torch.device("meta"):
        state = ResNet(blocks, kind=Bottleneck, d=256, classes=1000).state_dict()
    assert len(state) == entries
    count = sum(v.numel() for n, v in state.items() if not n.endswith(("mean", "var", "tracked")))
    assert count == {326: 56_929_832, 632: 75_921_960}[entries]


def training_file(path: Path, network: ResNet, arch: str | None, **how: Any) -> Path:
    state = numbered(network.state_dict(), **how)
    content = {"epoch": 65, "state_dict": state, "best_prec1": torch.tensor(78.0), "optimizer": {"state": {}}}
    torch.save(content | ({"arch": arch} if arch else {}), path)
    return path


@pytest.mark.parametrize(
    ("model", "arch", "stride", "d", "fine_tuned"),
    [
        ("isqrt-resnet18", "mpncovresnet18", 1, 12, False),
        ("isqrt-resnet18", "resnet18", 2, 12, False),
        ("isqrt-resnet18", None, 1, 12, True),  # the reduction is among the features
        ("resnet18", "resnet18", 2, 0, False),
    ],
)
def test_training_checkpoints_give_the_same_logits(
    tmp_path: Path, model: str, arch: str | None, stride: int, d: int, fine_tuned: bool
) -> None:
    network = resnet(stride, d)
    file = training_file(tmp_path / "a.pth.tar", network, arch, fine_tuned=fine_tuned)
    ours, report = imported(file, model)
    assert_same_logits(ours, network, random_images(64))
    assert report.config["conv5_stride"] == stride
    assert set(report.beside) == {"epoch", "best_prec1", "optimizer"} | ({"arch"} if arch else set())


def test_an_unknown_stride_must_be_set(tmp_path: Path) -> None:
    network = resnet(stride=2)
    file = training_file(tmp_path / "a.pth.tar", network, None)
    with pytest.raises(ConfigError, match=r"stride of conv5_x.*add --set conv5_stride"):
        imported(file, "isqrt-resnet18")
    ours, _ = imported(file, "isqrt-resnet18", settings={"conv5_stride": 2})
    assert_same_logits(ours, network, random_images(64))


@pytest.mark.parametrize("prefix", ["features.", "features.module.", "module.features."])
def test_data_parallel_prefixes_are_removed_anywhere(tmp_path: Path, prefix: str) -> None:
    state = numbered(resnet().state_dict())
    torch.save(
        {name.replace("features.module.", prefix): value for name, value in state.items()}, tmp_path / "a.pth"
    )
    names = read_torch(tmp_path / "a.pth").tensors.keys()
    assert names == {name.replace("features.module.", "features.") for name in state}


def test_batch_norm_counters_can_be_absent(tmp_path: Path) -> None:
    network = resnet()
    old = {name: value for name, value in network.state_dict().items() if "tracked" not in name}
    torch.save(old, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    ours, report = imported(tmp_path / "a.pth", "isqrt-resnet18")
    assert_same_logits(ours, network, random_images(64))
    assert {row.how for row in report.rows if not row.of} == {"absent, set to 0"}
    assert sum(not row.of for row in report.rows) == 21


@pytest.mark.parametrize(
    ("d", "linear", "name"),
    [(8, False, "isqrt-vgg16"), (8, True, "isqrt-vgg16"), (0, True, "bcnn-vgg16")],
)
def test_vgg_weights_give_the_same_logits(tmp_path: Path, d: int, linear: bool, name: str) -> None:
    torch.manual_seed(0)
    network = settled(Vgg(d=d, linear=linear))
    if not d:
        network.classifier.weight.data *= 512.0  # B-CNN's vector has length 1
    state = network.state_dict()
    torch.save({"state_dict": prefixed(state)}, tmp_path / "a.pth.tar")
    if d:
        assert len(state) == (99 if linear else 103)
    ours, report = imported(tmp_path / "a.pth.tar", name)
    assert_same_logits(ours, network, random_images(32))
    assert report.config["classifier"] == ("linear" if linear else "mlp")


def test_the_newton_schulz_iterations_can_be_set(tmp_path: Path) -> None:
    network = resnet()
    network.steps = 3
    torch.save(network.state_dict(), tmp_path / "a.pth")
    ours, _ = imported(tmp_path / "a.pth", "isqrt-resnet18", settings={"pooling.iterations": 3})
    assert_same_logits(ours, network, random_images(64))


@pytest.mark.parametrize(
    ("model", "settings", "change", "error", "message"),
    [
        (
            "mpncov-resnet18",
            {},
            {},
            WeightsError,
            r"does not fit mpncov-resnet18 \(pooling.kind is mpncov, not isqrt\).*--as isqrt-resnet18",
        ),
        ("isqrt-resnet18", {}, {"fc.weight": torch.zeros(5, 8192)}, WeightsError, "into the 8192 inputs"),
        (
            "isqrt-resnet18",
            {"pooling.width": 64},
            {},
            ConfigError,
            r"--set pooling.width=64: .* holds 12; leave the setting out",
        ),
    ],
    ids=["another pooling", "no pooling of this size", "contradicting setting"],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, model: str, settings: Any, change: Any, error: type[Exception], message: str
) -> None:
    torch.save(resnet().state_dict() | change, tmp_path / "a.pth")
    with pytest.raises(error, match=message):
        imported(tmp_path / "a.pth", model, settings=settings)
