"""Global poolings: initialization, gradients, ONNX; their outputs have goldens (`tests/sweep`)."""

import warnings
from pathlib import Path
from typing import get_args

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sopdeploy.layers.covariance import covariance, covariance_factor, covariance_trace
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzConfig, Prenorm
from tests.sopdeploy.layers.numerics.all_poolings import (
    EACH_POOLING,
    build,
    name,
    relu_features,
    textbook_root,
)
from tests.support.gpu_graphs import accepted, with_a_runtime
from tests.sweep.smallest import POOLINGS


@EACH_POOLING
def test_gradients_are_those_of_finite_differences(choice) -> None:
    torch.manual_seed(4)
    features = relu_features(2, 4, 4)
    if choice["kind"] == "flatten":  # equal maxima have no gradient
        features = torch.rand_like(features)
    features.requires_grad_()
    pooling = build(choice, 4).double().eval()

    assert torch.autograd.gradcheck(pooling, (features,), fast_mode=True, nondet_tol=1e-10)


LAYERS = {name(choice): build(choice, 8).eval() for choice in POOLINGS}
EXPORTABLE = {key: pooling for key, pooling in LAYERS.items() if pooling.not_exportable is None}


class SideBySide(nn.Module):
    """All exportable poolings of one feature map, so that one export serves them all."""

    def __init__(self) -> None:
        super().__init__()
        self.poolings = nn.ModuleList(EXPORTABLE.values())

    def forward(self, features: Tensor) -> list[Tensor]:
        return [pooling(features) for pooling in self.poolings]


def export(network: nn.Module, side: int, path: Path) -> None:
    """Write *network* for maps of 8 channels, *side* x *side* and any batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.rand(2, 8, side, side),),
            path,
            dynamo=True,
            input_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def run(path: Path, features: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(array) for array in session.run(None, {"features": features.numpy()})
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "poolings.onnx"
    export(SideBySide(), 4, path)
    return path


@pytest.mark.parametrize("batch", [1, 3])
def test_the_exported_file_gives_the_numbers_of_the_layers(exported: Path, batch: int) -> None:
    features = torch.randn(batch, 8, 4, 4).relu()
    for (key, pooling), found in zip(EXPORTABLE.items(), run(exported, features), strict=True):
        with torch.no_grad():
            expected = pooling(features)
        assert found.shape == expected.shape, key
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), key


@with_a_runtime
def test_gpu_runtimes_accept_the_exported_file(exported: Path) -> None:
    accepted(onnx.load(exported), "fp32")


@pytest.mark.parametrize(
    ("side", "around"), [(2, 3), (5, 1)], ids=["X^T X, X Z, (X Z) X^T", "X X^T"]
)
def test_the_iteration_is_unrolled_into_the_products_it_takes(
    side, around, tmp_path: Path
) -> None:
    pooling = build({"kind": "isqrt"}, 8)
    export(pooling, side, tmp_path / "isqrt.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "isqrt.onnx").graph.node]

    assert operators.count("MatMul") == 3 * 5 - 3 + around

    features = torch.randn(3, 8, side, side).relu()
    torch.testing.assert_close(
        run(tmp_path / "isqrt.onnx", features)[0], pooling(features), rtol=1e-4, atol=1e-6
    )


PRENORMS = get_args(Prenorm)


@pytest.mark.parametrize("prenorm", PRENORMS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(
    ("width", "side"), [(6, 7), (16, 3), (1, 4)], ids=["M>d", "M<d", "one channel"]
)
def test_layer_equals_a_reference_in_float64(
    prenorm, compensate: bool, width: int, side: int
) -> None:
    torch.manual_seed(0)
    for iterations in range(1, 10):
        config = NewtonSchulzConfig(
            iterations=iterations, prenorm=prenorm, compensate=compensate
        )
        features = torch.randn(2, width, side, side).relu()
        rows, columns = torch.triu_indices(width, width)
        expected = textbook_root(features.double(), config)[:, rows, columns]
        layer = ISqrtCov(width, config)
        torch.testing.assert_close(layer(features.double()), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer(features).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4, -3.3])
def test_trace_of_a_constant_map_is_never_negative(level: float) -> None:
    x = covariance_factor(torch.full((1, 64, 14, 14), level))
    assert 0 <= covariance_trace(covariance(x)).item() <= (abs(level) * 1e-5) ** 2 * 64
