"""A head on first-order and second-order statistics in an exported file."""

from pathlib import Path

import onnx
import pytest
from torch import nn

from sopdeploy.models import user_network
from sopdeploy.plugins import MODELS
from sopdeploy_export.graph import generated_images
from sopdeploy_export.precision.casts import float32_parts
from sopdeploy_export.precision.int8 import Int8Quantizer
from tests.gpu_graphs import accepted
from tests.sweep.steps import Small, agreed

STATISTICS = {"head": {"kind": "gap+mean+isqrt", "width": 8, "iterations": 3}}
VIT = Small("head:timm:test_vit", 160, STATISTICS)


def test_a_transformer_with_a_head_on_its_patch_tokens_agrees_and_gpu_runtimes_accept_it(
    tmp_path: Path,
) -> None:
    assert agreed(VIT.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx").passed
    accepted(onnx.load(tmp_path / "model.onnx"), "fp32")


def test_a_network_of_the_user_with_a_head_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_classes: int) -> nn.Module:
        convolutions = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 12, 3, stride=2), nn.ReLU()
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes))

    monkeypatch.setattr(MODELS, "registered", {})
    user_network.register_model("mine", build, image_size=32)
    small = Small("head:mine", 32, STATISTICS)
    assert agreed(small.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx").passed


def test_int8_quantizes_the_network_and_not_its_head(tmp_path: Path) -> None:
    small = Small("head:resnet8", 16, STATISTICS)
    assert agreed(small.trained(tmp_path / "ckpt.pt"), tmp_path / "model.onnx").passed
    images, plain = generated_images(16)[:4], onnx.load(tmp_path / "model.onnx")
    graph = Int8Quantizer(plain, images, float32_parts(small.build())).quantize().graph
    in_float = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    weights = {node.input[1] for node in graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}}
    assert weights & in_float == {
        "conv1.weight",  # reads the image
        "pooled_head.poolings.layer3_0.layer_reduce.weight",
        "pooled_head.fc.weight",
    }
