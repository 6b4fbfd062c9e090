"""Imports of fast-MPN-COV and GSoP files against reference networks."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from sopdeploy.backbones import alexnet_vgg
from sopdeploy.errors import ConfigError, WeightsError
from tests.sopdeploy.importers.released_torch import (
    BASE,
    SHORT,
    VGG_WIDTHS,
    Basic,
    Bottleneck,
    ResNet,
    Vgg,
    assert_same_logits,
    imported,
    numbered,
    prefixed,
    random_images,
    settled,
)

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
NARROW = (8, 8, 16, 16, 16)  # channels of VGG's stages
ATTENTIONS = {"1": "channel", "2": "position", "+": "sum", "M": "maximum", "&": "concatenation"}


@functools.cache
def resnet(stride: int = 1, d: int = 12, steps: int = 5) -> ResNet:
    torch.manual_seed(0)
    return settled(ResNet(SHORT, kind=Basic, stride=stride, d=d, steps=steps))


@pytest.mark.parametrize(
    ("blocks", "d", "attention", "entries"),
    [
        (R50, 256, "0", 326),
        (R101, 256, "0", 632),
        (R50, 0, "1", 384),
        (R50, 256, "1", 374),
        (R101, 0, "1", 690),
        (R101, 256, "1", 680),
    ],
)
def test_the_reference_networks_have_as_many_tensors_as_the_published_files(
    blocks: Any, d: int, attention: str, entries: int
) -> None:
    with torch.device("meta"):
        network = ResNet(blocks, kind=Bottleneck, d=d, attention=attention, classes=1000, base=64)
    assert len(network.state_dict()) == entries
    if attention == "0":
        expected = {326: 56_929_832, 632: 75_921_960}[entries]
        assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.usefixtures("short")
def test_a_published_resnet50_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = settled(ResNet(SHORT, kind=Bottleneck, d=16))
    torch.save(network.state_dict(), tmp_path / "mpncovresnet50.pth")
    ours, report = imported(tmp_path / "mpncovresnet50.pth", "isqrt-resnet50")
    assert_same_logits(ours, network, random_images(48))
    assert report.config["conv5_stride"] == 1
    assert {"width": 16, "iterations": 5}.items() <= report.config["pooling"].items()
    assert report.config["base_width"] == BASE
    assert (report.preprocess.resize, report.preprocess.crop) == (256, 224)
    assert report.num_tensors == len(network.state_dict())


def training_file(path: Path, network: ResNet, arch: str | None, **how: Any) -> Path:
    state = numbered(network.state_dict(), **how)
    content = {"epoch": 65, "state_dict": state, "best_prec1": torch.tensor(78.0), "optimizer": {"state": {}}}
    torch.save(content | ({"arch": arch} if arch else {}), path)
    return path


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("model", "arch", "stride", "d", "fine_tuned"),
    [
        ("isqrt-resnet50", "mpncovresnet18", 1, 12, False),
        ("isqrt-resnet50", "resnet18", 2, 12, False),
        ("isqrt-resnet50", None, 1, 12, True),  # the reduction is among the features
        ("resnet18", "resnet18", 2, 0, False),
    ],
)
def test_training_checkpoints_give_the_same_logits(
    tmp_path: Path, model: str, arch: str | None, stride: int, d: int, fine_tuned: bool
) -> None:
    network = resnet(stride, d)
    file = training_file(tmp_path / "a.pth.tar", network, arch, fine_tuned=fine_tuned)
    ours, report = imported(file, model, settings={"depth": 18})
    assert_same_logits(ours, network, random_images(48))
    assert report.config["conv5_stride"] == stride
    assert set(report.beside) == {"epoch", "best_prec1", "optimizer"} | ({"arch"} if arch else set())


@pytest.mark.usefixtures("short")
def test_what_the_file_does_not_tell_must_be_set(tmp_path: Path) -> None:
    network = resnet(stride=2, steps=3)
    file = training_file(tmp_path / "a.pth.tar", network, None)
    for arch, message in ((None, r"its arch \(missing\)"), ("se_resnet18", r"its arch \(se_resnet18\)")):
        training_file(file, network, arch)
        with pytest.raises(
            ConfigError, match=rf"{message} does not determine the stride .*add --option conv5_stride"
        ):
            imported(file, "isqrt-resnet50", settings={"depth": 18})
    with pytest.raises(ConfigError, match=r"--option pooling.width=64: .* holds 12; leave the setting out"):
        imported(file, "isqrt-resnet50", settings={"depth": 18, "conv5_stride": 2, "pooling.width": 64})
    ours, _ = imported(
        file, "isqrt-resnet50", settings={"depth": 18, "conv5_stride": 2, "pooling.iterations": 3}
    )
    assert_same_logits(ours, network, random_images(48))


@pytest.mark.usefixtures("short")
def test_batch_norm_counters_can_be_absent(tmp_path: Path) -> None:
    network = resnet()
    old = {name: value for name, value in network.state_dict().items() if "tracked" not in name}
    torch.save(old, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    ours, report = imported(tmp_path / "a.pth", "isqrt-resnet50", settings={"depth": 18})
    assert_same_logits(ours, network, random_images(48))
    assert report.num_tensors == len(old) + 15


@pytest.mark.parametrize(
    ("d", "linear", "pooling", "entries", "widths"),
    [
        (8, False, "isqrt", 103, NARROW),
        (0, True, "bcnn", 93, (*NARROW[:4], 512)),  # whose classifier has 512 x 512 inputs
        pytest.param(8, False, "isqrt", 103, VGG_WIDTHS, marks=pytest.mark.slow),
        pytest.param(8, True, "isqrt", 99, VGG_WIDTHS, marks=pytest.mark.slow),
        pytest.param(0, True, "bcnn", 93, VGG_WIDTHS, marks=pytest.mark.slow),
    ],
)
def test_vgg_weights_give_the_same_logits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    d: int,
    linear: bool,
    pooling: str,
    entries: int,
    widths: tuple[int, ...],
) -> None:
    stages = [(width,) * len(stage) for width, stage in zip(widths, alexnet_vgg.VGG_STAGES, strict=True)]
    hidden = alexnet_vgg.HIDDEN if widths == VGG_WIDTHS else 32
    monkeypatch.setattr(alexnet_vgg, "VGG_STAGES", stages)
    monkeypatch.setattr(alexnet_vgg, "HIDDEN", hidden)
    torch.manual_seed(0)
    network = settled(Vgg(d=d, linear=linear, widths=widths, hidden=hidden))
    if not d:
        network.classifier.weight.data *= 512.0  # B-CNN's vector has length 1
    torch.save({"state_dict": prefixed(network.state_dict())}, tmp_path / "a.pth.tar")
    assert len(network.state_dict()) == entries
    ours, report = imported(tmp_path / "a.pth.tar", "vgg16-bn", settings={"pooling": pooling})
    assert_same_logits(ours, network, random_images(32))
    assert report.config["classifier"] == ("linear" if linear else "mlp")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            "mpncov-resnet50",
            {},
            r"\(pooling.kind is mpncov, not isqrt\).*--as isqrt-resnet50 --option depth=18",
        ),
        ("isqrt-resnet50", {"fc.weight": torch.zeros(5, 8192)}, "to the 8192 inputs"),
    ],
    ids=["another pooling", "no pooling of this size"],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, model: str, change: Any, message: str) -> None:
    torch.save(resnet().state_dict() | change, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        imported(tmp_path / "a.pth", model, settings={"depth": 18})


@functools.cache
def gsop_network(attention: str, d: int) -> ResNet:
    torch.manual_seed(0)
    return settled(ResNet(SHORT, kind=Bottleneck, d=d, steps=3, order="columns", attention=attention))


def gsop(path: Path, attention: str, d: int = 0) -> ResNet:
    network = gsop_network(attention, d)
    torch.save({"arch": "resnet26", "state_dict": prefixed(network.state_dict())}, path)
    return network


@pytest.mark.usefixtures("short26")
@pytest.mark.parametrize("attention", ["1", "2", "+", "M", "&"])
def test_gsop_net1_gives_the_same_logits_with_each_block(tmp_path: Path, attention: str) -> None:
    network = gsop(tmp_path / "a.pth.tar", attention)
    settings = {}
    if attention in "+M":
        with pytest.raises(ConfigError, match=r"sum and maximum .* add --option attention="):
            imported(tmp_path / "a.pth.tar", "gsop-net1-resnet26")
        settings = {"attention": ATTENTIONS[attention]}
    ours, report = imported(tmp_path / "a.pth.tar", "gsop-net1-resnet26", settings=settings)
    assert_same_logits(ours, network, random_images(64))
    expected = {"attention": ATTENTIONS[attention], "cov_width": 32, "block_place": "inside"}
    assert expected.items() <= report.config.items()


@pytest.mark.usefixtures("short26")
def test_the_classifier_of_gsop_net2_is_made_row_wise(tmp_path: Path) -> None:
    network = gsop(tmp_path / "a.pth.tar", "1", d=12)
    ours, report = imported(tmp_path / "a.pth.tar", "gsop-net2-resnet26")
    assert_same_logits(ours, network, random_images(64))
    assert report.config["iterations"] == 3
    assert not torch.equal(ours.fc.weight.float(), network.fc.weight.float())
