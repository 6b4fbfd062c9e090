import pytest
import torch
import torchvision

from sopdeploy.backbones.resnet import ResNet, ResNetConfig


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_resnet_has_torchvisions_keys_and_gives_its_logits(depth: int) -> None:
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).eval()
    ours = ResNet(ResNetConfig(depth=depth), 7).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(("conv5_stride", "side"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("depth", [18, 50])
def test_conv5_stride_decides_the_last_maps_size(depth: int, conv5_stride: int, side: int) -> None:
    with torch.device("meta"):
        network = ResNet(ResNetConfig(depth=depth, conv5_stride=conv5_stride), 3)
        last, _ = network.features(torch.empty(1, 3, 64, 64))
    assert last.shape[2:] == (side, side)


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
    last, tapped = network.features(images, ["layer3.0", "layer1.1"])
    assert torch.equal(tapped[0], seen["layer1.1"])
    assert torch.equal(tapped[1], seen["layer3.0"])
    assert torch.equal(last, seen["layer4.1"])
    assert {name: out.shape[1] for name, out in seen.items()} == network.tap_channels


def test_images_of_any_size_are_answered() -> None:
    network = ResNet(ResNetConfig(depth=18), 3).eval()
    for height, width in ((33, 65), (224, 160)):
        assert network(torch.zeros(1, 3, height, width)).shape == (1, 3)
