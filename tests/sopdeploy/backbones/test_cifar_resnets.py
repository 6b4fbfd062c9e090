"""ResNets, pre-activation ResNets and ResNeXt for 32-pixel images."""

import pydantic
import pytest
import torch
from torch import nn

from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.layers.residual import PaddedShortcut
from sopdeploy.models.stats import tally


@pytest.mark.parametrize("depth", [2, 7, 18, 21])
def test_invalid_depths_are_rejected(depth: int) -> None:
    with pytest.raises(pydantic.ValidationError):
        SmallResNetConfig(depth=depth)


def test_option_a_takes_every_second_pixel_and_pads_channels_on_either_side() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    out = PaddedShortcut(2, 5, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()


def test_option_a_has_no_parameters_and_option_b_has() -> None:
    pad = SmallResNet(SmallResNetConfig(depth=8), 10)
    projection = SmallResNet(SmallResNetConfig(depth=8, shortcut="projection"), 10)
    assert not any("downsample" in name for name in pad.state_dict())
    assert any("layer2.0.downsample" in name for name in projection.state_dict())
    assert not any("layer1.0.downsample" in name for name in projection.state_dict())


R110 = {"blocks": 18, "block": "basic"}
WRN28 = {"blocks": 4, "block": "basic", "widen": 10}
WRN22 = {"blocks": 3, "block": "basic", "widen": 10}


@pytest.mark.parametrize(
    ("network", "config", "classes", "parameters", "macs"),
    [
        (SmallResNet, SmallResNetConfig(depth=20), 10, 269_722, None),  # as in the released weight files
        (SmallResNet, SmallResNetConfig(depth=110), 10, 1_727_962, None),
        (PreActResNet, PreActResNetConfig(), 100, 1_726_388, 247_669_760),
        (PreActResNet, PreActResNetConfig(**R110), 10, 1_730_522, 253_149_824),  # He et al. 2016b: 1.7 M
        (PreActResNet, PreActResNetConfig(**WRN22), 10, 26_797_914, 3_827_751_168),
        (PreActResNet, PreActResNetConfig(**WRN28), 10, 36_479_194, 5_243_328_768),
        (ResNeXt, ResNeXtConfig(cardinality=8), 10, 34_426_698, None),
    ],
)
def test_counts_are_exact(network, config, classes: int, parameters: int, macs: int | None) -> None:
    with torch.device("meta"):
        built = network(config, classes)
    counted = tally(built.eval(), 32).total()
    assert counted.parameters == parameters
    assert macs in {None, counted.macs}


@pytest.mark.parametrize(
    ("network", "config", "width", "side"),
    [
        (SmallResNet, SmallResNetConfig(base_width=8), 8, 8),
        (PreActResNet, PreActResNetConfig(blocks=1), 64, 8),
        (PreActResNet, PreActResNetConfig(blocks=1, last_stride=1), 64, 16),
        (ResNeXt, ResNeXtConfig(cardinality=2, group_width=4), 256, 8),
    ],
)
def test_stages_halve_the_map_and_double_the_channels(network, config, width: int, side: int) -> None:
    with torch.device("meta"):
        last, tapped = network(config, 10).features(torch.empty(1, 3, 32, 32), ["layer1.0", "layer2.0"])
    shapes = [(width, 32, 32), (2 * width, 16, 16), (4 * width, side, side)]
    assert [tuple(t.shape[1:]) for t in (*tapped, last)] == shapes


def test_a_block_without_weights_in_its_residual_is_the_identity() -> None:
    network = PreActResNet(PreActResNetConfig(blocks=2), 10).eval()
    block = network.layer2[1]
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(1, 128, 4, 4)
    assert torch.equal(block(x), x)


def test_taps_are_not_activated_and_the_last_map_is() -> None:
    torch.manual_seed(0)
    network = PreActResNet(PreActResNetConfig(blocks=1), 10).eval()
    last, (tapped,) = network.features(torch.randn(1, 3, 8, 8), ["layer3.0"])
    assert tapped.min() < 0 <= last.min()
    assert torch.equal(last, network.bn(tapped).relu())
