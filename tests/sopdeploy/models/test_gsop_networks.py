import pytest
import torch
from torch import nn

from sopdeploy import create_model
from sopdeploy.errors import ConfigError
from sopdeploy.layers.attention.gsop_block import GSoPBlock
from sopdeploy.models.gsop import RELEASED

SMALL = "gsop-net1-preact-resnet164"


def on_meta(name: str, **config: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **config)


def places(network: nn.Module) -> list[str]:
    return [
        name.removesuffix(".attention") for name, m in network.named_modules() if isinstance(m, GSoPBlock)
    ]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("gsop-net1-resnet50", {}, ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("gsop-net2-resnet50", {"depth": 101}, ["layer1.2", "layer2.3", "layer3.22"]),
        ("gsop-net1-resnet26", {"block_stages": ["layer3"]}, ["layer3.1"]),
        ("gsop-net2-resnet26", {"block_stages": []}, []),
        ("gsop-net2-resnet26", {"block_stages": ["layer4"]}, ["layer4.1"]),
        ("gsop-net2-preact-resnet164", {"blocks": 3}, ["layer1.2", "layer2.2"]),
        ("gsop-net1-preact-resnet164", {"blocks": 1}, ["layer1.0", "layer2.0", "layer3.0"]),
    ],
)
def test_blocks_are_where_the_paper_has_them(name: str, config: dict, expected: list[str]) -> None:
    assert places(on_meta(name, **config)) == expected


def test_block_place_is_after_the_bottleneck_or_inside_it() -> None:
    for place in ("after", "inside"):
        network = on_meta(SMALL, blocks=3, block_place=place)
        after = {network.get_submodule(name).attention_after for name in places(network)}
        assert after == {place == "after"}


def test_dr_strides_only_where_the_config_asks() -> None:
    network = on_meta("gsop-net1-resnet50", **RELEASED)
    strides = [network.get_submodule(f"{p}.attention.channel.reduction.0").stride for p in places(network)]
    assert strides == [(2, 2), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        (SMALL, {"block_stages": ["layer4"]}, "no layer4; stages are layer1, layer2, layer3"),
        (SMALL, {"strided_dr_stages": ["layer4"]}, "no layer4"),
        ("gsop-net1-resnet50", {"block_stages": ["layer5"]}, "block_stages.0"),
        (
            "gsop-net1-resnet26",
            {"depth": 18, "base_width": 8, "attention": "concatenation"},
            "multiple of 64 channels, got 8",
        ),
    ],
)
def test_an_invalid_option_is_a_config_error(name: str, config: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        on_meta(name, **config)


def test_convolutions_start_with_kaimings_deviation() -> None:
    torch.manual_seed(0)
    network = create_model(SMALL, blocks=3)
    conv = network.get_submodule("layer2." + places(network)[1].split(".")[1]).attention.channel.reduction[0]
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.1)
    assert conv.bias.abs().max() == 0
