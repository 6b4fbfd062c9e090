"""ResNets for 224-pixel and 64-pixel images."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

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


def test_images_of_any_size_are_classified() -> None:
    network = ResNet(ResNetConfig(depth=18), 3).eval()
    for height, width in ((33, 65), (224, 160)):
        assert network(torch.zeros(1, 3, height, width)).shape == (1, 3)


class Trunk(LowResolutionResNet):
    def classify(self, features: Tensor) -> Tensor:
        return features


def trunk(**config: object) -> Trunk:
    return Trunk(LowResolutionResNetConfig(**config), num_classes=10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("side", "stride", "sides"),
    [
        (64, 2, [64, 32, 16, 8]),  # Table 1, ImageNet
        (96, 2, [96, 48, 24, 12]),  # Table 1, Places365
        (64, 1, [64, 32, 16, 16]),  # the released second-order networks
        (96, 1, [96, 48, 24, 24]),
    ],
)
def test_stages_have_the_sizes_of_table_1(side: int, stride: int, sides: list[int]) -> None:
    with torch.device("meta"):
        network = trunk(conv5_stride=stride)
        images = torch.empty(1, 3, side, side)
    last_blocks = [name for name in network.tap_channels if name.endswith(".1")]
    _, maps = network.features(images, last_blocks)
    assert [tuple(stage.shape[1:]) for stage in maps] == [
        (channels, size, size) for channels, size in zip((16, 32, 64, 128), sides, strict=True)
    ]


@pytest.mark.parametrize(("blocks", "layers"), [(2, 17), (6, 49), (4, 33)])
def test_depth_counts_the_3x3_convolutions(blocks: int, layers: int) -> None:
    with torch.device("meta"):
        network = trunk(blocks_per_stage=blocks)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == layers


@pytest.mark.parametrize(
    ("widen", "project", "stages"),
    [
        (1, False, ["layer2", "layer3", "layer4"]),
        (1, True, ["layer1", "layer2", "layer3", "layer4"]),
        (2, False, ["layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_projections_are_where_channels_change_or_the_option_asks(
    widen: int, project: bool, stages: list[str]
) -> None:
    with torch.device("meta"):
        network = trunk(widen=widen, project_first_stage=project)
    projected = [name for name, _ in network.named_modules() if name.endswith("downsample")]
    assert projected == [f"{stage}.0.downsample" for stage in stages]


def test_only_the_stem_convolution_has_a_bias() -> None:
    with torch.device("meta"):
        network = trunk()
    biased = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert biased == ["conv1"]


def test_raw_input_is_sixty_times_the_standardized_one() -> None:
    standard, raw = trunk(blocks_per_stage=1), trunk(blocks_per_stage=1, input_scaling="raw")
    raw.load_state_dict(standard.state_dict())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(raw.eval()(images * 60), standard.eval()(images), rtol=1e-4, atol=1e-4)


def test_convolutions_start_by_fan_in() -> None:
    torch.manual_seed(0)
    network = trunk(blocks_per_stage=1)
    conv = network.get_parameter("layer4.0.conv2.weight")
    assert conv.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert network.conv1.bias is not None
    assert network.conv1.bias.abs().max() == 0
