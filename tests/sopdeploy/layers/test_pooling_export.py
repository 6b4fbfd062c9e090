"""Exportable poolings lower to ONNX of any batch, without control flow; the others say why they do not."""

import warnings
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.gpu_graphs import accepted
from tests.sopdeploy.layers.numerics.all_poolings import CHOICES, build, name

POOLINGS = {name(choice): build(choice, 8).eval() for choice in CHOICES}
EXPORTABLE = {key: pooling for key, pooling in POOLINGS.items() if pooling.not_exportable is None}


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
    return [torch.from_numpy(array) for array in session.run(None, {"features": features.numpy()})]


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


def test_gpu_runtimes_accept_the_exported_file(exported: Path) -> None:
    accepted(onnx.load(exported), "fp32")


@pytest.mark.parametrize(("side", "around"), [(2, 3), (5, 1)], ids=["X^T X, X Z, (X Z) X^T", "X X^T"])
def test_the_iteration_is_unrolled_into_the_products_it_takes(side, around, tmp_path: Path) -> None:
    pooling = build("isqrt", 8)
    export(pooling, side, tmp_path / "isqrt.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "isqrt.onnx").graph.node]
    assert operators.count("MatMul") == 3 * 5 - 3 + around
    features = torch.randn(3, 8, side, side).relu()
    torch.testing.assert_close(
        run(tmp_path / "isqrt.onnx", features)[0], pooling(features), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("key", ["mpncov", "deepo2p", "improved-bcnn", "g2denet", "kernel-16"])
def test_layers_without_an_onnx_form_give_reason_and_alternative(key: str) -> None:
    reason = POOLINGS[key].not_exportable
    assert reason is not None
    assert "TensorRT form; train with" in reason
