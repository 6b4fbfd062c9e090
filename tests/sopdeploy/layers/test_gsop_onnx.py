"""GSoP and the attention modules have an ONNX form: no control flow, any batch, the same numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sopdeploy import create_model
from sopdeploy.layers.attention.first_order import CBAM, GatherExcite, SqueezeExcite
from sopdeploy.layers.attention.gsop_block import RELEASED_BLOCK, GSoPBlock, GSoPBlockConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations

CHANNELS, SIDE = 64, 14  # 14 and 8 do not divide each other


def block(attention: str, **switches: object) -> Callable[[], nn.Module]:
    config = GSoPBlockConfig(attention=attention, cov_width=32, **switches)
    return lambda: nn.Sequential(nn.Conv2d(3, CHANNELS, 1), GSoPBlock(config, CHANNELS, dr_stride=2))


def baselines() -> nn.Module:
    modules = (SqueezeExcite(64, 16), CBAM(64, 16, 7), GatherExcite(64, SIDE, "global", "gather+excite", 16))
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 1), *modules, GatherExcite(64, SIDE, 4, "none", 16))


def exported(network: nn.Module, images: torch.Tensor, path: Path) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        network,
        (images,),
        path,
        dynamo=True,
        input_names=["images"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
    return onnx.load(path)


@pytest.mark.parametrize(
    ("build", "side"),
    [
        pytest.param(block("concatenation"), SIDE, id="paper"),
        pytest.param(block("concatenation", **RELEASED_BLOCK), SIDE, id="released"),
        pytest.param(baselines, SIDE, id="baselines"),
        pytest.param(lambda: create_model("gsop-net2-preact-resnet29", blocks=2), 16, id="net2"),
    ],
)
def test_exported_network_gives_the_same_numbers_for_every_batch(build, side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build().eval()
    model = exported(network, torch.randn(2, 3, side, side), tmp_path / "model.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert operators.isdisjoint({"Loop", "If", "Scan", "Resize"})
    assert not model.functions
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            expected = network(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
