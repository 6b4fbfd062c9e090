"""Backbones against torchvision, published weights and published counts."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from sopdeploy import create_model
from sopdeploy.backbones.cifar_resnet import (
    PreActResNet,
    PreActResNetConfig,
)
from sopdeploy.backbones.efficientnet import MBCONV_STAGES, EfficientNet, EfficientNetConfig
from sopdeploy.backbones.resnet import LowResolutionResNet, LowResolutionResNetConfig, ResNet, ResNetConfig
from sopdeploy.layers.residual import PaddedShortcut

SLOW = [pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 101)]  # the same blocks, more of them


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


def test_features_gives_every_tapped_block_in_the_order_of_computing() -> None:
    torch.manual_seed(0)
    network = ResNet(ResNetConfig(depth=18), 3).eval()
    images = torch.randn(1, 3, 32, 32)
    seen = {}
    for name in network.tap_channels:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, out, name=name: seen.update({name: out})
        )
    last, tapped = network.feature_maps(images, ["layer3.0", "layer1.1"])
    assert torch.equal(tapped[0], seen["layer1.1"])
    assert torch.equal(tapped[1], seen["layer3.0"])
    assert torch.equal(last, seen["layer4.1"])
    assert {name: out.shape[1] for name, out in seen.items()} == network.tap_channels


class Trunk(LowResolutionResNet):
    def classify(self, features: Tensor) -> Tensor:
        return features


def trunk(**config: object) -> Trunk:
    return Trunk(LowResolutionResNetConfig(**config), num_classes=10)  # type: ignore[arg-type]


def test_option_a_takes_every_second_pixel_and_pads_channels_on_either_side() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    out = PaddedShortcut(2, 5, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()


def test_taps_are_not_activated_and_the_last_map_is() -> None:
    torch.manual_seed(0)
    network = PreActResNet(PreActResNetConfig(blocks=1), 10).eval()
    last, (tapped,) = network.feature_maps(torch.randn(1, 3, 8, 8), ["layer3.0"])
    assert tapped.min() < 0 <= last.min()
    assert torch.equal(last, network.bn(tapped).relu())


@pytest.mark.parametrize(
    ("name", "timms", "sides"),
    [
        ("efficientnet-b0", "efficientnet_b0", (64, 96)),
        ("efficientnet-lite0", "tf_efficientnet_lite0", (64, 67)),
        ("efficientnet-lite2", "tf_efficientnet_lite2", (65, 68)),
    ],
)
def test_networks_have_timms_keys_and_give_its_logits(name: str, timms: str, sides: tuple[int, int]) -> None:
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
    drops = [getattr(block.drop_path, "drop_prob", 0) for stage in network.blocks for block in stage]
    assert drops == pytest.approx([0.01 * depth for depth in range(16)])


def test_branch_blocks_are_like_those_of_their_stage() -> None:
    network = EfficientNet(EfficientNetConfig(), 3)
    for name, stage in list(MBCONV_STAGES.items())[1:]:
        block = network.branch_block(stage.channels, stage.channels, 1)
        assert block.conv_dw.kernel_size == network.get_submodule(name)[-1].conv_dw.kernel_size
        assert block.has_skip
