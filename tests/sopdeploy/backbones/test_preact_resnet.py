import pytest
import torch
from torch import nn

from sopdeploy.backbones.cifar_resnet import PreActResNet, PreActResNetConfig
from sopdeploy.models.stats import count

R110 = {"blocks": 18, "block": "basic"}
WRN28 = {"blocks": 4, "block": "basic", "widen": 10}
WRN22 = {"blocks": 3, "block": "basic", "widen": 10}


@pytest.mark.parametrize(
    ("config", "classes", "millions", "parameters", "macs"),
    [
        ({}, 100, 1.7, 1_726_388, 247_669_760),  # GSoP Table 6: 1.7 M, 0.25 G
        (R110, 10, 1.7, 1_730_522, 253_149_824),  # He et al. 2016b: 1.7 M
        (WRN22, 10, 26.8, 26_797_914, 3_827_751_168),  # Zagoruyko and Komodakis: 26.8 M
        (WRN28, 10, 36.5, 36_479_194, 5_243_328_768),  # Zagoruyko and Komodakis: 36.5 M
        (WRN28, 100, 36.5, 36_536_884, 5_243_386_368),
    ],
)
def test_counts_are_the_published_ones(config, classes, millions, parameters: int, macs: int) -> None:
    with torch.device("meta"):
        network = PreActResNet(PreActResNetConfig(**config), classes)
    counted = count(network.eval(), 32)
    assert (counted.parameters, counted.macs) == (parameters, macs)
    assert round(counted.parameters / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("config", "depth"),
    [({"blocks": 18}, 164), (R110, 110), (WRN28, 28), (WRN22, 22)],
)
def test_depth_counts_the_layers_with_weights(config: dict, depth: int) -> None:
    """WRN counts the convolutions of its shortcuts (6n + 4), the pre-activation ResNet does not."""
    with torch.device("meta"):
        network = PreActResNet(PreActResNetConfig(**config), 10)
    layers = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = sum("downsample" in name for name in layers)
    assert len(layers) - (1 if "widen" in config else shortcuts) == depth


@pytest.mark.parametrize(("last_stride", "side"), [(2, 8), (1, 16)])
def test_last_down_sampling_can_be_left_out(last_stride: int, side: int) -> None:
    with torch.device("meta"):
        network = PreActResNet(PreActResNetConfig(blocks=1, last_stride=last_stride), 10)
        last, tapped = network.features(torch.empty(1, 3, 32, 32), ["layer1.0", "layer2.0"])
    assert [tuple(t.shape[1:]) for t in (*tapped, last)] == [(64, 32, 32), (128, 16, 16), (256, side, side)]


def test_a_block_without_weights_in_its_residual_is_the_identity() -> None:
    network = PreActResNet(PreActResNetConfig(blocks=2), 10).eval()
    block = network.layer2[1]
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(1, 128, 4, 4)
    assert torch.equal(block(x), x)


def test_taps_are_the_bare_stream_and_the_last_map_is_activated() -> None:
    torch.manual_seed(0)
    network = PreActResNet(PreActResNetConfig(blocks=1), 10).eval()
    last, (tapped,) = network.features(torch.randn(1, 3, 8, 8), ["layer3.0"])
    assert tapped.min() < 0 <= last.min()
    assert torch.equal(last, network.bn(tapped).relu())
