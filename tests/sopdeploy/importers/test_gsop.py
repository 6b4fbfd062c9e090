"""Imports of GSoP training checkpoints against reference networks."""

from pathlib import Path

import pytest
import torch

from sopdeploy.errors import ConfigError, WeightsError
from tests.sopdeploy.importers.comparing import (
    assert_same_logits,
    imported,
    random_images,
)
from tests.sopdeploy.importers.released_torch import Bottleneck, ResNet, prefixed, settled

NAMES = {"1": "channel", "2": "position", "+": "sum", "M": "maximum", "&": "concatenation"}


def saved(path: Path, attention: str, d: int = 0) -> ResNet:
    torch.manual_seed(0)
    network = settled(
        ResNet((2, 2, 2, 2), kind=Bottleneck, d=d, steps=3, order="columns", attention=attention)
    )
    torch.save({"arch": "resnet26", "state_dict": prefixed(network.state_dict())}, path)
    return network


@pytest.mark.parametrize(
    ("depth", "d", "entries"), [(50, 0, 384), (50, 256, 374), (101, 0, 690), (101, 256, 680)]
)
def test_the_reference_networks_have_as_many_tensors_as_the_released(
    depth: int, d: int, entries: int
) -> None:
    with torch.device("meta"):
        network = ResNet((3, 4, 6 if depth == 50 else 23, 3), kind=Bottleneck, d=d, attention="1")
    assert len(network.state_dict()) == entries


@pytest.mark.parametrize("attention", NAMES)
def test_net1_gives_the_same_logits_with_each_block(tmp_path: Path, attention: str) -> None:
    network = saved(tmp_path / "a.pth.tar", attention)
    settings = {"attention": NAMES[attention]} if attention in "+M" else {}
    ours, report = imported(tmp_path / "a.pth.tar", "gsop-net1-resnet26", settings=settings)
    assert_same_logits(ours, network, random_images(64))
    assert report.config["attention"] == NAMES[attention]
    assert report.config["cov_width"] == 32
    assert report.config["block_place"] == "inside"


def test_the_classifier_of_net2_is_made_row_wise(tmp_path: Path) -> None:
    network = saved(tmp_path / "a.pth.tar", "1", d=12)
    ours, report = imported(tmp_path / "a.pth.tar", "gsop-net2-resnet26")
    assert_same_logits(ours, network, random_images(64))
    assert report.config["iterations"] == 3
    assert {row.name: row.how for row in report.rows}["fc.weight"] == "triangle made row-wise"
    assert not torch.equal(ours.fc.weight.float(), network.fc.weight.float())


def test_fusion_by_sum_or_maximum_must_be_set(tmp_path: Path) -> None:
    saved(tmp_path / "a.pth.tar", "M")
    with pytest.raises(ConfigError, match=r"sum and maximum .* add --set attention="):
        imported(tmp_path / "a.pth.tar", "gsop-net1-resnet26")


@pytest.mark.parametrize(
    ("d", "name", "message"),
    [
        (0, "gsop-net2-resnet26", r"final_pooling is isqrt, not gap.*--as gsop-net1-resnet26"),
        (12, "gsop-net1-resnet26", r"final_pooling is gap, not isqrt.*--as gsop-net2-resnet26"),
        (0, "gsop-net1-resnet50", r"depth is 50, not 26"),
        (0, "resnet50", r"it looks like GSoP-Net1 on ResNet-26, channel blocks"),
        (0, "isqrt-resnet20", r"looks like GSoP-Net1"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, d: int, name: str, message: str) -> None:
    saved(tmp_path / "a.pth.tar", "1", d=d)
    with pytest.raises(WeightsError, match=message):
        imported(tmp_path / "a.pth.tar", name)
