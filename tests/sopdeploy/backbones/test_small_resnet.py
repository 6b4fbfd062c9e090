import pydantic
import pytest
import torch
from torch import nn

from sopdeploy.backbones.cifar_resnet import SmallResNet, SmallResNetConfig
from sopdeploy.layers.residual import PaddedShortcut

# He et al. (CVPR 2016), Table 6, in millions; the integers are those of the released weight files.
PUBLISHED = [
    (20, 0.27, 269_722),
    (32, 0.46, 464_154),
    (44, 0.66, 658_586),
    (56, 0.85, 853_018),
    (110, 1.7, 1_727_962),
]


@pytest.mark.parametrize(("depth", "millions", "exact"), PUBLISHED)
def test_parameters_are_the_published_ones(depth: int, millions: float, exact: int) -> None:
    with torch.device("meta"):
        network = SmallResNet(SmallResNetConfig(depth=depth), 10)
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == exact
    assert round(parameters / 1e6, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    network = SmallResNet(SmallResNetConfig(depth=depth), 10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == depth


@pytest.mark.parametrize("depth", [2, 7, 18, 21])
def test_other_depths_are_refused(depth: int) -> None:
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


def test_stages_halve_the_map_and_double_the_channels() -> None:
    with torch.device("meta"):
        network = SmallResNet(SmallResNetConfig(depth=20, base_width=8), 10)
        last, tapped = network.features(torch.empty(1, 3, 32, 32), ["layer1.2", "layer2.0"])
    assert [tuple(t.shape[1:]) for t in (*tapped, last)] == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]
