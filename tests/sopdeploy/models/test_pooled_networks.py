"""Networks with a global pooling: published counts and dimensions, names of weights, what ships."""

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from sopdeploy import create_model, describe
from sopdeploy.errors import ConfigError


@pytest.mark.parametrize(
    ("pooling", "dimensions"),
    [
        ("gap", 512),
        ("isqrt", 32896),
        ({"kind": "isqrt", "width": 128}, 8256),
        ({"kind": "isqrt", "width": 64}, 2080),
        ("mpncov", 32896),
        ("bcnn", 262144),
        ("improved-bcnn", 262144),
        ("g2denet", 263169),
        ("cbp", 8192),
        ("kernel", 12801),  # "13K"
        ("low-rank-bilinear", 10000),  # "10K"
        ("netvlad", 32768),
        ("netfv", 65536),
    ],
)
def test_dimensions_on_vgg_are_the_published_ones(pooling: object, dimensions: int) -> None:
    described = describe("vgg16-bn", classifier="linear", pooling=pooling)
    assert described.representation == dimensions


@pytest.mark.parametrize(
    ("norm", "sides"), [("response", [55, 27, 13, 13, 13]), ("batch", [55, 27, 13, 13, 13])]
)
def test_alexnet_has_the_maps_of_its_paper_and_normalizes_across_channels(
    norm: str, sides: list[int]
) -> None:
    network = create_model("alexnet", num_classes=2, norm=norm, pooling="gap", classifier="linear").eval()
    with torch.no_grad():
        last, taps = network.feature_maps(torch.randn(1, 3, 224, 224), network.tap_channels)
    assert [tap.shape[2] for tap in taps] == sides
    assert last.shape == (1, 256, 13, 13)
    norms = [layer for layer in network.layers if isinstance(layer, torch.nn.LocalResponseNorm)]
    assert len(norms) == (2 if norm == "response" else 0)
    for layer in norms:
        x = torch.rand(1, 9, 1, 1, dtype=torch.float64) * 100
        around = [x[0, max(0, i - 2) : i + 3].square().sum() for i in range(9)]
        expected = torch.stack([x[0, i, 0, 0] / (2 + 1e-4 * s) ** 0.75 for i, s in enumerate(around)])
        torch.testing.assert_close(layer(x).flatten(), expected)


@pytest.mark.parametrize("stride_on", ["v1", "v1.5"])
def test_drn_a_dilates_what_follows_a_removed_stride(stride_on: str) -> None:
    torch.manual_seed(0)
    config = {"depth": 26, "bottleneck_stride": stride_on}
    dilated = create_model("drn-a-50", num_classes=3, **config).eval()
    expected = ResNet(Bottleneck, [2, 2, 2, 2], 3, replace_stride_with_dilation=[False, True, True]).eval()
    if stride_on == "v1":  # the 3x3 convolution is already behind the stride
        for stage, dilation in ((expected.layer3, 2), (expected.layer4, 4)):
            stage[0].conv2.dilation = stage[0].conv2.padding = (dilation, dilation)
        first = expected.layer2[0]
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    expected.load_state_dict(dilated.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dilated(images), expected(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"kind": "isqrt", "iterations": 16}, r"pooling.isqrt.iterations"),
        ({"kind": "isqrt", "rows": 1}, r"pooling.isqrt.rows: unknown key"),
        ({"kind": "mpncov", "power": 0.0}, r"pooling.mpncov.power"),
    ],
)
def test_an_invalid_pooling_is_a_one_line_error(pooling: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("resnet20", pooling=pooling)
