"""Parameters and multiply-adds before and after an export."""

import math
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import create_model, entry
from sopdeploy_export.pack.costs import count_costs
from sopdeploy_export.pack.results import Exported

SIDE = 16
PIXELS = 3 * SIDE * SIDE


class Einsum(nn.Module):
    """A layer of splines, as in Kolmogorov-Arnold networks: no module multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, PIXELS, 8))

    def forward(self, images: Tensor) -> Tensor:
        basis = torch.exp(-((images.flatten(1)[..., None] - torch.linspace(-1, 1, 8)) ** 2))
        return torch.einsum("bik,oik->bo", basis, self.weight)


class Functions(nn.Module):
    """A convolution and a linear layer without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 3, 1, 1))
        self.weight = nn.Parameter(torch.zeros(5, 4))

    def forward(self, images: Tensor) -> Tensor:
        maps = functional.conv2d(images, self.kernel)
        return functional.linear(maps.mean((2, 3)), self.weight)


class Attention(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2)[:, None]  # (B, 1, 3, 256)
        return functional.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(PIXELS // 3, 2, 10, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(2)).mean(1)
        return logits


CASES = {
    "einsum": (Einsum, PIXELS * 8 * 5),
    "functions": (Functions, SIDE * SIDE * 3 * 4 + 4 * 5),
    "attention": (Attention, 2 * 3 * 3 * 256),
    # Four projections, the products of the attention, and two linear layers
    "encoder": (Encoder, 3 * 4 * 256 * 256 + 2 * 3 * 3 * 256 + 2 * 3 * 256 * 10),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 2, 2), nn.Flatten()),
        SIDE * SIDE * 3 * 2 * 2 * 2,
    ),
    "in groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Flatten()),
        SIDE * SIDE * 6 * 9,
    ),
    "none": (nn.Flatten, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_products_and_convolutions_without_a_module_count(case: str) -> None:
    build, expected = CASES[case]
    trained, shipped = count_costs(build().eval(), (), Preprocess(crop=SIDE))
    assert trained == shipped
    assert shipped.macs == expected


@pytest.mark.parametrize("name", ["resnet8", "dsop-resnet8", "gsop-net1-resnet26"])
def test_the_costs_are_those_of_describe_and_the_products_of_covariances(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=entry(name).num_classes).eval()
    layers = describe(name)
    rules = Preprocess(crop=entry(name).image_size)
    trained, shipped = count_costs(network, network.training_only, rules)

    assert trained.parameters == layers.training.parameters
    assert shipped.parameters == layers.shipped.parameters
    if name == "resnet8":
        assert (trained, shipped) == (layers.training, layers.shipped)
    elif name == "dsop-resnet8":  # its branches are not exported
        assert trained.macs > layers.training.macs
        assert shipped == layers.shipped
    else:
        assert shipped.macs > layers.shipped.macs


def test_the_costs_are_those_of_the_file(branched: Exported) -> None:
    assert branched.shipped.macs == macs_of_file(branched.path / "model.onnx")


def macs_of_file(path: Any) -> int:
    """Count the multiply-adds of Conv, ConvTranspose, Gemm and MatMul for one image."""
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]

    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            values = node.output if node.op_type == "Conv" else node.input
            total += math.prod(shapes[values[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            transposed = any(item.name == "transA" and item.i for item in node.attribute)
            inner = shapes[node.input[0]][-2 if transposed else -1]
            total += math.prod(shapes[node.output[0]]) * inner
    return total
