"""ResNets, pre-activation ResNets and ResNeXt for 32-pixel images."""

import pytest
import torch

from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
    ResNeXt,
    ResNeXtConfig,
    SmallResNet,
    SmallResNetConfig,
)
from sopdeploy.layers.residual import PaddedShortcut


def test_option_a_takes_every_second_pixel_and_pads_channels_on_either_side() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    out = PaddedShortcut(2, 5, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()


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
        last, tapped = network(config, 10).feature_maps(torch.empty(1, 3, 32, 32), ["layer1.0", "layer2.0"])
    shapes = [(width, 32, 32), (2 * width, 16, 16), (4 * width, side, side)]
    assert [tuple(t.shape[1:]) for t in (*tapped, last)] == shapes


def test_taps_are_not_activated_and_the_last_map_is() -> None:
    torch.manual_seed(0)
    network = PreActResNet(PreActResNetConfig(blocks=1), 10).eval()
    last, (tapped,) = network.feature_maps(torch.randn(1, 3, 8, 8), ["layer3.0"])
    assert tapped.min() < 0 <= last.min()
    assert torch.equal(last, network.bn(tapped).relu())
