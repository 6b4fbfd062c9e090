"""ResNets for 224-pixel and 64-pixel images."""

import pytest
import torch
import torchvision
from torch import Tensor

from sopdeploy.backbones.resnet import LowResolutionResNet, LowResolutionResNetConfig, ResNet, ResNetConfig

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


def test_the_first_papers_bottleneck_strides_on_the_1x1_convolution() -> None:
    v1 = ResNet(ResNetConfig(depth=26, bottleneck_stride="v1"), 3)
    v15 = ResNet(ResNetConfig(depth=26), 3)
    assert (v1.layer2[0].conv1.stride, v1.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (v15.layer2[0].conv1.stride, v15.layer2[0].conv2.stride) == ((1, 1), (2, 2))
    assert {k: v.shape for k, v in v1.state_dict().items()} == {
        k: v.shape for k, v in v15.state_dict().items()
    }
    v1.load_state_dict(v15.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(v1.eval()(images), v15.eval()(images))


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


def test_raw_input_is_sixty_times_the_standardized_one() -> None:
    standard, raw = trunk(blocks_per_stage=1), trunk(blocks_per_stage=1, input_scaling="raw")
    raw.load_state_dict(standard.state_dict())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(raw.eval()(images * 60), standard.eval()(images), rtol=1e-4, atol=1e-4)
