"""Backbones against torchvision, published weights and published counts."""

import pytest
import timm
import torch
import torchvision

from sopdeploy import create_model
from sopdeploy.layers.residual import BasicBlock, PreActBasicBlock
from sopdeploy.models.backbones.efficientnet import EfficientNet, EfficientNetConfig, LiteBlock
from sopdeploy.models.backbones.resnet import ResNet, ResNetConfig

# The same blocks, more of them
SLOW = [pytest.param(depth, marks=pytest.mark.nightly) for depth in (34, 101)]


@pytest.mark.parametrize("depth", [18, 50, *SLOW])
def test_resnet_has_torchvisions_keys_and_gives_its_logits(depth: int) -> None:
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).eval()
    ours = ResNet(ResNetConfig(depth=depth), 7).eval()

    assert list(ours.state_dict()) == list(theirs.state_dict())

    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "timms", "sides"),
    [
        ("efficientnet-b0", "efficientnet_b0", (64, 96)),
        ("efficientnet-lite0", "tf_efficientnet_lite0", (64, 67)),
        ("efficientnet-lite2", "tf_efficientnet_lite2", (65, 68)),
    ],
)
def test_networks_have_timms_keys_and_give_its_logits(
    name: str, timms: str, sides: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(timms, num_classes=7).eval()
    ours = create_model(name, num_classes=7).eval()

    assert list(ours.state_dict()) == list(theirs.state_dict())

    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_drop_probability_grows_with_depth() -> None:
    network = EfficientNet(EfficientNetConfig(stochastic_depth=0.16), 3)
    drops = [
        getattr(block.drop_path, "drop_prob", 0) for stage in network.blocks for block in stage
    ]

    assert drops == pytest.approx([0.01 * depth for depth in range(16)])


def test_an_inverted_bottleneck_with_a_stride_has_no_shortcut() -> None:
    block = LiteBlock(4, 4, kernel=3, stride=2, expansion=6)
    assert block(torch.zeros(1, 4, 8, 8)).shape == (1, 4, 4, 4)


def test_a_block_with_a_stride_has_a_shortcut_though_channels_stay() -> None:
    images = torch.zeros(1, 4, 8, 8)
    for block in (BasicBlock(4, 4, 2), BasicBlock(4, 4, 2, "pad"), PreActBasicBlock(4, 4, 2)):
        assert block(images).shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet20", 32), ("resnext29-8x64d", 32), ("wrn36-2", 64)]
)
def test_the_last_maps_of_small_images_have_eight_by_eight_positions(
    name: str, side: int
) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=10)
        maps, _ = network.feature_maps(torch.empty(1, 3, side, side))
    assert maps.shape[2:] == (8, 8)
