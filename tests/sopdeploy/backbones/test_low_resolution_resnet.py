import pytest
import torch
from torch import Tensor, nn

from sopdeploy.backbones.resnet import LowResolutionResNet, LowResolutionResNetConfig


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
def test_projections_stand_where_channels_change_or_the_switch_says(
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


def test_raw_input_is_sixty_times_the_standardised_one() -> None:
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
